"""Put the results of several evaluations into one table and one chart.

    llava-packing eval-report eval_results/run1 eval_results/run2 --output_path comparison

The folders are outputs of `llava-packing eval` or of lmms-eval itself.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict
from pathlib import Path

from ..utils.errors import UsageError
from ..utils.files import write_for_program


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", type=Path, nargs="+", help="output folders of evaluations")
    parser.add_argument(
        "--output_path", type=Path, help="folder for results.md and results.png (default: nothing is written)"
    )
    parser.add_argument("--json", type=Path, help="also write the results to this file")


def names_of(folders: list[Path]) -> list[str]:
    """The last parts of the paths, as many as tell them apart. Raises :class:`UsageError` for one folder twice."""
    parts = [Path(os.path.realpath(folder)).parts for folder in folders]  # (resolve fails at links in a circle)
    if len(set(parts)) < len(parts):
        raise UsageError("a folder is given twice")
    count = next(n for n in range(1, max(map(len, parts)) + 1) if len({p[-n:] for p in parts}) == len(parts))
    return ["/".join(p[-count:]) for p in parts]


def run(args: argparse.Namespace) -> int:
    from ..eval.results import markdown, read_run, write_report

    try:
        runs = {name: read_run(folder) for name, folder in zip(names_of(args.folders), args.folders)}
    except ValueError as error:
        raise UsageError(str(error)) from error
    print(markdown(runs), end="")
    results = {name: {task: asdict(result) for task, result in run.items()} for name, run in runs.items()}
    write_for_program(args.json, results)
    if args.output_path is not None:
        print(", ".join(map(str, write_report(args.output_path, runs))))
    return 0
