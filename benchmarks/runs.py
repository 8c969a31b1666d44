"""What the benchmarks that start LLaVA in other processes share: paths, environment, versions, trainings, errors."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from llava_packing_tower.utils.supervise import child, raising_signals

BENCHMARKS = Path(__file__).resolve().parent
REPOSITORY = BENCHMARKS.parent
CONFIGS = REPOSITORY / "configs"
DISTRIBUTIONS = ("transformers", "accelerate", "deepspeed", "torch", "peft", "tokenizers", "huggingface_hub", "numpy")


STEP = re.compile(r"step +(\d+)/\d+  loss (\S+)")
"""A step in the progress of `llava-packing train`; ranks may have printed into the start of the line."""
LATE = 124
"""Exit status of a training that reached its limit, as timeout(1) has it."""
INTERVAL, GRACE, AFTERWARDS = 0.02, 10.0, 30.0
"""Seconds: between two looks at a log; from SIGTERM to SIGKILL; for which a process may outlive its launcher."""
_MARK = "BENCHMARK_TRAINING"


class CellFailed(Exception):
    """Why a cell is not a pass, in one line."""


def environment() -> dict[str, str]:
    """That of this process, with the package and the benchmarks importable, and nothing asked of the hub."""
    path = [str(REPOSITORY), str(BENCHMARKS), *filter(None, [os.environ.get("PYTHONPATH")])]
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONDONTWRITEBYTECODE": "1"}
    return {"OMP_NUM_THREADS": "1", **os.environ, **quiet, "PYTHONPATH": os.pathsep.join(path)}


def versions(python: str) -> tuple[dict[str, str], str]:
    """Versions of the libraries that an interpreter has, and the LLaVA that it finds."""
    script = (
        "import json, sys\nfrom llava_packing_tower.utils.versions import installed\n"
        "from llava_packing_tower.integrations.llava.registry import find_host\n"
        f"found = find_host()\nversions = {{n: installed(n) for n in {DISTRIBUTIONS!r}}}\n"
        "print(json.dumps([{'python': sys.version.split()[0], **versions}, f'{found.host.title} {found.version}']))"
    )
    shown = subprocess.run([python, "-c", script], capture_output=True, text=True, check=True, env=environment())
    return tuple(json.loads(shown.stdout.splitlines()[-1]))


def git(folder: str | Path, *words: str) -> str:
    """What git prints in a clone, without the end of the line."""
    return subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=True).stdout.strip()


def last_error(log: str) -> str:
    """The line that tells why a run ended, of at most 300 characters: its own last error before torchrun's about it."""
    errors = re.findall(r"^(?:\[rank\d+\]: *)?(\w[\w.]*(?:Error|Exception|Interrupt)\b.*)$", log, re.M)
    own = [error for error in errors if not error.startswith("torch.distributed.elastic")]
    return (own or log.strip().splitlines() or ["no output"])[-1][:300]


# ---------------------------------------------------------------- a training


@dataclass
class Training:
    """One start of `llava-packing train`.

    lines: what it printed, each with the seconds since the start; losses, times (seconds): by step; seconds: until its
    last process had ended; left: the processes that had to be killed after that.
    """

    mark: str = field(default_factory=lambda: uuid.uuid4().hex)
    began: float = field(default_factory=time.monotonic)
    lines: list[tuple[float, str]] = field(default_factory=list)
    losses: dict[int, float] = field(default_factory=dict)
    times: dict[int, float] = field(default_factory=dict)
    status: int | None = None
    seconds: float = 0.0
    left: list[str] = field(default_factory=list)

    @property
    def log(self) -> str:
        return "".join(line for _, line in self.lines)

    @property
    def clock(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.began

    def processes(self) -> dict[psutil.Process, dict[str, str]]:
        """The launcher and all that came from it and still runs, in whatever session, each with its environment."""
        found = {}
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):  # it has ended, or is another user's
                variables = process.environ()
                if variables.get(_MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found[process] = variables
        return found

    def rank(self, number: int) -> psutil.Process:
        """The process of a rank; its data loaders have its environment, too, and are its children."""
        found = {p.pid: p for p, variables in self.processes().items() if variables.get("RANK") == str(number)}
        (process,) = (process for process in found.values() if process.ppid() not in found)
        return process

    def kill(self) -> None:
        """SIGKILL to all of it, until all have ended, or for GRACE seconds."""
        until = time.monotonic() + GRACE
        while (running := self.processes()) and time.monotonic() < until:
            for process in running:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            time.sleep(INTERVAL)


def train_command(
    config: Path, changes: Mapping[str, object], processes: int, cpu: bool, python: str = sys.executable
) -> list[str]:
    """`llava-packing train` with changes to a configuration, on so many GPUs or CPU processes."""
    words = [word for key, value in changes.items() for word in (f"--{key}", str(value))]
    words += ["--num_processes" if cpu else "--num_gpus", str(processes)]
    return [python, "-m", "llava_packing_tower", "train", str(config), *words]


def train(
    command: list[str],
    limit: float,
    log: Path | None = None,
    at_step: Callable[[Training, int], None] | None = None,
) -> Training:
    """Run a training to its end, or for ``limit`` seconds; it leaves no process behind, and never hangs.

    log: where to keep what it prints. at_step: called with the training and each new step, once it is logged.
    """
    training, part, late = Training(), "", False
    with contextlib.ExitStack() as stack:
        if log is None:
            log = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="training_"))) / "log"
        log.parent.mkdir(parents=True, exist_ok=True)
        # A file, as a process that does not end would keep a pipe open.
        written = stack.enter_context(log.open("w"))
        printed = stack.enter_context(log.open(errors="replace"))
        stack.enter_context(raising_signals())
        stack.callback(training.kill)
        marked = {**environment(), _MARK: training.mark}
        process = stack.enter_context(child(command, marked, cwd=REPOSITORY, stdout=written, stderr=subprocess.STDOUT))
        while True:
            ended = process.poll() is not None
            for text in iter(printed.readline, ""):
                part += text
                if not part.endswith("\n"):
                    continue
                training.lines.append((training.clock, part))
                step, part = STEP.search(part), ""
                if step and int(step[1]) not in training.losses:
                    number = int(step[1])
                    training.losses[number], training.times[number] = float(step[2]), training.clock
                    if at_step:
                        at_step(training, number)
            if ended:
                break
            if training.clock > limit and not late:
                late = True
                process.terminate()
            elif training.clock > limit + GRACE:
                training.kill()
            time.sleep(INTERVAL)
        training.lines += [(training.clock, part)] * bool(part)
        until = time.monotonic() + AFTERWARDS
        while (left := training.processes()) and time.monotonic() < until:
            time.sleep(0.1)
        training.seconds = training.clock
        training.left = [f"{p.pid} (RANK {variables.get('RANK')})" for p, variables in left.items()]
    training.status = LATE if late else process.returncode
    return training
