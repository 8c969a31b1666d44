"""One lmms-eval process per task: a failing task does not stop the others, and a completed one is not run again."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path

from rich.console import Console

from .. import __version__
from ..utils.console import plain_console
from ..utils.files import write_text
from ..utils.net import free_port
from ..utils.run_lock import RunLock
from ..utils.supervise import child
from ..utils.versions import installed
from . import MODEL
from .preflight import plugin_environment
from .results import DONE, TaskResult, read_marker, read_task
from .task_groups import include_path

logger = logging.getLogger(__name__)

LOG = "log.txt"
ERROR_LINE = re.compile(r"^(?:[\w.]+\.)?\w*(?:Error|Exception|Exit|Interrupt|Refused|Timeout)\w*(?::.*|$)")
PROGRESS = ("reading the weights:", "requests:")
REPORTED = re.compile(r"Error during evaluation: (.*?)\. Please set `--verbosity", re.DOTALL)


@dataclass(frozen=True)
class Evaluation:
    """What is evaluated and how. ``model_args``: arguments of the model `llava_packing`; ``rest``: lmms-eval's own
    words."""

    model_args: Mapping[str, object]
    output: Path
    batch_size: int = 8
    processes: int = 1
    on_cpu: bool = False
    limit: str | None = None
    include: str | None = None
    rest: tuple[str, ...] = ()
    force: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value in self.model_args.items():
            if {",", "="} & set(str(value)):
                raise ValueError(
                    f"{name}: {value} has a comma or an equals sign, which lmms-eval uses as separators: "
                    f"give a link to it without them (ln -s)"
                )

    def key(self, task: str) -> str:
        """What a result depends on: the weights, the task, every option except batches and processes, the versions."""
        arguments = {name: str(value) for name, value in self.model_args.items() if name != "pretrained"}
        libraries = {name: installed(name) for name in ("lmms-eval", "transformers", "torch")}
        content = [task, arguments, self.limit, self.rest, libraries, __version__]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def command(self, task: str) -> list[str]:
        """lmms-eval's own command line."""
        start = [sys.executable, "-m", "lmms_eval"]
        if self.processes > 1:
            start = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={self.processes}"]
            start += [f"--master_port={free_port()}", "-m", "lmms_eval"]
        arguments = ",".join(f"{name}={value}" for name, value in self.model_args.items())
        words = ["--model", MODEL, "--model_args", arguments, "--tasks", task]
        words += ["--batch_size", str(self.batch_size), "--output_path", str(self.output / task)]
        if self.on_cpu:
            words += ["--device", "cpu"]
        if self.limit is not None:
            words += ["--limit", str(self.limit)]
        if (folder := include_path(task, self.include)) is not None:
            words += ["--include_path", folder]
        return [*start, *words, *self.rest]


def run_tasks(evaluation: Evaluation, tasks: Sequence[str], console: Console) -> dict[str, TaskResult]:
    """Every task in a process of its own; a result for each, in order. A failed one has its cause in ``error``.

    Raises :class:`UsageError` while another process evaluates one of them in the same folder: it might take the
    results of the other for its own.
    """
    with contextlib.ExitStack() as locks:
        for task in tasks:
            locks.enter_context(RunLock(evaluation.output / task, argument="--output_path"))
        return _run_in_turn(evaluation, tasks, console)


def _run_in_turn(evaluation: Evaluation, tasks: Sequence[str], console: Console) -> dict[str, TaskResult]:
    results = {}
    for number, task in enumerate(tasks, 1):
        place = f"[{number}/{len(tasks)}] {task}"
        done = None if evaluation.force else _finished(evaluation, task)
        if done is not None:
            console.print(
                f"{place}: already completed with these weights and options: {done.headline()}", soft_wrap=True
            )
            results[task] = done
            continue
        console.print(f"{place}: log in {evaluation.output / task / LOG}", soft_wrap=True)
        mark = time.monotonic()
        results[task] = run_task(evaluation, task, console)
        failed = results[task].error is not None
        state, style = ("FAILED", "bold red") if failed else (results[task].headline(), None)
        console.print(f"{place}: {state} ({time.monotonic() - mark:.0f} s)", style=style, soft_wrap=True)
        if failed:
            plain_console(width=100, stderr=True).print(
                f"{place}: {results[task].error}", highlight=False, soft_wrap=True
            )
    return results


