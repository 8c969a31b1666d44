"""Compare the packed AIMv2 with transformers' own model: `python align_aim_v2_packing.py --ckpt FOLDER_OR_HUB_ID`.

The options are those of `llava-packing align`.
"""

import sys

from llava_packing_tower.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["align", "--family", "aimv2", *sys.argv[1:]]))
