"""What the commands have in common: names of files as they are typed, who may write where, and how a command ends."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from safetensors import SafetensorError

from llava_packing_tower import __version__
from llava_packing_tower import run as hooked
from llava_packing_tower.checkpoint import weights
from llava_packing_tower.checkpoint.hashing import folder_fingerprint
from llava_packing_tower.cli import main as cli
from llava_packing_tower.cli.main import main
from llava_packing_tower.convert.pipeline import failed_name
from llava_packing_tower.eval import runner
from llava_packing_tower.eval.probe import read_folder
from llava_packing_tower.eval.results import TaskResult
from llava_packing_tower.tools.demo import pipeline
from llava_packing_tower.utils import errors, scratch
from llava_packing_tower.utils.console import plain_console
from llava_packing_tower.utils.errors import UsageError
from llava_packing_tower.utils.files import atomic_folder, check_free, write_text
from llava_packing_tower.utils.progress import counted, growing
from llava_packing_tower.utils.run_lock import LOCK, RunLock


def test_the_version(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0 and capsys.readouterr().out == f"llava-packing {__version__}\n"


NOWHERE = {
    "align": ["--ckpt", "./nowhere"],
    "train": ["nowhere.yaml"],
    "convert": ["./nowhere"],
    "verify": ["./nowhere", "./nowhere_packing"],
    "doctor": ["nowhere"],
    "demo": ["--config", "nowhere.yaml"],
    "eval": ["./nowhere", "--tasks", "smoke"],
    "eval-report": ["nowhere"],
    "probe": ["./nowhere", "--data", "nowhere"],
    "export": ["nowhere", "--output_dir", "out"],
    "import": ["nowhere", "--output_dir", "out"],
    "show": ["nowhere.png", "--tower", "./nowhere"],
    "run": ["--", "nowhere.py"],
    "bench": ["--family", "nowhere"],
}


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_errors_go_to_standard_error(name, tmp_path, monkeypatch, capfd):
    """Standard output is for results: whoever redirects it still sees why there are none."""
    monkeypatch.chdir(tmp_path)
    try:
        status = main([name, *NOWHERE[name]])
    except SystemExit as ended:  # argparse's own
        status = ended.code
    written, said = capfd.readouterr()
    assert (status, written) == (2, "") and "nowhere" in said and "Traceback" not in said
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "/a/config.json"), 2, "/a/config.json: Permission denied"),
        (OSError(errno.EFBIG, "File too large", "m.bin"), 1, "File too large: 'm.bin'"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), 1, "the disk is full: "),
        (SafetensorError("I/O error: File too large (os error 27)"), 1, "File too large (os error 27)"),
        (MemoryError("Unable to allocate 745. GiB"), 1, "the memory of this machine does not suffice: Unable to"),
        (RuntimeError("[at x.cc] . PytorchStreamWriter failed writing file data/0\nframes"), 1, "the disk is full, or"),
    ],
)
def test_what_a_machine_refuses_is_one_line(error, status, said, monkeypatch, capsys):
    """Whoever writes: safetensors and torch have errors of their own."""

    def refuse(*_):
        raise error

    monkeypatch.setattr(cli, "_run", refuse)
    assert main(["export"]) == status
    assert said in (text := capsys.readouterr().err) and text.count("\n") == 1


def test_other_errors_keep_their_traceback(monkeypatch):
    assert errors.what_the_disk_says(SafetensorError("header too small")) is None

    def fail(*_):
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "x")

    monkeypatch.setattr(cli, "_run", fail)
    with pytest.raises(FileNotFoundError):
        main(["export"])


def test_a_tilde_is_the_home_for_reading_and_for_writing(tmp_path, monkeypatch, capsys):
    from fuzz_readers import prepare

    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    prepare("results", tmp_path / "home" / "results")
    assert main(["eval-report", "~/results", "--json=~/answer.json"]) == 0
    assert {p.name for p in (tmp_path / "home").iterdir()} == {"results", "answer.json"}
    assert [p.name for p in tmp_path.iterdir()] == ["home"]  # and no folder that is called ~


def test_links_in_a_circle(tmp_path, capsys):
    (tmp_path / "link").symlink_to(tmp_path / "link")
    assert main(["eval-report", str(tmp_path / "link")]) == 2
    assert capsys.readouterr().err == f"llava-packing eval-report: {tmp_path / 'link'} is not a folder\n"


@pytest.mark.parametrize("words", [[], ["-x"], ["none.py"], ["-m", "train_dpo"]])
def test_run_refuses_with_status_2(words, capsys, monkeypatch):
    monkeypatch.setattr(hooked, "refused", lambda target: "not with this" if target == "train_dpo" else None)
    with pytest.raises(SystemExit) as ended:
        hooked.main(words)
    assert ended.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_an_interpreter_that_is_none(tmp_path, capsys):
    (tmp_path / "a.py").write_text("")
    assert main(["run", "--", str(tmp_path / "python"), str(tmp_path / "a.py")]) == 2
    assert capsys.readouterr().err == f"llava-packing run: {tmp_path / 'python'}: No such file or directory\n"


def test_names_are_printed_as_they_are(capsys):
    """Rich takes ``[red]`` for a color and ``:car:`` for a picture."""
    name = "photos[red]/:car:/[/]"
    plain_console(width=60).print(name)
    assert capsys.readouterr().out == f"{name}\n"
    failed = TaskResult("a", {}, 0, "no [bold]")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "run_task", lambda *_: failed)
        patch.setattr(runner, "RunLock", lambda *_, **__: RunLock.__new__(_Free))
        runner.run_tasks(runner.Evaluation({}, Path("out[red]")), ["a"], plain_console(width=60))
    written = "[1/1] a: log in out[red]/a/log.txt\n[1/1] a: FAILED (0 s)\n"
    assert capsys.readouterr() == (written, "[1/1] a: no [bold]\n")


class _Free(RunLock):
    def release(self):
        pass


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("LLAVA_PACKING_FUSED", "x", "must be 0 or 1, got 'x'"),
        ("LLAVA_PACKING_COMPILE", "x", "LLAVA_PACKING_FUSED must be 0 or 1, got 'x'"),
        ("LLAVA_PACKING_CUDA_GRAPHS", "yes", "must be 0 or 1, got 'yes'"),
        ("LLAVA_PACKING_ENCODER_TOKENS", "-5", "must be a whole number of patches, at least 1, got '-5'"),
        ("LLAVA_PACKING_ENCODER_TOKENS", "1e4", "must be a whole number of patches"),
        ("LLAVA_PACKING_PEAK_TFLOPS", "inf", "must be a number above 0, got 'inf'"),
        ("LLAVA_PACKING_PEAK_TFLOPS", "many", "must be a number above 0, got 'many'"),
        ("LLAVA_PACKING_ATTENTION", "foo", "must be auto or one of flash_attention_2, "),
        ("LLAVA_PACKING_DISABLE_PATCHES", "nope", "names 'nope', which is not a compat patch"),
    ],
)
def test_variables_that_mean_nothing_are_refused_by_every_command(name, value, said, monkeypatch, capsys):
    """Before the work: `train --dry_run` was content with what each of its ranks would have failed on."""
    monkeypatch.setenv(name, value)
    assert main(["eval-report", "nowhere"]) == 2
    assert said in (text := capsys.readouterr().err) and text.count("\n") == 1 and "LLAVA_PACKING_" in text


def test_good_variables_and_those_that_nobody_reads(monkeypatch, capsys):
    for name, value in {
        "FUSED": "0",
        "CUDA_GRAPHS": "",
        "ENCODER_TOKENS": "4096",
        "PEAK_TFLOPS": "989.5",
        "ATTENTION": "sdpa",
        "FUSE": "0",
    }.items():
        monkeypatch.setenv(f"LLAVA_PACKING_{name}", value)
    assert main(["eval-report", "nowhere"]) == 2
    unread, refused = capsys.readouterr().err.splitlines()
    assert unread.startswith("LLAVA_PACKING_FUSE is no variable of this package") and unread.endswith("_FUSED")
    assert refused == "llava-packing eval-report: nowhere is not a folder"


CLOSED = """
import os, subprocess, sys
from llava_packing_tower.cli import main as cli
def run(name, words):
    with open(words[0], "w") as file:
        os.write(1, b"noise of a library")
        subprocess.run([sys.executable, "-c", "import sys; sys.stdout.flush()"], check=True)  # as ranks do
        print("a line")
        file.write("content")
    return 0
