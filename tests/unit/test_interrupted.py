"""Commands that are stopped, killed, started twice or out of room: one line, no child and no file that stays."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conversions import standard_folder
from fuzz_readers import prepare
from launch_files import need_a_host
from signals import default_signals

from llava_packing_tower.cli import main as cli
from llava_packing_tower.cli.main import main
from llava_packing_tower.utils.files import atomic_folder
from llava_packing_tower.utils.scratch import MARK, scratch_beside
from llava_packing_tower.utils.supervise import Stopped, child, identity, raising_signals

REPOSITORY = Path(__file__).parents[2]
# A conversion that stops in the middle of writing until it is told to go on.
SLOW = """
import sys, time
from llava_packing_tower.convert import plan
from llava_packing_tower.cli.main import main
tensor = plan.Conversion.tensor
def slow(self, name):
    print("writing", flush=True)
    time.sleep(60)
    return tensor(self, name)
plan.Conversion.tensor = slow
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def standard(tmp_path_factory):
    return standard_folder(tmp_path_factory.mktemp("source") / "standard", num_hidden_layers=2)


def start(source, output):
    words = [sys.executable, "-c", SLOW, "convert", str(source), "--output_dir", str(output), "--no-verify"]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "preexec_fn": default_signals}
    process = subprocess.Popen(words, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, **options)
    while "writing" not in (line := process.stdout.readline()):
        assert line, process.stderr.read()
    return process


def convert(source, output):
    return main(["convert", str(source), "--output_dir", str(output), "--no-verify"])


@pytest.mark.parametrize(
    "name", ["SIGTERM", pytest.param("SIGINT", marks=pytest.mark.long), pytest.param("SIGHUP", marks=pytest.mark.long)]
)
def test_a_stopped_conversion_says_so_in_one_line_and_leaves_nothing(standard, tmp_path, name):
    process = start(standard, tmp_path / "out")
    process.send_signal(getattr(signal, name))
    _, said = process.communicate(timeout=100)
    assert said == f"llava-packing convert: stopped by {name}\n"
    assert process.returncode == 128 + getattr(signal, name)
    assert list(tmp_path.iterdir()) == []


