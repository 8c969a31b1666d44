"""Compare the packed SigLIP2 NaFlex with transformers' own model: `align_siglip2_packing.py --ckpt FOLDER_OR_HUB_ID`.

The options are those of `llava-packing align`.
"""

import sys

from llava_packing_tower.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["align", "--family", "siglip2", *sys.argv[1:]]))
