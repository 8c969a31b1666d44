"""Measure packed encoders beside transformers' models, timm's NaFlex and the original tower.

All systems get the same images, in one process, with interleaved rounds. The command prints a table per workload, with
the targets of the packed encoder on an H100, and writes JSON and a figure. On a GPU it runs the real sizes in bfloat16.
On a CPU it runs tiny sizes in float32, which only shows that everything works.

examples:
  llava-packing bench
  llava-packing bench --family llava_vit --work uni1,uni32,ragged64,train:uni16 --peers timm,original=OneVision-Encoder
  llava-packing bench --family siglip2,dinov3,aimv2 --peers transformers --json bench.json --plot bench.png
  llava-packing bench --breakdown --work uni32,ragged64
  llava-packing bench --scaling --plot scaling.png
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

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
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--plot", type=Path, help="write a figure (PNG) to this file; needs matplotlib")


def run(args: argparse.Namespace) -> int:
    from ..tools.bench.session import Session

    if args.plot:
        _require_matplotlib()
    if args.scaling and args.breakdown:
        raise UsageError("--scaling and --breakdown exclude each other")
    if args.repeat is not None and args.repeat < 1:
        raise UsageError(f"--repeat must be at least 1, got {args.repeat}")
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no CUDA GPU")
    try:
        session = Session.from_arguments(args, device, ["llava-packing", "bench", *sys.argv[2:]])
    except (ValueError, ImportError) as error:
        raise UsageError(str(error)) from error
    if args.scaling:
        session.scale()
    elif args.breakdown:
        session.break_down()
    else:
        session.compare()
    session.write(args.json, args.plot)
    return 0


def _require_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UsageError(f"--plot needs matplotlib ({error}): pip install matplotlib") from error
