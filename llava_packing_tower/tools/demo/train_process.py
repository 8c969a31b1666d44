"""Run the project's own launcher as a user would, and show how far the training is."""

from __future__ import annotations

import math
import os
import re
import subprocess
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ...utils.supervise import child

# What the launcher prints: "step  7/60  loss 3.0241  lr 1.9e-03  0:24 left" and
# "engine: DeepSpeedEngine, ZeRO stage 2, world size 2, backend gloo".
_STEP = re.compile(r"^step +(\d+)/(\d+)  loss (\S+)")
_ENGINE = re.compile(r"^engine: (\w+)(?:, ZeRO stage (\d+))?, world size (\d+)")
_OF_A_RANK = re.compile(r"^\[rank\d+\]: ")
TAIL = 30
"""Lines of the log that are shown when the training fails."""


class Engine(NamedTuple):
    """What wrapped the model, as the training processes saw it. ``zero_stage`` is None without DeepSpeed."""

    name: str
    zero_stage: int | None
    world_size: int

    def __str__(self) -> str:
        stage = "no ZeRO" if self.zero_stage is None else f"ZeRO stage {self.zero_stage}"
        return f"{self.name}, {stage}, {self.world_size} process{'' if self.world_size == 1 else 'es'}"


class Trained(NamedTuple):
    """What a training run printed: (step, loss) for every step, and its engine (None: it named none)."""

    history: list[tuple[int, float]]
    engine: Engine | None


def read_step(line: str) -> tuple[int, float] | None:
    """(step, loss) of a progress line of the launcher, None for any other line."""
    found = _STEP.match(line)
    return (int(found[1]), float(found[3])) if found else None


def read_engine(line: str) -> Engine | None:
    """The engine of the launcher's engine line, None for any other line."""
    found = _ENGINE.match(line)
    return Engine(found[1], int(found[2]) if found[2] else None, int(found[3])) if found else None


class StepReport:
    """Steps done, loss and time left: a bar on a terminal, one line every tenth part of the training elsewhere."""

    def __init__(self, console: Console, steps: int) -> None:
        self.console, self.steps, self.done = console, steps, 0
        self._started: float | None = None
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps, {task.fields[loss]}"),
            TimeElapsedColumn(),
            TextColumn("elapsed,"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("starting", total=steps, loss="loading the models")

    def __enter__(self) -> StepReport:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def step(self, done: int, loss: float) -> None:
        self.done = done
        now = time.monotonic()
        self._started = self._started or now
        self._bar.update(self._task, description="training", completed=self.done, loss=f"loss {loss:.3f}")
        if not self.console.is_terminal and (self.done % max(1, self.steps // 10) == 0 or self.done == self.steps):
            # The first step is where the clock starts, so it does not count.
            pace = (now - self._started) / (self.done - 1) if self.done > 1 else math.nan
            left = f", {pace * (self.steps - self.done):.0f} s left" if self.done > 1 else ""
            self.console.print(f"  step {self.done} of {self.steps}, loss {loss:.3f}{left}")


class TrainingFailed(Exception):
    """The launcher ended with an error; the message holds the end of its log."""


def launch(command: Sequence[str], steps: int, log: Path, console: Console) -> Trained:
    """Run a `llava-packing train ...` command that makes `steps` steps and logs each; its output goes into `log`.

    Raises ``TrainingFailed`` if it exits with an error, or without having reported every step.
    """
    tail: deque[str] = deque(maxlen=TAIL)
    # What a rank died of; after it comes a page of torchrun's own.
    cause: deque[str] = deque(maxlen=TAIL)
    history: list[tuple[int, float]] = []
    engine: Engine | None = None
    log.parent.mkdir(parents=True, exist_ok=True)
    with (
        log.open("w", encoding="utf-8") as file,
        StepReport(console, steps) as report,
        child(
            command,
            os.environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
        ) as process,
    ):
        for line in process.stdout:
            file.write(line)
            file.flush()
            (cause if _OF_A_RANK.match(line) else tail).append(line)
            engine = read_engine(line) or engine
            step = read_step(line)
            if step is not None:
                history.append(step)
                report.step(*step)
        process.wait()
    if process.returncode:
        shown = "".join(cause or tail)
        raise TrainingFailed(f"training failed with exit status {process.returncode}; log: {log}\n{shown}")
    if [step for step, _ in history] != list(range(1, steps + 1)):
        raise TrainingFailed(f"{steps} steps were requested, {len(history)} were reported; log: {log}")
    return Trained(history, engine)
