"""Turn an export back into a LLaVA checkpoint.

The weights are those of the export, bit by bit; tokenizer and configuration are those of the checkpoint that was
exported, whose tower's weights are now in its own files. A folder that transformers saved after training the export
further needs --origin, the export.

  llava-packing import exported/run1 --output_dir checkpoints/run1_again
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from functools import partial
from pathlib import Path

from ..utils.errors import UsageError
from ..utils.files import write_for_program
from ..utils.progress import progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="folder that `llava-packing export` wrote")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder to write; it must not exist or be empty")
    parser.add_argument("--origin", type=Path, help="the export on which the folder was trained")
    parser.add_argument("--max_shard_size", default="5GB", help="largest weight file (default: 5GB)")
    parser.add_argument("--json", type=Path, help="also write what was made to this file")


def run(args: argparse.Namespace) -> int:
    from ..export.restore import restore

    try:
        bar = partial(progress, in_bytes=True)
        made = restore(args.folder, args.output_dir, args.origin, args.max_shard_size, bar)
    except ValueError as error:
        raise UsageError(str(error)) from error
    print(f"written to {made.folder}: {made.class_name} in {made.dtype}")
    write_for_program(args.json, asdict(made))
    return 0
