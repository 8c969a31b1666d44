"""Compare a packed encoder with transformers' own model, image by image, on the same checkpoint.

The comparison covers single resolutions, one pack of mixed resolutions and, with --use_real_images, ten photographs at
random sizes. It runs in float32 on the CPU and in bfloat16 on a GPU. A row passes if its smallest cosine reaches the
threshold and its largest difference is allowed: in half precision twice the error of transformers' own model in the
same precision (both against transformers in float32), in float32 a thousandth of the largest feature. The exit status
is 0 if all rows pass, 1 if not, and 2 if a checkpoint cannot be used or there is nothing to compare with.

  llava-packing align --ckpt google/siglip2-so400m-patch16-naflex --use_real_images
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch

from ..attention.dispatch import BACKENDS
from ..checkpoint.hub import resolve_folder
from ..convert.hf_reference import NoReference, Reference, require_reference
from ..convert.parity import Row, compare, comparison_packs, fixed_size, real_images, side_unit
from ..data.images import open_image
from ..models.registry import family_for, part_of, type_of
from ..towers.names import check_single
from ..utils.device import resolve_device
from ..utils.errors import UsageError
from ..utils.files import CONFIG_NAME, read_json, write_text

PHOTO_COUNT = 10
PASSED, FAILED = "ALL TESTS PASSED", "SOME TESTS FAILED"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ckpt", required=True, help="original checkpoint: folder or hub id")
    parser.add_argument("--packed", help="packing checkpoint to compare (default: --ckpt, converted in memory)")
    parser.add_argument("--family", help="siglip2, dinov3, qwen3_vl ... (default: by the checkpoint's model_type)")
    parser.add_argument(
        "--device",
        default="auto",
        help="cuda or cpu (default: cuda if there is one)",
    )
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="dtype of the packed encoder",
    )
    parser.add_argument("--batch_size", type=int, default=2, help="images per single resolution (default: 2)")
    parser.add_argument("--image_size", type=int, help="one resolution instead of 224, 336 and 448")
    parser.add_argument("--threshold", type=float, default=0.99, help="smallest cosine that passes (default: 0.99)")
    parser.add_argument("--use_real_images", action="store_true", help="also compare ten photographs at random sizes")
    parser.add_argument(
        "--attention", default="auto", choices=("auto", *BACKENDS), help="attention backend of the packed encoder"
    )
    parser.add_argument("--json", type=Path, help="also write the rows to this file")


def run(args: argparse.Namespace) -> int:
    if args.batch_size < 1:
        raise UsageError(f"--batch_size must be at least 1, got {args.batch_size}")
    torch.backends.cudnn.allow_tf32 = False  # the float32 reference convolves; TF32 would be its largest error
    try:
        for given in filter(None, (args.ckpt, args.packed)):
            check_single(given, "align")
    except ValueError as error:
        raise UsageError(str(error)) from error
    try:
        return _compare_all(args)
    except (NoReference, ImportError, ValueError) as error:  # ImportError: a backend asked for that is not installed
        raise UsageError(str(error)) from error


def _compare_all(args: argparse.Namespace) -> int:
    folder = resolve_folder(args.ckpt, part=part_of)
    found = type_of(read_json(folder / CONFIG_NAME))
    family = family_for(found)
    own_type = family.config_class.model_type
    if args.family and own_type != f"{args.family.removesuffix('_packing')}_packing":
        raise UsageError(f"{args.ckpt} is a {found} checkpoint, which is not of the family {args.family!r}")
    if found == own_type:
        raise UsageError(f"{args.ckpt} is a packing checkpoint; give the original as --ckpt and this one as --packed")

    require_reference(own_type)
    args.device = str(resolve_device(args.device))
    dtype = _dtype(args)
    packed = resolve_folder(args.packed) if args.packed else folder
    model = family.from_pretrained(packed, dtype=dtype, device=args.device, attn_implementation=args.attention)
    exact = Reference(own_type, folder, torch.float32, args.device)
    low = None if dtype == torch.float32 else Reference(own_type, folder, dtype, args.device)
    if low:  # the same rounded weights in all three: only the arithmetic is compared
        exact.round_weights(dtype)
    print(f"{family.__name__} from {packed}, {args.device}, {dtype}, against {type(exact.model).__name__}")

    def photographs() -> list[torch.Tensor]:
        processor = family.load_image_processor(folder, model.config)
        return real_images(_photos(), processor, side_unit(model), fixed_size(model))

    try:
        photos = photographs if args.use_real_images else None
        packs = list(comparison_packs(model, args.batch_size, args.image_size, photos))
    except ValueError as error:
        raise UsageError(str(error)) from error
    if fixed_size(model):
        print(f"learned positions for {fixed_size(model)} pixels only: no other size, no mixed pack")
    print(f"{'test':<12} {'images':>6} {'patches':>8} {'min cosine':>12} {'mean cosine':>12}", end="")
    print(f" {'max diff':>9} {'allowed':>9}")
    rows = []
    for name, images in packs:
        rows.append(compare(name, images, model, exact, low, args.threshold))
        print(_line(rows[-1]), flush=True)
    passed = all(row.passed for row in rows)
    if args.json:
        write_text(args.json, json.dumps([_entry(row) for row in rows], indent=1) + "\n")
    print(PASSED if passed else FAILED)
    return 0 if passed else 1


def _dtype(args: argparse.Namespace) -> torch.dtype:
    if args.dtype == "auto":
        return torch.bfloat16 if torch.device(args.device).type == "cuda" else torch.float32
    return getattr(torch, args.dtype)


def _photos() -> list:

    from ..data.sample_photos import PHOTOS, source_of

    try:
        return [open_image(source_of(photo)) for photo in PHOTOS[:PHOTO_COUNT]]
    except FileNotFoundError as error:
        raise UsageError(f"--use_real_images: {error}") from error


def _entry(row: Row) -> dict:
    """A row for JSON, which knows neither NaN nor infinity: null."""
    numbers = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in vars(row).items()}
    return {**numbers, "passed": row.passed}


def _line(row: Row) -> str:
    return (
        f"{row.name:<12} {row.images:>6} {row.tokens:>8} {row.min_cosine:>12.8f} {row.mean_cosine:>12.8f} "
        f"{row.max_difference:>9.2e} {row.allowed_difference:>9.2e}  {'PASS' if row.passed else 'FAIL'}"
    )
