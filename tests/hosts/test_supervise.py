"""A launcher and its processes end together, whatever ends the launcher; and one run at a time writes into a folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import host_runs
import pytest
from host_runs import needs_host
from signals import default_signals

from llava_packing_tower.utils import run_lock
from llava_packing_tower.utils.errors import UsageError
from llava_packing_tower.utils.run_lock import RunLock
from llava_packing_tower.utils.supervise import LAUNCHER_ENV, identity, is_alive, supervise, watch_launcher

REPOSITORY = Path(__file__).parents[2]
# An agent in between that knows nothing of the launcher and ignores SIGTERM, and two ranks in sessions of their own, as
# torchrun has them; each rank has a child, as data loaders are. Each writes its pid and lives for a minute.
RANK = """
import os, subprocess, sys, time
from llava_packing_tower.utils.supervise import watch_launcher
assert watch_launcher() is not None
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open(sys.argv[1], "w").write(f"{os.getpid()} {child.pid} ")
time.sleep(60)
"""
AGENT = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
folder, rank = sys.argv[1:]
for n in range(3):
    subprocess.Popen([sys.executable, "-c", rank, f"{folder}/{n}"], start_new_session=n > 0)
open(f"{folder}/agent", "w").write(f"{os.getpid()} ")
time.sleep(60)
"""
LAUNCHER = """
import os, sys
from llava_packing_tower.utils.supervise import supervise
sys.exit(supervise([sys.executable, "-c", *sys.argv[1:]], os.environ))
"""


def started(folder: Path, before: list[str] = ()) -> tuple[subprocess.Popen, list[int]]:
    """A launcher, and the pids of all its processes once they run."""
    command = [*before, sys.executable, "-c", LAUNCHER, AGENT, str(folder), RANK]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    launcher = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=default_signals,
    )
    until = time.monotonic() + 100
    while time.monotonic() < until:
        pids = [int(pid) for file in folder.iterdir() for pid in file.read_text().split()]
        if len(pids) == 7:
            return launcher, pids
        assert launcher.poll() is None, launcher.stdout.read()
        time.sleep(0.05)
    raise AssertionError("the processes did not start")


def alive(pids: list[int]) -> list[int]:
    found = []
    for pid in pids:
        try:
            identity(pid)
            found.append(pid)
        except ProcessLookupError:
            pass
    return found


def ended(pids: list[int], within: float) -> list[int]:
    """The processes that still run after that many seconds."""
    until = time.monotonic() + within
    while alive(pids) and time.monotonic() < until:
        time.sleep(0.05)
    return alive(pids)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT", "SIGKILL"])
def test_all_processes_end_with_the_launcher(tmp_path, name):
    launcher, pids = started(tmp_path)
    assert len(alive(pids)) == 7
    launcher.send_signal(getattr(signal, name))
    assert ended(pids, within=30) == []
    status = launcher.wait(timeout=30)
    said = launcher.stdout.read()
    if name == "SIGKILL":
        assert status == -9
    else:
        assert status == 128 + getattr(signal, name) and f"{name}: the training was stopped" in said
        assert "Traceback" not in said