cli._run = run if sys.argv[2] == "run" else cli._run
sys.exit(cli.main(["eval-report", sys.argv[1]]))
"""


def test_streams_that_are_closed_or_full(tmp_path):
    """A file that is opened does not become the standard output, and the status is that of the command."""
    words = [sys.executable, "-c", CLOSED, str(tmp_path / "file")]
    options = {"env": {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[2])}, "close_fds": False}

    def close(*numbers):
        return lambda: [os.close(number) for number in numbers]

    ended = subprocess.run([*words, "run"], preexec_fn=close(0, 1), stderr=subprocess.PIPE, **options)
    assert (ended.returncode, ended.stderr) == (0, b"") and (tmp_path / "file").read_text() == "content"
    with open("/dev/full", "w") as full:
        assert subprocess.run([*words, "refuse"], stderr=full, stdout=subprocess.PIPE, **options).returncode == 2
    ended = subprocess.run([*words, "refuse"], preexec_fn=close(2), stdout=subprocess.PIPE, **options)
    assert (ended.returncode, ended.stdout) == (2, b"")


# ---------------------------------------------------------------- two at once


def test_two_evaluations_of_one_task_into_one_folder(tmp_path, monkeypatch):
    """The results of one could be taken for those of the other; other tasks may run beside it."""
    ran = []
    monkeypatch.setattr(runner, "run_task", lambda e, task, c: ran.append(task) or TaskResult(task, {}, 0, "x"))
    evaluation, console = runner.Evaluation({"weights": "w"}, tmp_path), Console(quiet=True)
    with RunLock(tmp_path / "b"), pytest.raises(UsageError, match=r"--output_path: another run writes into .*/b: proc"):
        runner.run_tasks(evaluation, ["a", "b"], console)
    assert ran == []  # said at once
    with RunLock(tmp_path / "b"):
        runner.run_tasks(evaluation, ["a", "c"], console)
    runner.run_tasks(evaluation, ["b"], console)
    assert ran == ["a", "c", "b"] and not list(tmp_path.rglob(LOCK))


def test_two_demos_in_one_folder(tmp_path):
    with RunLock(tmp_path, argument="--output"):
        pipeline.clear(tmp_path)
        (tmp_path / "model").mkdir()
        with pytest.raises(UsageError, match=r"--output: another run writes into .*or use another --output$"):
            RunLock(tmp_path, argument="--output")
        assert (tmp_path / "model").is_dir()
    with RunLock(tmp_path):
        pipeline.clear(tmp_path)
        assert not (tmp_path / "model").exists() and (tmp_path / LOCK).exists()


def test_two_that_write_a_new_folder(tmp_path):
    """As `export` and `import`: the second says so, and files of two never come together."""
    target = tmp_path / "deep" / "out"
    with atomic_folder(target, is_new=True) as first:
        with pytest.raises(ValueError, match="another process is writing"), atomic_folder(target, is_new=True):
            raise AssertionError
        (first / "a").touch()
    with pytest.raises(ValueError, match="is not empty"), atomic_folder(target, is_new=True):
        raise AssertionError
    assert os.listdir(target) == ["a"] and os.listdir(target.parent) == ["out"]
    with pytest.raises(KeyError), atomic_folder(tmp_path / "other" / "out", is_new=True):
        raise KeyError
    assert os.listdir(tmp_path) == ["deep"]


# ---------------------------------------------------------------- places to write to


def save(folder, **options):
    with atomic_folder(folder, **options) as aside:
        (aside / "config.json").touch()
        (aside / "weights").mkdir()


@pytest.mark.parametrize("is_new", [True, False])
def test_links_lead_to_where_is_written(tmp_path, is_new):
    """A rename took their place, and failed for a folder when all work was done."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk")
    save(tmp_path / "out", is_new=is_new)
    assert (tmp_path / "out").is_symlink() and sorted(os.listdir(tmp_path / "disk")) == ["config.json", "weights"]
    (tmp_path / "a.json").symlink_to("disk/b.json")
    write_text(tmp_path / "a.json", "{}")
    assert (tmp_path / "a.json").is_symlink() and (tmp_path / "disk" / "b.json").read_text() == "{}"
    (tmp_path / "gone").symlink_to("nowhere")
    with pytest.raises(ValueError, match="gone exists and is not a folder"):
        check_free(tmp_path / "gone")


