"""kill -9 and SIGTERM at random moments, again and again: nothing corrupt, no process after 10 s, no file after the
next run. `make test-long` does it KILLS times for each command and signal; docs/host_runs.md has what came of it."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import host_runs
import psutil
import pytest
from conversions import same_bits, standard_folder
from host_runs import needs_host
from test_supervise import ended, of_output

from llava_packing_tower.eval.results import read_run
from llava_packing_tower.train import resume

REPOSITORY = Path(__file__).parents[2]
KILLS = int(os.environ.get("KILLS", "50"))
pytestmark = [pytest.mark.long, pytest.mark.timeout(24 * 3600)]


def descendants(pid):
    """The children of a process, and theirs."""
    try:
        return [child.pid for child in psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def length_of(command, environment):
    """Seconds that a command takes when nothing disturbs it."""
    began = time.monotonic()
    subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, timeout=600)
    return time.monotonic() - began


def kill_again_and_again(command, output, environment, longest, number, check=lambda: None, at_work=""):
    """Start the command, kill it within ``longest`` seconds, and look at what is left. Returns how many were killed at
    work."""
    rng, killed, begun = random.Random(f"{command}{number}"), 0, 0
    for _ in range(KILLS):
        log = output.parent / "kill.log"
        with log.open("w") as file:
            process = subprocess.Popen(
                command, env=environment, cwd=REPOSITORY, stdout=file, stderr=file, stdin=subprocess.DEVNULL
            )
        until = time.monotonic() + rng.uniform(0, longest)
        while process.poll() is None and time.monotonic() < until:
            time.sleep(0.02)
        family = {process.pid, *descendants(process.pid), *of_output(output)}
        killed += process.poll() is None
        process.send_signal(number)
        process.wait(timeout=30)
        assert ended(family, within=10) == [] and of_output(output) == [], log.read_text()
        if number == signal.SIGTERM and process.returncode == 128 + number:
            assert "Traceback" not in log.read_text(), log.read_text()
        begun += bool(at_work and at_work in log.read_text())
        check()
    print(f"{KILLS} times {number.name}: {killed} killed, {begun} of all after {at_work!r}")
    return killed


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_convert(tmp_path, number):
    source = standard_folder(tmp_path / "standard", hidden_size=256, intermediate_size=1024, num_hidden_layers=8)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    words = [sys.executable, "-m", "llava_packing_tower", "convert", str(source), "--no-verify", "--output_dir"]
    assert subprocess.run([*words, str(tmp_path / "whole")], env=environment, capture_output=True).returncode == 0
    output = tmp_path / "work" / "out"
    output.parent.mkdir()

    def check():
        if output.exists():
            same_bits(output, tmp_path / "whole")
            subprocess.run(["rm", "-r", output], check=True)

    longest = length_of([*words, str(output)], environment)
    check()
    killed = kill_again_and_again([*words, str(output)], output, environment, longest, number, check)
    assert killed > KILLS // 5
    done = subprocess.run([*words, str(output)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    same_bits(output, tmp_path / "whole")
    assert {path.name for path in output.parent.iterdir()} == {"out", "kill.log"}


@needs_host
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_train(trainings, tmp_path, number):
    output = tmp_path / "llava_llama_killed"
    words = [
        "--deepspeed",
        "configs/zero2.json",
        "--max_steps",
        "100000",
        "--save_strategy",
        "steps",
        "--save_steps",
        "5",
    ]
    command = host_runs.train_command(trainings.config, output, *words, "--save_total_limit", "2")
    environment = host_runs.environment(host_runs.NEXT)

    def check():
        last = resume.last_complete(output) if output.exists() else None
        assert last is None or resume.read_saved(last).processes == 2

    kill_again_and_again(command, output, environment, 60, number, check, at_work="/100000")
    before = resume.last_complete(output)
    command = host_runs.train_command(
        trainings.config, output, *words, "--max_steps", str(resume.read_saved(before).step + 2 if before else 2)
    )
    done = host_runs.execute(command, environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert not [path for path in output.rglob(".*") if path.is_file()] and not of_output(output)


@needs_host
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_eval(demo, tmp_path, number):
    environment = host_runs.environment(host_runs.NEXT)
    command = [sys.executable, "-m", "llava_packing_tower", "eval", str(demo.trained), "--tasks", "smoke"]
    command += ["--num_processes", "1", "--output_path", str(tmp_path / "scores")]
    forced = [*command, "--force"]  # else what one run has completed, the next ones do not repeat
    longest = length_of(forced, environment)
    killed = kill_again_and_again(forced, tmp_path / "scores", environment, longest, number, at_work="smoke: log in")
    assert killed > KILLS // 2
    done = subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert read_run(tmp_path / "scores")["smoke"].samples > 0
    assert not [path for path in (tmp_path / "scores").rglob(".*") if path.is_file()]


@needs_host
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_demo(tmp_path, number):
    environment = host_runs.environment(host_runs.NEXT)
    output = tmp_path / "demo"
    command = [sys.executable, "-m", "llava_packing_tower", "demo", "--output", str(output)]
    short = [*command, "--max_steps", "4"]  # as many kills before and after the training as in it
    killed = kill_again_and_again(short, output, environment, length_of(short, environment), number, at_work="[4/6]")
    assert killed > KILLS // 2
    done = subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert {path.name for path in tmp_path.iterdir()} == {"demo", "kill.log"} and not of_output(output)
    assert {path.name for path in output.rglob(".*") if path.is_file()} == {".llava_packing_demo"}