def test_a_rank_ends_although_nobody_reads_what_it_says():
    """As those of the demo, which reads the output of its training: both are gone after kill -9."""
    launcher = subprocess.Popen(["sleep", "60"])
    program = "import sys, time; from llava_packing_tower.utils.supervise import watch_launcher\n"
    program += "watch_launcher(); print('ready', flush=True); time.sleep(60)"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), LAUNCHER_ENV: identity(launcher.pid)}
    rank = subprocess.Popen(
        [sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, start_new_session=True
    )
    assert rank.stdout.readline() == b"ready\n"
    rank.stdout.close()
    launcher.kill()
    launcher.wait()
    assert rank.wait(timeout=10) == -signal.SIGKILL


def test_a_signal_that_is_ignored_stays_ignored(tmp_path):
    launcher, pids = started(tmp_path, ["nohup"])
    launcher.send_signal(signal.SIGHUP)
    time.sleep(1.0)
    assert len(alive(pids)) == 7 and launcher.poll() is None
    launcher.terminate()
    assert ended(pids, within=30) == []


def test_status_of_the_command_and_of_a_signal():
    assert supervise([sys.executable, "-c", "import sys; sys.exit(7)"], os.environ) == 7
    assert supervise([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], os.environ) == 137


def test_a_process_is_more_than_its_number(tmp_path):
    own = identity()
    assert is_alive(own) and not is_alive(own + "0")  # the same pid, started at another time
    assert watch_launcher({}) is None and watch_launcher({"LLAVA_PACKING_LAUNCHER": "elsewhere:1:2"}) is None


# ---------------------------------------------------------------- the lock


def test_a_second_run_is_refused_until_the_last_process_of_the_first_has_ended(tmp_path):
    lock = RunLock(tmp_path / "out")
    with pytest.raises(UsageError, match=rf"another run writes into .*out: process {os.getpid()} on "):
        RunLock(tmp_path / "out")
    rank = run_lock.hold(lock.path)
    lock.release()
    with pytest.raises(UsageError, match="another run writes"):
        RunLock(tmp_path / "out")
    os.close(rank)
    RunLock(tmp_path / "out").release()
    assert list((tmp_path / "out").iterdir()) == []


def test_the_lock_of_a_dead_run_is_no_obstacle(tmp_path):
    code = "import os; from llava_packing_tower.utils.run_lock import RunLock; "
    code += f"RunLock({str(tmp_path)!r}); os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY).returncode == -9
    assert (tmp_path / run_lock.LOCK).is_file()
    RunLock(tmp_path).release()


def test_launchers_of_one_run_share_the_lock(tmp_path):
    first = RunLock(tmp_path, "node0:29500")
    second = RunLock(tmp_path, "node0:29500")
    for other in ("node0:29501", None):
        with pytest.raises(UsageError, match="another run"):
            RunLock(tmp_path, other)
    first.release()
    with pytest.raises(UsageError, match="another run"):
        RunLock(tmp_path)
    second.release()
    RunLock(tmp_path).release()


# ---------------------------------------------------------------- a real training


@needs_host
@pytest.mark.newest_long
@pytest.mark.timeout(900)
def test_a_killed_launcher_takes_a_training_with_it(trainings, tmp_path):
    """kill -9 in the middle of a training with workers: everything ends, a second start is refused until then."""
    output = tmp_path / "llava_llama_killed"
    words = ["--deepspeed", "configs/zero2.json", "--max_steps", "1000", "--dataloader_num_workers", "2"]
    command = host_runs.train_command(trainings.config, output, *words)
    environment = host_runs.environment(host_runs.NEXT)
    log = (tmp_path / "log").open("w+")
    process = subprocess.Popen(
        command, env=environment, cwd=REPOSITORY, stdout=log, stderr=log, stdin=subprocess.DEVNULL, text=True
    )
    try:
        until = time.monotonic() + 200
        while " 2/1000" not in (said := (tmp_path / "log").read_text()):
            assert process.poll() is None and time.monotonic() < until, said
            time.sleep(0.2)
    except BaseException:
        process.kill()
        raise
    refused = host_runs.execute(command, environment)
    assert refused.returncode == 2 and f"process {process.pid} on" in refused.stderr
    family = of_output(output)
    assert len(family) >= 4, family  # launcher, torchrun, two ranks; workers come and go with the epochs
    process.kill()
    killed = time.monotonic()
    assert ended(family, within=10) == []
    while True:  # the last threads of a killed process take a moment to let go of its files
        try:
            RunLock(output).release()
            break
        except UsageError:
            assert time.monotonic() - killed < 10, subprocess.run(["fuser", "-v", output / run_lock.LOCK])
            time.sleep(0.1)


def of_output(output: Path) -> list[int]:
    """The processes that have the folder on their command line."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and str(output).encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:  # it has just ended
            continue
    return found
