"""What the alignment scripts share; see `llava_packing_tower.convert.alignment_utils`."""

from llava_packing_tower.convert.alignment_utils import (
    PIL_AVAILABLE,
    compute_similarity_metrics,
    convert_to_packing_format,
    convert_to_patches,
    generate_test_image,
    load_image_as_tensor,
    print_metrics,
    round_up_to_multiple,
)

__all__ = [
    "PIL_AVAILABLE",
    "compute_similarity_metrics",
    "convert_to_packing_format",
    "convert_to_patches",
    "generate_test_image",
    "load_image_as_tensor",
    "print_metrics",
    "round_up_to_multiple",
]