def test_a_folder_that_stays_is_filled(tmp_path, monkeypatch):
    """The current one (a shell in it would see nothing), and one where a disk is mounted, which no rename reaches."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    inode = here.stat().st_ino
    with atomic_folder(".", is_new=True) as first:
        assert first.parent.parent == here
        with pytest.raises(ValueError, match="another process is writing"), atomic_folder(here, is_new=True):
            raise AssertionError
        (first / "config.json").touch()
    assert here.stat().st_ino == inode and os.listdir() == ["config.json"] and os.listdir(tmp_path) == ["here"]
    mounted = tmp_path / "disk"
    mounted.mkdir()
    monkeypatch.setattr(scratch.os.path, "ismount", lambda path: Path(path) == mounted)
    inode = mounted.stat().st_ino
    save(mounted, is_new=True)
    assert mounted.stat().st_ino == inode and sorted(os.listdir(mounted)) == ["config.json", "weights"]
    left = mounted / ".disk.killed"
    for path in (mounted / "config.json", mounted / "weights"):
        path.unlink() if path.is_file() else path.rmdir()
    left.mkdir()
    (left / scratch.MARK).touch()
    save(mounted, is_new=True)  # what a killed process has left is no content, and goes
    assert sorted(os.listdir(mounted)) == ["config.json", "weights"]
    assert failed_name(mounted) == mounted / "disk.failed" and failed_name(left) == mounted / ".disk.killed.failed"


def test_conversions_through_a_link_and_into_the_current_folder(tmp_path, monkeypatch):
    from conversions import standard_folder

    source = standard_folder(tmp_path / "s", num_hidden_layers=1)
    for name in ("disk", "here"):
        (tmp_path / name).mkdir()
    (tmp_path / "out").symlink_to("disk")
    assert main(["convert", str(source), "--no-verify", "--output_dir", str(tmp_path / "out")]) == 0
    monkeypatch.chdir(tmp_path / "here")
    assert main(["convert", str(source), "--no-verify", "--output_dir", "."]) == 0
    assert sorted(os.listdir(tmp_path / "disk")) == sorted(os.listdir(".")) != []


def test_the_bars_of_an_export(tmp_path):
    """What is checked, and what a library writes: bytes, and all there are."""
    seen = []
    tensors = {"a": torch.zeros(3), "b": torch.zeros(2, dtype=torch.float64)}
    assert list(counted(tensors.items(), lambda *at: seen.append(at), 28)) == list(tensors.items())
    assert seen == [(12, 28), (28, 28)]
    with growing(tmp_path, lambda *at: seen.append(at), 100):
        (tmp_path / "model.safetensors").write_bytes(b"x" * 60)
        until = time.monotonic() + 30
        while seen[-1] != (60, 100) and time.monotonic() < until:
            time.sleep(0.02)
    assert seen[-2:] == [(60, 100), (100, 100)]
    with pytest.raises(KeyError), growing(tmp_path, lambda *at: seen.append(at), 100):
        raise KeyError
    assert seen[-1] == (100, 100) and not [t for t in threading.enumerate() if t.name == "progress"]


# ---------------------------------------------------------------- files of other kinds


def test_a_pipe_among_the_weights_is_no_reason_to_wait(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    os.mkfifo(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"a\.safetensors: it is not a regular file"):
        folder_fingerprint(tmp_path)
    (tmp_path / "a.safetensors").unlink()
    (tmp_path / "a.safetensors").symlink_to("gone")
    with pytest.raises(ValueError, match=r"cannot read .*a\.safetensors: No such file"):
        folder_fingerprint(tmp_path)


def test_weights_that_may_not_be_read(tmp_path, monkeypatch):
    """safetensors says that there is no such file. (Tests may run as root, who may read everything.)"""
    (tmp_path / "model.safetensors").write_bytes(b"x" * 99)
    monkeypatch.setattr(weights.os, "access", lambda *_: False)
    with pytest.raises(ValueError, match=r"^cannot read .*model\.safetensors: Permission denied$"):
        weights.open_weights(tmp_path / "model.safetensors")


def test_links_to_nothing_among_the_photographs(tmp_path, capsys):
    from families import tiny
    from PIL import Image

    for name in ("a/0.png", "a/1.png", "b/0.png"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20)).save(tmp_path / "photos" / name)
    (tmp_path / "photos/b/1.png").symlink_to("gone")
    assert len(read_folder(tmp_path / "photos").files) == 4
    tiny("llava_vit").save_pretrained(tmp_path / "t_packing")
    words = ["probe", str(tmp_path / "t_packing"), "--data", str(tmp_path / "photos"), "--cache", str(tmp_path / "c")]
    pytest.importorskip("sklearn")
    assert main(words) == 2
    assert capsys.readouterr().err == f"llava-packing probe: {tmp_path}/photos/b/1.png: No such file or directory\n"


def test_tasks_of_ones_own_that_are_damaged(monkeypatch):
    from llava_packing_tower.eval.task_groups import registered

    def fail(*_, **__):
        raise TypeError("expected a single document\n  in mine.yaml")

    monkeypatch.setitem(sys.modules, "lmms_eval", SimpleNamespace())  # importing it takes seconds
    monkeypatch.setitem(sys.modules, "lmms_eval.tasks", SimpleNamespace(TaskManager=fail))
    monkeypatch.setitem(sys.modules, "loguru", SimpleNamespace(logger=SimpleNamespace(disable=lambda name: None)))
    said = r"^--include_path mine: lmms-eval cannot read these tasks: expected a single document in mine\.yaml$"
    with pytest.raises(ValueError, match=said):
        registered("mine")


def test_a_conversion_into_a_place_that_is_none(tmp_path, capsys):
    from conversions import standard_folder

    source = standard_folder(tmp_path / "s", num_hidden_layers=1)
    (tmp_path / "file").touch()
    assert main(["convert", str(source), "--no-verify", "--output_dir", str(tmp_path / "file" / "out")]) == 2
    assert "out cannot be written: " in capsys.readouterr().err
