"""Measure packed encoders beside transformers' models, timm's NaFlex and the original tower.

All systems get the same images, in one process, with interleaved rounds. The command prints a table per workload, with
the targets of the packed encoder on an H100, and writes JSON and a figure. On a GPU it runs the real sizes in bfloat16.
On a CPU it runs tiny sizes in float32, which only shows that everything works.

With --training-step it measures a whole training step of LLaVA instead (forward and backward), beside stock LLaVA-NeXT
with its CLIP tower; LLAVA_DIR names its folder. The results are written after every turn.

examples:
  llava-packing bench
  llava-packing bench --family llava_vit --work uni1,uni32,ragged64,train:uni16 --peers timm,original=OneVision-Encoder
  llava-packing bench --family siglip2,dinov3,aimv2 --peers transformers --json bench.json --plot bench.png
  llava-packing bench --breakdown --work uni32,ragged64
  llava-packing bench --scaling --plot scaling.png
  llava-packing bench --training-step --limit 300 --json step.json --plot step.png
  llava-packing bench --training-step --rows stock,native,16+flash_attention_4 --repeat 2 --memory 80
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

from ..utils import environment
from ..utils.device import resolve_device
from ..utils.errors import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--family", default="llava_vit", help="llava_vit, siglip2, aimv2, dinov3, joined by commas (default: llava_vit)"
    )
    parser.add_argument(
        "--work",
        help="uniN, uniN@SIDE, raggedN, raggedN#SEED, joined by commas; the prefix train: means forward + backward",
    )
    parser.add_argument("--train", action="store_true", help="forward + backward for every workload")
    parser.add_argument("--peers", default="", help="transformers, timm, original=PATH, joined by commas")
    parser.add_argument(
        "--backend", default="auto", help="attention backends of the packed encoder, joined by commas (default: auto)"
    )
    parser.add_argument("--repeat", type=int, help="rounds (default: 20 on a GPU, 3 on a CPU)")
    parser.add_argument("--limit", type=float, default=480.0, help="time limit of the run in seconds (default: 480)")
    parser.add_argument(
        "--size", choices=("full", "tiny"), help="size of models and images (default: full on a GPU, else tiny)"
    )
    parser.add_argument("--seed", type=int, default=1, help="seed of the sizes of ragged images (default: 1)")
    parser.add_argument("--device", help="cuda or cpu (default: cuda if there is one)")
    parser.add_argument(
        "--scaling", action="store_true", help="tokens per second over images and over tokens, packed encoder only"
    )
    parser.add_argument("--breakdown", action="store_true", help="time per kind of kernel, packed encoder only")
    parser.add_argument("--training-step", action="store_true", help="a training step, beside stock LLaVA-NeXT")
    parser.add_argument(
        "--rows",
        help="with --training-step: which rows of its table, joined by commas (default: all); ROW+no_liger, "
        "ROW+padded, ROW+full_logits and ROW+BACKEND (of the decoder's attention) are variants of a row",
    )
    parser.add_argument("--memory", type=float, help="with --training-step: GiB of GPU memory to use (default: all)")
    parser.add_argument(
        "--check", action="store_true", help="with --training-step: compare gradients with those in float32 first"
    )
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--plot", type=Path, help="write a figure (PNG) to this file; needs matplotlib")


def run(args: argparse.Namespace) -> int:
    began = time.monotonic()
    if args.plot:
        _check_plot(args.plot)
    if args.scaling and args.breakdown:
        raise UsageError("--scaling and --breakdown exclude each other")
    if args.breakdown and args.plot:
        raise UsageError("--breakdown has no figure: leave out --plot")
    if args.repeat is not None and args.repeat < 1:
        raise UsageError(f"--repeat must be at least 1, got {args.repeat}")
    if not args.limit >= 0:
        raise UsageError(f"--limit must be a number of seconds, got {args.limit}")
    if args.memory is not None and not args.memory > 0:
        raise UsageError(f"--memory must be above 0, got {args.memory}")
    given = {"--rows": args.rows, "--memory": args.memory, "--check": args.check or None}
    if not args.training_step and (alone := [name for name, value in given.items() if value is not None]):
        raise UsageError(f"{', '.join(alone)} belongs to --training-step")
    try:
        device = resolve_device(args.device)
    except ValueError as error:
        raise UsageError(str(error)) from error
    argv = ["llava-packing", "bench", *sys.argv[2:]]
    if args.training_step:
        return _run_training_step(args, device, argv, began)
    from ..tools.bench.session import Session

    try:
        session = Session.from_arguments(args, device, argv)
    except (ValueError, ImportError) as error:
        raise UsageError(str(error)) from error
    if args.scaling:
        session.scale()
    elif args.breakdown:
        session.break_down()
    else:
        session.compare()
    session.write(args.plot)
    return 0


def _run_training_step(args: argparse.Namespace, device: torch.device, argv: list[str], began: float) -> int:
    if args.scaling or args.breakdown:
        raise UsageError("--training-step excludes --scaling and --breakdown")
    if not environment.clone():
        raise UsageError("--training-step compares with LLaVA-NeXT: set LLAVA_DIR to its folder")
    from ..tools.bench.training import session

    try:
        return session.run(args, device, argv, began)
    except (ValueError, ImportError) as error:
        raise UsageError(str(error)) from error


def _check_plot(file: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError(f"--plot needs matplotlib ({error}): pip install matplotlib") from error
    known = sorted(Figure().canvas.get_supported_filetypes())
    if file.suffix.lower().lstrip(".") not in ("", *known):
        raise UsageError(f"--plot {file}: a figure cannot be written as {file.suffix}; known are {', '.join(known)}")
