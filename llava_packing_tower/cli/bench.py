"""Packed encoders beside transformers' models, timm's NaFlex and the original tower: same sizes, same images, one
process, in turns.

Prints a table per workload, with what is asked of ours on an H100, and writes JSON and a picture. On a GPU the real
sizes in bfloat16; on a CPU tiny ones in float32, which only show that everything runs.

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
        "--family", default="llava_vit", help="llava_vit, siglip2, aimv2, dinov3, several with commas (llava_vit)"
    )
    parser.add_argument(
        "--work",
        help="uniN, uniN@SIDE, raggedN, raggedN#SEED with commas; train: in front for forward + backward",
    )
    parser.add_argument("--train", action="store_true", help="forward + backward for every workload")
    parser.add_argument("--peers", default="", help="transformers, timm, original=PATH, with commas")
    parser.add_argument("--backend", default="auto", help="attention backends of ours, with commas (auto)")
    parser.add_argument("--repeat", type=int, help="rounds (20 on a GPU, 3 on a CPU)")
    parser.add_argument("--limit", type=float, default=480.0, help="seconds that the whole run may take (480)")
    parser.add_argument("--size", choices=("full", "tiny"), help="of models and images (full on a GPU, else tiny)")
    parser.add_argument("--seed", type=int, default=1, help="of the sizes of ragged images (1)")
    parser.add_argument("--device", help="cuda or cpu (cuda if there is one)")
    parser.add_argument(
        "--scaling", action="store_true", help="tokens per second over images and over tokens, ours only"
    )
    parser.add_argument("--breakdown", action="store_true", help="where the time goes, by kind of kernel, ours only")
    parser.add_argument("--json", type=Path, help="write everything here")
    parser.add_argument("--plot", type=Path, help="write a picture (PNG) here; needs matplotlib")


def run(args: argparse.Namespace) -> int:
    from ..tools.bench.session import Session

    if args.plot:
        _require_matplotlib()
    if args.scaling and args.breakdown:
        raise UsageError("--scaling and --breakdown are two runs: give one of them")
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
