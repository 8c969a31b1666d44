"""`python -m llava_packing_tower` is the `llava-packing` command."""

import sys

from .cli import main

sys.exit(main())
