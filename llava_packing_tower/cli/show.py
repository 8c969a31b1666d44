"""Show what a tower sees of images and videos: resized pixels, patches, tokens, the packed row and what it costs.

In a terminal the picture is made of characters; `--out` writes a PNG, of the first 40 images. For a video
its sampled frames are shown with their positions in time. `--positions` takes the positions of the patches that a codec
sample has kept.

  llava-packing show photo.jpg --tower checkpoints/llava_vit_large_packing
  llava-packing show photo.jpg clip.mp4 --tower google/siglip2-so400m-patch16-naflex --features --out seen.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ..towers.names import check_single
from ..utils.errors import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help="images and videos, packed in one pass")
    parser.add_argument("--tower", required=True, help="folder or hub id of any family")
    parser.add_argument("--out", type=Path, metavar="F.png", help="write the picture to this file")
    parser.add_argument(
        "--features", action="store_true", help="run the tower; its features as colors, time and memory"
    )
    parser.add_argument("--projector", default="linear", help="mm_projector_type, for the tokens (default: linear)")
    parser.add_argument(
        "--max_patches", type=int, help="most patches of an image (default: those of the tower's nominal image)"
    )
    parser.add_argument("--frames", type=int, default=8, help="frames of a video (default: 8)")
    parser.add_argument("--positions", type=Path, metavar="F.npy", help="positions of the patches of one codec sample")
    parser.add_argument("--device", help="cuda or cpu (default: cuda if there is one)")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")


def run(args: argparse.Namespace) -> int:
    from ..tools.show import look, picture
    from ..utils.device import resolve_device
    from ..utils.files import write_for_program

    if args.frames < 1 or (args.max_patches is not None and args.max_patches < 1):
        raise UsageError("--frames and --max_patches must be at least 1")
    if args.positions is not None and len(args.images) != 1:
        raise UsageError("--positions belongs to one image, the sample of kept patches")
    if args.out is not None and args.out.suffix.lower() not in ("", ".png"):
        raise UsageError(f"--out {args.out}: the picture is a PNG")
    try:
        check_single(args.tower, "show")
        device = resolve_device(args.device)
        tower = look.load(args.tower, args.projector, args.max_patches, str(device))
        images = [look.see(tower, file, args.frames) for file in args.images]
        if args.positions is not None:
            look.place_patches(images[0], args.positions)
    except ValueError as error:
        raise UsageError(str(error)) from error
    cost, colors = look.cost_of(tower, images), None
    if args.features:
        look.run(tower, images, cost)
        colors = look.principal_colors(images)
    patch, width = tower.config.patch_size, picture.terminal_width()
    lines = describe(cost, images, str(tower.device))
    if args.out is not None:
        picture.draw(args.out, images, patch, lines, colors)
    for number, seen in enumerate(images):
        print(picture.headline(number, seen))
        if seen.indices is not None:
            places = ", ".join(f"{index} at {int(at)}" for index, at in zip(seen.indices, seen.positions))
            print(f"   frames and their positions: {places}")
        if args.out is None:
            print("\n".join(picture.as_text(seen, patch, width)))
    print(picture.pack_as_text(images, width))
    print("\n".join(lines if args.out is None else [*lines, f"written to {args.out}"]))
    write_for_program(args.json, numbers(cost, images))
    return 0


def describe(cost, images, device: str) -> list[str]:
    """What one pass over all images costs, in words."""
    total, segments = sum(seen.patches for seen in images), sum(len(seen.segments) for seen in images)
    lines = [
        f"one pass of {total} patches in {segments} segments on {device}: {cost.flops / 1e9:.3g} GFLOP, estimated "
        f"{1e3 * cost.estimate:.3g} ms at the {cost.rate / 1e9:.3g} GFLOP/s of a matmul here",
        f"memory: {cost.weights / 1e6:.4g} MB of weights, about {cost.activations / 1e6:.4g} MB of activations",
    ]
    if cost.seconds is not None:
        lines.append(f"measured: {1e3 * cost.seconds:.3g} ms in the first pass, {cost.memory / 1e6:.4g} MB at most")
    return lines


def numbers(cost, images) -> dict:
    """For ``--json``."""
    return {
        "images": [
            {
                "name": seen.name,
                "size": seen.size,
                "resized": [seen.pixels.shape[2], seen.pixels.shape[1]],
                "grid": seen.grid,
                "tokens": seen.tokens,
                "frame_indices": seen.indices,
                "positions": None if seen.positions is None else seen.positions.tolist(),
            }
            for seen in images
        ],
        "patches": sum(seen.patches for seen in images),
        "flops": cost.flops,
        "estimated_seconds": cost.estimate,
        "weight_bytes": cost.weights,
        "activation_bytes": cost.activations,
        "measured_seconds": cost.seconds,
        "measured_bytes": cost.memory,
    }
