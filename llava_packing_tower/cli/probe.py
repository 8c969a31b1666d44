"""Compare vision towers without a decoder: linear and k-NN probe on an image folder.

    llava-packing probe checkpoints/llava_vit_large_packing google/siglip2-so400m-patch16-naflex --data photos

`--data` is `photos/<class>/<image>`, of which a quarter is held out, or has `train/` and `val/` with the classes.
Features are cached, so that a second run with other classifiers takes seconds.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

from ..utils.errors import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("towers", nargs="+", metavar="TOWER", help="folders or hub ids of any family")
    parser.add_argument("--data", type=Path, required=True, help="image folder, one folder per class")
    parser.add_argument("--select_layer", type=int, default=-1, help="hidden state to use (default: -1)")
    parser.add_argument(
        "--max_patches", type=int, help="most patches of an image (default: those of the tower's nominal image)"
    )
    parser.add_argument(
        "--square",
        action="store_true",
        help="resize images with the tower's own processor instead of keeping their shapes",
    )
    parser.add_argument("--k", type=int, default=20, help="nearest neighbors (default: 20)")
    parser.add_argument(
        "--C", type=float, default=1.0, help="inverse regularization of the linear probe (default: 1.0)"
    )
    parser.add_argument(
        "--test_share", type=float, default=0.25, help="share of each class that is held out (default: 0.25)"
    )
    parser.add_argument("--batch_size", type=int, default=32, help="images per packed pass (default: 32)")
    parser.add_argument("--device", help="cuda or cpu (default: cuda if there is one)")
    parser.add_argument("--cache", type=Path, help="folder for features (default: ~/.cache/llava_packing_tower/probe)")
    parser.add_argument("--json", type=Path, help="also write the results to this file")


def run(args: argparse.Namespace) -> int:
    from rich.markup import escape
    from rich.progress import Progress
    from rich.table import Table

    from ..eval.probe import CACHE, probe, read_folder
    from ..utils.console import plain_console
    from ..utils.files import check_target, write_text

    if find_spec("sklearn") is None:
        raise UsageError("the probes need scikit-learn: pip install scikit-learn")
    if args.square and args.max_patches is not None:
        raise UsageError("--max_patches has no effect with --square")
    if not 0 < args.test_share < 1 or args.k < 1 or args.batch_size < 1 or not args.C > 0:
        raise UsageError("--test_share must be between 0 and 1, and --k, --batch_size and --C above 0")
    if args.max_patches is not None and args.max_patches < 1:
        raise UsageError(f"--max_patches must be at least 1, got {args.max_patches}")
    cache = args.cache or CACHE
    try:
        check_target(cache, is_folder=True)  # the default one, too: containers have users without a home
    except ValueError as error:
        raise UsageError(f"--cache: {error}") from error
    console = plain_console(width=120)
    options = {"layer": args.select_layer, "square": args.square, "max_patches": args.max_patches}
    results = []
    try:
        photos = read_folder(args.data, args.test_share)
        k = min(args.k, int((~photos.is_test).sum()))
        counts = f"{len(photos.files)} images of {len(photos.classes)} classes, {int(photos.is_test.sum())} held out"
        console.print(f"{args.data}: {counts}", soft_wrap=True)
        for name in args.towers:
            with Progress(console=console, transient=True) as bar:
                task = bar.add_task(escape(name), total=len(photos.files))
                result = probe(
                    *(name, photos, options, cache, k, args.C),
                    batch_size=args.batch_size,
                    device=args.device,
                    progress=lambda count, bar=bar, task=task: bar.advance(task, count),
                )
            took = f"{len(photos.files) / result.seconds:.1f} images/s" if result.seconds else "features from the cache"
            console.print(f"{name}: {took}", soft_wrap=True)
            results.append(result)
    except ValueError as error:
        raise UsageError(str(error)) from error
    table = Table("tower", "family", "hidden", "patches", "linear", f"{k}-NN", title="Accuracy on held-out images")
    for r in results:
        row = (r.tower, r.family, str(r.hidden_size), f"{r.patches:.0f}", f"{r.linear:.1%}", f"{r.knn:.1%}")
        table.add_row(*row)
    console.print(table)
    if args.json is not None:
        write_text(args.json, json.dumps([asdict(result) for result in results], indent=1))
    return 0
