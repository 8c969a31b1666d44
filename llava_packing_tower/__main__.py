"""`python -m llava_packing_tower` is the `llava-packing` command."""

import sys

from .cli.main import main

sys.exit(main())
