"""Compare two LlavaViT checkpoints on photographs.

A and B are folders, hub ids or weight files of any kind that `convert` reads. One runs as the standard model, sample by
sample, the other packed. B is checked against A: it is also saved, reloaded and compared bit by bit. The exit status is
0 if all five tests pass, 1 if one does not, and 2 if A, B or an option cannot be used.

  llava-packing verify checkpoints/hevc_vit_large checkpoints/hevc_vit_large_packing
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from functools import partial
from pathlib import Path

from ..convert.pipeline import any_failed, verify_pair
from ..convert.report import announce, make_console, print_results, progress_bars
from ..convert.verify import STEPS
from ..towers.names import check_single
from ..utils.files import write_for_program
from .convert import add_common_arguments, options_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", metavar="A", help="checkpoint folder, hub id or weight file")
    parser.add_argument("b", metavar="B", help="the checkpoint to check against A")
    parser.add_argument(
        "--dtype",
        default="keep",
        choices=("float32", "bfloat16", "float16", "keep"),
        help="dtype of the comparison (default: float32 if both checkpoints are, else the narrower one)",
    )
    add_common_arguments(parser)
    parser.add_argument("--json", type=Path, help="also write the results to this file")


def run(args: argparse.Namespace) -> int:
    console = make_console()
    try:
        for given in (args.a, args.b):
            check_single(given, "verify")
        with progress_bars(console) as bars:
            task = bars.add_task("verifying", total=STEPS)
            step = partial(announce, console, bars, task)
            results, threshold = verify_pair(args.a, args.b, options_of(args, dtype=args.dtype), step)
    except (ValueError, OSError, ImportError) as error:
        make_console(stderr=True).print(f"ERROR: {error}", markup=False, soft_wrap=True)
        return 2
    print_results(console, results, threshold)
    failed = any_failed(results)
    tests = [asdict(result) for result in results]
    write_for_program(
        args.json, {"a": args.a, "b": args.b, "threshold": threshold, "passed": not failed, "tests": tests}
    )
    console.print(
        f"{args.b} " + ("FAILED: it differs from A" if failed else "agrees with A"),
        markup=False,
        soft_wrap=True,
    )
    return int(failed)