def _finished(evaluation: Evaluation, task: str) -> TaskResult | None:
    marker = evaluation.output / task / DONE
    if not marker.is_file():
        return None
    try:
        _, file, key = read_marker(marker)
        return read_task(file, task) if key == evaluation.key(task) else None
    except ValueError as error:
        logger.warning("%s: the task is run again", error)
        return None


def run_task(evaluation: Evaluation, task: str, console: Console) -> TaskResult:
    """Run lmms-eval once. Its exit status is 0 whatever happened: only a new results file that has the task counts."""
    folder = evaluation.output / task
    folder.mkdir(parents=True, exist_ok=True)
    (folder / DONE).unlink(missing_ok=True)
    before = set(folder.rglob("*_results.json"))
    # Some tasks read this variable and do not know its default.
    home = {"HF_HOME": os.environ.get("HF_HOME", str(Path.home() / ".cache" / "huggingface"))}
    # lmms-eval takes the commit of the current folder, whatever lies there, for its own version: every commit of the
    # user's would empty its cache.
    git = {"GIT_DIR": str(folder / "no.git")}
    environment = {**os.environ, **home, **git, **plugin_environment(), **evaluation.environment}
    status = _watch(evaluation.command(task), environment, folder / LOG, console)
    new = sorted(set(folder.rglob("*_results.json")) - before)
    log = (folder / LOG).read_text(encoding="utf-8", errors="replace")
    if not new:
        return TaskResult(task, {}, 0, f"{cause(log)} (exit status {status}, log: {folder / LOG})")
    result = read_task(new[-1], task)
    if not result.metrics:
        return TaskResult(task, {}, 0, f"{new[-1]} has no number for {task}; log: {folder / LOG}")
    content = {"key": evaluation.key(task), "results": str(new[-1].relative_to(folder)), "task": task}
    write_text(folder / DONE, json.dumps(content, indent=1))
    return result


def _watch(command: Sequence[str], environment: Mapping[str, str], log: Path, console: Console) -> int:
    """Run a command into its log; on a terminal its progress bar is shown."""
    with log.open("w", encoding="utf-8") as file:
        file.write(f"{' '.join(command)}\n")
        file.flush()
        shown = False
        with child(command, environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
            while chunk := os.read(process.stdout.fileno(), 1 << 16):
                text = chunk.decode("utf-8", errors="replace")
                file.write(text)
                file.flush()
                bars = [part for part in re.split(r"[\r\n]", text) if part.startswith(PROGRESS)]
                if bars and console.is_terminal:
                    print(f"\r  {bars[-1][: console.width - 3]}", end="", file=console.file, flush=True)
                    shown = True
            if shown:
                print(file=console.file)
            return process.wait()


def cause(log: str) -> str:
    """Why a run failed, from its log: the last exception, or what lmms-eval said, or the last line."""
    lines = [line.strip() for line in re.split(r"[\r\n]+", log) if line.strip()]
    # torchrun ends with a report of its own; each rank's exception stands before it.
    # A retry repeats the exception in front of it, without its message.
    outer = re.compile(r"\b(ChildFailedError|RetryError)\b")
    body = [re.sub(r"^\[rank\d+\]: +", "", line) for line in lines if not outer.search(line)]
    found = next((line for line in reversed(body) if ERROR_LINE.match(line)), None)
    if found is not None:
        start = len(body) - 1 - body[::-1].index(found)
        # A message of several lines, such as a list of tensors.
        if found.endswith("Error:"):
            return " ".join([found, *body[start + 1 : start + 2]])
        more = takewhile(lambda line: re.match(r"\d+ [a-z][^\x1b]*$", line), body[start + 1 : start + 5])
        return "; ".join([found, *more])
    reported = REPORTED.findall(log)
    return reported[-1] if reported else (lines[-1] if lines else "no output")
