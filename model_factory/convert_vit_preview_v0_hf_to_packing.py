"""Convert a standard LlavaViT: `convert_vit_preview_v0_hf_to_packing.py MODEL_NAME WEIGHT_PATH [--output_dir DIR]`.

WEIGHT_PATH is a folder, or a weight file of the named model (`hf_llava_vit_base_ln` ...). Further options are those of
`llava-packing convert`.
"""

import sys

from llava_packing_tower.cli.convert import run_by_name
from llava_packing_tower.models.llava_vit.remap import remap_state_dict_hf_to_packing

__all__ = ["remap_state_dict_hf_to_packing"]

if __name__ == "__main__":
    sys.exit(run_by_name(sys.argv[1:], __doc__))
