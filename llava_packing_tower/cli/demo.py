"""Fine-tune a tiny LLaVA with a packing tower on photographs, reload it and ask it about each photo.

The exit status is 1 if fewer than 80 % of the answers are right, if DeepSpeed did not run at the requested stage, or if
the tower of the reloaded checkpoint differs by one bit from the trained one.

  llava-packing demo
  llava-packing demo --output /tmp/demo --max_steps 100
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from ..tools.demo import OUTPUT

TAKES_REST = True
CONFIG = Path(__file__).parents[1] / "configs" / "demo.yaml"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, default=Path(OUTPUT), help=f"output folder (default: {OUTPUT})")
    parser.add_argument(
        "--config", type=Path, default=CONFIG, help="YAML file (default: the packaged configs/demo.yaml)"
    )
    parser.epilog = "Other --key value pairs replace keys of the YAML file, e.g. --max_steps 100 --seed 1."


def run(args: argparse.Namespace) -> int:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the hub's own library reads it when it is imported
    from ..tools.demo.pipeline import DemoFailed, run_demo

    try:
        return run_demo(args.config, args.output, args.rest)
    except DemoFailed as failure:
        print(f"llava-packing demo: {failure}", file=sys.stderr)
        return 1
