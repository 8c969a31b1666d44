"""Four ranks, one of which dies, raises, or has no room: all of them end soon, and the reason is on the screen."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import host_runs
import pytest
from host_runs import needs_host
from test_supervise import ended, of_output

from llava_packing_tower.train import resume

REPOSITORY = Path(__file__).parents[2]
WITHIN = 30
"""Seconds from the fault to the end of the last process."""
# What goes wrong on rank 2 at its third batch; imported by every rank, see sitecustomize of Python's `site`.
FAULTS = {
    "dies": "os.kill(os.getpid(), 9)",
    "raises": "raise RuntimeError('the third batch of rank 2')",
    "stops": "os.kill(os.getpid(), 19)",  # hangs: the launcher is then told to stop
}
CUSTOM = """
import os, sys
if os.environ.get("RANK") == "2":
    import functools, importlib.abc, importlib.machinery
    def fault():
        {fault}
    def wrap(trainer):
        step, count = trainer.Trainer.training_step, [0]
        @functools.wraps(step)
        def training_step(self, *args, **kwargs):
            count[0] += 1
            if count[0] == 3:
                fault()
            return step(self, *args, **kwargs)
        trainer.Trainer.training_step = training_step
    class Finder(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path, target=None):
            if name != "transformers.trainer":
                return None
            sys.meta_path.remove(self)
            spec = importlib.machinery.PathFinder.find_spec(name, path)
            run = spec.loader.exec_module
            spec.loader.exec_module = lambda module: (run(module), wrap(module))
            return spec
    sys.meta_path.insert(0, Finder())
"""
pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]


@needs_host
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("stage", [2, 3])
def test_all_ranks_end_with_one(trainings, tmp_path, fault, stage):
    (tmp_path / "sitecustomize.py").write_text(CUSTOM.format(fault=FAULTS[fault]))
    output = tmp_path / "llava_llama_fault"
    words = ["--deepspeed", f"configs/zero{stage}.json", "--max_steps", "6"]
    words += ["--save_strategy", "steps", "--save_steps", "2"]
    command = host_runs.train_command(trainings.config, output, *words, processes=4)
    environment = host_runs.environment(host_runs.NEXT)
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), str(REPOSITORY)])
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment, cwd=REPOSITORY, stdout=log, stderr=log)
        family: set[int] = set()
        until = time.monotonic() + 300
        while process.poll() is None and "2/6" not in (tmp_path / "log").read_text():
            assert time.monotonic() < until, (tmp_path / "log").read_text()
            time.sleep(0.2)
        family |= set(of_output(output))
        began = time.monotonic()
        if fault == "stops":  # nobody can tell that from a slow rank
            time.sleep(3)
            process.send_signal(signal.SIGTERM)
        status = process.wait(timeout=WITHIN + 60)
        assert ended(sorted(family), within=max(0.1, began + WITHIN - time.monotonic())) == []
    said = (tmp_path / "log").read_text()
    assert status != 0 and time.monotonic() - began < WITHIN, said[-3000:]
    if fault == "raises":
        assert "the third batch of rank 2" in said
    if fault != "stops":
        assert re.search(r"rank +: 2 ", said), said[-3000:]
    assert resume.last_complete(output) is None or resume.read_saved(resume.last_complete(output)).step == 2
