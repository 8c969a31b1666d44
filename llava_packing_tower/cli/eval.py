"""Evaluate a LLaVA checkpoint with a packing tower, or an export, on lmms-eval's tasks, each in a process of its own.

    llava-packing eval CHECKPOINT --tasks smoke
    llava-packing eval CHECKPOINT --tasks ai2d,chartqa --num_gpus 8 --log_samples

`--tasks` takes lmms-eval's task names and the groups image, video and smoke. Tasks that were completed with the same
weights and options are not run again. A failing task does not stop the others; the exit status is 1 if any failed. Any
other option is passed to lmms-eval.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import asdict
from pathlib import Path

from ..data.codec import SELECTORS
from ..utils.errors import UsageError
from ..utils.files import write_for_program

TAKES_REST = True
OWN_OPTIONS = ("--model", "--tasks", "--config", "--output_path")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="folder of a LLaVA checkpoint, or of an export")
    parser.add_argument("--tasks", required=True, help="task names and groups, joined by commas")
    parser.add_argument(
        "--output_path", type=Path, help="output folder (default: eval_results/<name of the checkpoint>)"
    )
    parser.add_argument("--num_gpus", type=int, help="number of GPUs, one process on each (default: 1)")
    parser.add_argument("--num_processes", type=int, help="run on the CPU, in this many processes")
    parser.add_argument("--limit", help="only the first samples of each task")
    parser.add_argument("--batch_size", type=int, default=8, help="requests per batch (default: 8)")
    parser.add_argument("--conv_template", help="LLaVA's conversation template (default: that of the training)")
    parser.add_argument("--model_base", type=Path, help="the model that a LoRA was trained on")
    parser.add_argument("--max_frames_num", type=int, help="frames per video (default: 32)")
    parser.add_argument(
        "--positions_thw",
        choices=SELECTORS,
        help="of videos, the patches in which something happens in place of frames (default: frames)",
    )
    parser.add_argument("--include_path", type=Path, help="a folder with your own tasks")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--force", action="store_true", help="also run completed tasks again")


def run(args: argparse.Namespace) -> int:
    from ..checkpoint.folder_hash import identity
    from ..eval.hf_inference import is_export
    from ..eval.preflight import check_checkpoint, check_installation
    from ..eval.results import write_report
    from ..eval.runner import Evaluation, run_tasks
    from ..eval.task_groups import check_known, expand, registered
    from ..eval.tasks import OWN_TASKS
    from ..utils.console import plain_console
    from ..utils.progress import progress

    console = plain_console(width=100)
    where = _where(args)
    for word in args.rest:
        if word.split("=")[0] in OWN_OPTIONS:
            raise UsageError(f"{word} is set by this command")
    include = None if args.include_path is None else str(args.include_path)
    if include is not None and not args.include_path.is_dir():
        raise UsageError(f"--include_path {include} is not a folder")
    try:
        tasks = expand(args.tasks)
        check_installation(host=not is_export(args.checkpoint))
        check_checkpoint(args.checkpoint, args.model_base)
        if not set(tasks) <= set(OWN_TASKS):
            check_known(tasks, registered(include))
        with progress("reading the weights", in_bytes=True) as shown:
            weights = identity(args.checkpoint, args.model_base, shown)
    except ValueError as error:
        raise UsageError(str(error)) from error
    model = {
        "pretrained": args.checkpoint,
        "weights": weights,
        "model_base": args.model_base,
        "conv_template": args.conv_template,
        "max_frames_num": args.max_frames_num,
        "positions_thw": args.positions_thw,
    }
    model = {name: value for name, value in model.items() if value is not None}
    output = args.output_path or Path("eval_results") / args.checkpoint.resolve().name
    try:
        evaluation = Evaluation(
            model,
            output,
            batch_size=args.batch_size,
            limit=args.limit,
            include=include,
            rest=tuple(args.rest),
            force=args.force,
            **where,
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
    console.print(f"{args.checkpoint} (weights {weights}): {', '.join(tasks)}", soft_wrap=True)
    results = run_tasks(evaluation, tasks, console)
    written = write_report(output, {args.checkpoint.resolve().name: results})
    console.print((output / "results.md").read_text(encoding="utf-8"), soft_wrap=True)
    console.print(f"{', '.join(map(str, written))}", soft_wrap=True)
    write_for_program(args.json, {task: asdict(result) for task, result in results.items()})
    failed = [task for task, result in results.items() if result.error is not None]
    if failed:
        said = f"{len(failed)} of {len(tasks)} tasks failed: {', '.join(failed)}"
        plain_console(width=100, stderr=True).print(said, style="bold red", soft_wrap=True)
    return 1 if failed else 0


def _where(args: argparse.Namespace) -> dict[str, object]:
    """Processes and devices. Raises :class:`UsageError` for more GPUs than there are."""
    if args.num_gpus is not None and args.num_processes is not None:
        raise UsageError("--num_processes is for runs on the CPU; with --num_gpus leave it out")
    if args.batch_size < 1:
        raise UsageError(f"--batch_size must be at least 1, got {args.batch_size}")
    if args.max_frames_num is not None and args.max_frames_num < 1:
        raise UsageError(f"--max_frames_num must be at least 1, got {args.max_frames_num}")
    if args.limit is not None and not _is_limit(args.limit):
        raise UsageError(f"--limit must be a number of samples, or a share of them below 1, got {args.limit!r}")
    count = args.num_gpus if args.num_processes is None else args.num_processes
    if count is not None and count < 1:
        raise UsageError(f"the number of processes must be at least 1, got {count}")
    if args.num_processes is not None:
        return {"processes": count, "on_cpu": True, "environment": {"CUDA_VISIBLE_DEVICES": ""}}
    if args.num_gpus is not None:
        import torch

        if args.num_gpus > torch.cuda.device_count():
            raise UsageError(f"--num_gpus {args.num_gpus}, but this machine has {torch.cuda.device_count()}")
    return {"processes": count or 1}


def _is_limit(text: str) -> bool:
    """lmms-eval's own: -1 stands for all samples."""
    try:
        return 0 < float(text) < math.inf or float(text) == -1
    except ValueError:
        return False
