"""Convert a checkpoint and verify the result.

SRC is a folder or hub id of a standard LlavaViT (`llava_vit`), a OneVision encoder, a packing checkpoint, an encoder of
any other family, alone or in its VLM, or a training checkpoint (.pt, .pth, .safetensors), which needs --model_name. The
direction follows from SRC: standard to packing, and packing back to standard. SRC is not changed. The output is
complete or absent. The exit status is 0 if all went well, 1 if a test failed (the output is moved to *.failed) or the
disk refused, and 2 if SRC or an option cannot be used.

  llava-packing convert checkpoints/hevc_vit_large
  llava-packing convert backbone.pt --model_name llava_vit_large_ln --output_dir checkpoints/large_packing
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.console import Console

from ..convert.pipeline import REPORT_NAME, NotWritten, Options, Outcome, Progress, convert
from ..convert.plan import Conversion, DoesNotFit, peak_memory
from ..convert.report import (
    announce,
    make_console,
    print_plan,
    print_problems,
    print_results,
    print_written,
    progress_bars,
)
from ..convert.verify import STEPS, THRESHOLDS
from ..towers.names import check_single
from ..utils.files import read_json, write_for_program


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("src", metavar="SRC", help="checkpoint folder, hub id or weight file")
    parser.add_argument("--target_model_name", help="name of the sizes that the result must have, or its model_type")
    parser.add_argument("--output_dir", help="folder to write (default: beside SRC, <name>_packing or <name>_standard)")
    parser.add_argument(
        "--dtype",
        default="keep",
        choices=("float32", "bfloat16", "float16", "keep"),
        help="dtype of the result (default: keep)",
    )
    parser.add_argument("--no-verify", action="store_true", help="do not compare the result with the source")
    add_common_arguments(parser)
    parser.add_argument("--json", type=Path, help="also write the results to this file")


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that `convert` and `verify` share."""
    parser.add_argument(
        "--model_name", help="name of the model in a file that has no config.json, e.g. llava_vit_large_ln"
    )
    parser.add_argument("--num_attention_heads", type=int, help="for a training checkpoint whose sizes have no name")
    parser.add_argument(
        "--layer_norm_eps",
        type=float,
        help="for a training checkpoint (default: 1e-6, as in published conversions; the training code used 1e-5)",
    )
    parser.add_argument(
        "--image_size", type=int, help="for a training checkpoint: nominal side in pixels (default: 448)"
    )
    parser.add_argument("--device", default="auto", help="where to verify: auto, cpu or cuda (default: auto)")
    parser.add_argument(
        "--images", help="folder of photos to verify with (default: those in scikit-learn, scikit-image)"
    )


def options_of(args: argparse.Namespace, **more: object) -> Options:
    fields = {name: getattr(args, name) for name in ("num_attention_heads", "layer_norm_eps", "image_size")}
    return Options(
        model_name=args.model_name,
        device=args.device,
        images=args.images,
        fields={name: value for name, value in fields.items() if value is not None},
        **more,
    )


def run(args: argparse.Namespace) -> int:
    console, errors = make_console(), make_console(stderr=True)
    try:
        outcome = _convert(args, console)
    except DoesNotFit as error:
        print_problems(errors, f"ERROR: {error.message}:", error.rows)
        return 2
    except (ValueError, OSError, ImportError) as error:
        errors.print(f"ERROR: {error}", markup=False, soft_wrap=True)
        return 1 if isinstance(error, NotWritten) else 2
    print_written(console, outcome.report)
    report = read_json(outcome.folder / REPORT_NAME)
    write_for_program(args.json, {"output": outcome.folder, "passed": outcome.passed, **report})
    if outcome.results:
        print_results(console, outcome.results, THRESHOLDS[outcome.conversion.dtype])
        peak = peak_memory() / 1e9
        console.print(f"  verified in {outcome.verify_seconds:.1f} s, peak memory {peak:.2f} GB", soft_wrap=True)
    if not outcome.passed:
        errors.print(
            f"FAILED: the result differs from the source; it was moved to {outcome.folder}",
            markup=False,
            soft_wrap=True,
        )
        return 1
    skipped = any(result.passed is None for result in outcome.results)
    remark = " (not verified)" if not outcome.results else " (not compared with another model)" if skipped else ""
    console.print(f"written to {outcome.folder}{remark}", markup=False, soft_wrap=True)
    return 0


def run_by_name(arguments: Sequence[str], usage: str | None = None) -> int:
    """The command line of the documents' scripts: ``MODEL_NAME WEIGHT_PATH [options]``. Returns the exit status, 2 for
    a call without the two."""
    if len(arguments) < 2 or any(word.startswith("-") for word in arguments[:2]):
        asked = bool({"-h", "--help"} & set(arguments))
        print(usage or "MODEL_NAME WEIGHT_PATH [options]", file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    name, weights, *options = arguments
    parser = argparse.ArgumentParser(prog="convert")
    add_arguments(parser)
    return run(parser.parse_args([weights, "--model_name", name, *options]))


def _convert(args: argparse.Namespace, console: Console) -> Outcome:
    check_single(args.src, "convert")
    options = options_of(args, target_model_name=args.target_model_name, dtype=args.dtype, verify=not args.no_verify)
    with progress_bars(console) as bars:
        writing = bars.add_task("converting", total=None)
        verifying = bars.add_task("verifying", total=STEPS, visible=False)

        def planned(conversion: Conversion) -> None:
            print_plan(console, conversion)
            bars.update(writing, total=conversion.nbytes)

        progress = Progress(
            planned, lambda nbytes: bars.advance(writing, nbytes), partial(announce, console, bars, verifying)
        )
        return convert(args.src, args.output_dir, options, progress)
