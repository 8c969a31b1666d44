"""Convert a checkpoint of the training code: `python convert_llava_vit_packing_to_hf.py MODEL_NAME WEIGHT_PATH`.

MODEL_NAME is that of the source (`llava_vit_large_ln` ...). Further options are those of `llava-packing convert`.
"""

import sys

from llava_packing_tower import (
    compute_patch_positions_with_interpolated_temporal,
    interpolate_frame_indices,
    remap_state_dict_packing,
)
from llava_packing_tower.cli.convert import run_by_name

__all__ = [
    "compute_patch_positions_with_interpolated_temporal",
    "interpolate_frame_indices",
    "remap_state_dict_packing",
]

if __name__ == "__main__":
    sys.exit(run_by_name(sys.argv[1:], __doc__))