@contextlib.contextmanager
def not_ignored():
    """The signals as a shell starts a program with them: one that runs it in the background ignores SIGINT."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_signal_that_was_lost_can_be_sent_again_and_none_interrupts_the_cleaning_up():
    steps = []

    def clean(step):
        signal.raise_signal(signal.SIGTERM)
        steps.append(step)

    @contextlib.contextmanager
    def cleaned():
        try:
            yield
        finally:
            clean("with")

    with pytest.raises(Stopped) as caught, not_ignored(), raising_signals():
        try:
            signal.raise_signal(signal.SIGINT)
        except BaseException:  # as an `except:` of a library that is being imported
            steps.append("lost")
        try:
            with cleaned():
                signal.raise_signal(signal.SIGTERM)
        except Stopped:
            clean("except")
            raise
        finally:
            clean("finally")
    assert steps == ["lost", "with", "except", "finally"] and caught.value.status == 128 + signal.SIGTERM


def test_what_a_killed_conversion_left_goes_with_the_next_one(standard, tmp_path, capsys):
    process = start(standard, tmp_path / "out")
    assert convert(standard, tmp_path / "out") == 2  # while the first is at work: at once
    assert f"another process is writing {tmp_path / 'out'}" in capsys.readouterr().err
    process.kill()
    process.communicate()
    assert len(left := list(tmp_path.iterdir())) == 1 and (left[0] / MARK).is_file()
    assert convert(standard, tmp_path / "out") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not list((tmp_path / "out").glob(".*"))


def test_only_folders_of_ours_are_removed(tmp_path):
    for name in (".out.mine", ".out.other", ".outer.x"):
        (tmp_path / name).mkdir()
    (tmp_path / ".out.other" / MARK).touch()
    with scratch_beside(tmp_path / "out"):
        assert {p.name for p in tmp_path.iterdir()} > {".out.mine", ".outer.x"}
        assert not (tmp_path / ".out.other").exists()
        with scratch_beside(tmp_path / "out"):  # a folder that is in use stays
            pass
        assert len(list(tmp_path.glob(f".out.*/{MARK}"))) == 1
        with pytest.raises(BlockingIOError, match="another process is writing"), scratch_beside(tmp_path / "out", True):
            pass
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "out") as aside:
        (aside / "x").touch()
        raise RuntimeError
    assert {p.name for p in tmp_path.iterdir()} == {".out.mine", ".outer.x"}


def test_a_full_disk_is_called_that(standard, tmp_path, capsys, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device", "model.safetensors")

    monkeypatch.setattr("llava_packing_tower.convert.pipeline.write_conversion", full)
    assert convert(standard, tmp_path / "out") == 1
    assert "out was not written: the disk is full (" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(cli, "_run", full)
    assert main(["eval"]) == 1
    assert capsys.readouterr().err.startswith("llava-packing eval: the disk is full: [Errno 28]")


# ---------------------------------------------------------------- processes of a command

FAMILY = """
import subprocess, sys
open(sys.argv[1], "w").write(str(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]).pid))
"""


def ended(pid):
    until = time.monotonic() + 30
    while time.monotonic() < until:
        try:
            identity(pid)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def test_what_a_child_leaves_behind_ends_with_it(tmp_path):
    with child([sys.executable, "-c", FAMILY, str(tmp_path / "pid")], os.environ) as process:
        assert process.wait() == 0
        pid = int((tmp_path / "pid").read_text())
        assert identity(pid)
    assert ended(pid)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGKILL"])
def test_a_stopped_command_takes_its_processes_along(tmp_path, name):
    """As `eval` and `demo` start theirs; lmms-eval's own ranks look for the launcher (`watch_launcher`)."""
    program = (
        "import os, sys\n"
        "from llava_packing_tower.cli import main\n"
        "from llava_packing_tower.utils.supervise import child\n"
        "def run(name, words):\n"
        "    with child([sys.executable, '-c', 'import os, sys, time; open(sys.argv[1], \"w\").write(str(os.getpid()));"
        " time.sleep(60)', sys.argv[1]], os.environ) as process:\n"
        "        process.wait()\n"
        "main._run = run\n"
        "sys.exit(main.main(['eval']))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    words = [sys.executable, "-c", program, str(tmp_path / "pid")]
    options = {"stderr": subprocess.PIPE, "text": True, "preexec_fn": default_signals}
    process = subprocess.Popen(words, env=environment, **options)
    while not (tmp_path / "pid").is_file() or not (pid := (tmp_path / "pid").read_text()):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(getattr(signal, name))
    _, said = process.communicate(timeout=100)
    assert ended(int(pid))
    if name == "SIGKILL":
        assert process.returncode == -9
    else:
        assert said == f"llava-packing eval: stopped by {name}\n" and process.returncode == 128 + getattr(signal, name)


def test_json_for_programs(standard, tmp_path, files, capsys):
    """`align`, `bench`, `doctor`, `probe` and `show` have tests of their own."""
    written = tmp_path / "answer.json"
    words = ["--output_dir", str(tmp_path / "made"), "--no-verify", "--json", str(written)]
    assert main(["convert", str(standard), *words]) == 0
    answer = json.loads(written.read_text())
    assert answer["output"] == str(tmp_path / "made") and answer["passed"] and answer["dtype"] == "float32"
    prepare("results", tmp_path / "results")
    assert main(["eval-report", str(tmp_path / "results"), "--json", str(written)]) == 0
    assert json.loads(written.read_text())["results"]["smoke"]["metrics"] == {"exact_match": [0.9, 0.01]}
    need_a_host()
    capsys.readouterr()
    words = ["train", str(files()), "--num_processes", "2", "--json", str(written)]
    assert main([*words, "--dry_run"]) == 0
    answer = json.loads(written.read_text())
    assert answer["zero_stage"] == 2 and answer["processes"] == 2 and answer["values"]["learning_rate"] == 1e-4
    assert answer["files"] == [] and "warning" in answer
    assert main([*words, "--dry_run", "--check_images"]) == 0
    assert [line.split(" (")[0] for line in json.loads(written.read_text())["files"]] == ["every file can be read"]
    assert main(words) == 2 and "--json has the plan of --dry_run" in capsys.readouterr().err


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_each_help_has_an_example(name, capsys):
    with pytest.raises(SystemExit) as ended_with:
        main([name, "--help"])
    text = capsys.readouterr().out
    assert ended_with.value.code == 0 and f"  llava-packing {name} " in f"{text} ".replace("\n", " \n")


UNREAD = """
import sys, time
from llava_packing_tower.cli import main as cli
def run(*words):
    time.sleep(0.3)
    print("a line\\n" * int(sys.argv[1]))
    return 0
cli._run = run
sys.exit(cli.main(["doctor"]))
"""


@pytest.mark.parametrize("lines", [1, 100_000])
def test_output_that_nobody_reads_ends_the_command_in_silence(lines):
    """As with `| head -1`: no traceback, whether the pipe breaks while it writes or when it flushes at its end."""
    words, pipes = [sys.executable, "-c", UNREAD, str(lines)], dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process = subprocess.Popen(words, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, text=True, **pipes)
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait(timeout=30) == 128 + signal.SIGPIPE


def test_a_pipe_of_another_kind_is_an_error(monkeypatch):
    def broken(*args):
        raise BrokenPipeError("of a child")

    monkeypatch.setattr(cli, "_run", broken)
    with pytest.raises(BrokenPipeError, match="of a child"):
        main(["doctor"])
