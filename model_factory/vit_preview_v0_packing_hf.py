"""The packing LlavaViT under the documents' module name."""

from llava_packing_tower import (
    LlavaViTPackingConfig,
    LlavaViTPackingModel,
    compute_patch_positions_from_grid_thw,
)

__all__ = ["LlavaViTPackingConfig", "LlavaViTPackingModel", "compute_patch_positions_from_grid_thw"]
