"""Fine-tune a tiny LLaVA through the packed tower on real photographs, reload it, and ask it about each photo.

Exits with 1 when fewer than 80 % of the answers are right, when the training was not the DeepSpeed run that was asked
for, or when the tower of the reloaded checkpoint differs by a bit from the trained one.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..tools.demo import OUTPUT

TAKES_REST = True
CONFIG = Path(__file__).parents[1] / "configs" / "demo.yaml"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, default=Path(OUTPUT), help=f"folder for everything ({OUTPUT})")
    parser.add_argument("--config", type=Path, default=CONFIG, help="(the packaged configs/demo.yaml)")
    parser.epilog = "Other --key value pairs replace keys of the config, e.g. --max_steps 100 --seed 1."


def run(args: argparse.Namespace) -> int:
    from ..tools.demo.pipeline import DemoFailed, run_demo

    try:
        return run_demo(args.config, args.output, args.rest)
    except DemoFailed as failure:
        print(f"llava-packing demo: {failure}", file=sys.stderr)
        return 1
