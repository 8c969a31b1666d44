"""How the benchmarks start a training (benchmarks/runs.py), and what they read from it."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import peers
import peers_swift
import rank_faults
import runs
import train_speed

# Two ranks in sessions of their own, as torchrun has them, each with a data loader that has its environment. What they
# print is cut anywhere. argv: what the launcher does then.
LAUNCHER = """
import os, subprocess, sys, time
CHILD = "import time; time.sleep(60)"
RANK = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', sys.argv[1]]); time.sleep(60)"
started = [
    subprocess.Popen([sys.executable, "-c", RANK, CHILD], env={**os.environ, "RANK": str(n)}, start_new_session=True)
    for n in range(2)
]
print("warning of another ranstep  1/12  loss 5.25  lr", end="", flush=True)
time.sleep(0.2)
print(" 1e-5\\rstep 2/12  loss nan  lr\\nstep 2/12  loss 1.0  again\\nlast word", end="", flush=True)
exec(sys.argv[1])
"""


def command(then: str) -> list[str]:
    return [sys.executable, "-c", LAUNCHER, then]


def test_steps_and_what_is_left(monkeypatch, tmp_path):
    monkeypatch.setattr(runs, "AFTERWARDS", 0.3)
    seen = []
    log = tmp_path / "logs" / "one.log"
    found = runs.train(command("sys.exit(3)"), 30, log, lambda training, step: seen.append((step, training.clock)))
    assert found.status == 3 and [step for step, _ in seen] == [1, 2]
    assert found.losses[1] == 5.25 and found.losses[2] != found.losses[2]  # nan
    assert found.times[1] < found.times[2] < found.seconds
    assert found.log.endswith("last word") and log.read_text().count("loss") == 3
    assert len(found.left) == 4 and sum("RANK 1" in process for process in found.left) == 2
    assert not found.processes()


def test_a_training_that_hangs_is_ended(monkeypatch):
    monkeypatch.setattr(runs, "GRACE", 0.3)
    ignoring = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    found = runs.train(command(ignoring), 0.8)
    assert found.status == runs.LATE and found.losses[1] == 5.25 and not found.left and not found.processes()
    assert found.seconds < 10


def test_a_rank_is_found_and_not_its_data_loader(monkeypatch):
    monkeypatch.setattr(runs, "AFTERWARDS", 0.1)
    killed = []

    def at_step(training, step):
        if step == 2:
            killed.append(training.rank(1))
            killed[0].kill()

    found = runs.train(command("sys.exit(-9 if started[1].wait() else 0)"), 30, None, at_step)
    assert found.status == 247 and killed[0].pid not in {process.pid for process in found.processes()}


def test_what_an_error_in_a_callback_leaves():
    trainings = []

    def at_step(training, step):
        trainings.append(training)
        raise RuntimeError("here")

    with pytest.raises(RuntimeError, match="here"):
        runs.train(command("time.sleep(60)"), 30, None, at_step)
    assert not trainings[0].processes()


def test_images_by_step(tmp_path):
    """Two ranks, an image of 36 tokens and one of 1,419; speeds as they are rounded in the file."""
    steps = [0, 36, 72, 1419, 1419 + 36]
    lines = [f"{n},{5.0},{8.3333 if n % 2 else 12.3},{round(t / 2 * (8.3333 if n % 2 else 12.3), 1)}" for n, t in
             enumerate(steps, 1)]  # fmt: skip
    columns = "step,loss,samples_per_second,visual_tokens_per_second"
    (tmp_path / "speed.csv").write_text("\n".join([columns, *lines]) + "\n")
    log = "visual tokens per image or video: 36 to 1419, median 36, 1815 in all\n"
    run = runs.Training(lines=[(0.0, log)], status=0)
    found = rank_faults.images_by_step(run, tmp_path, 2)
    assert found == [(0, False), (1, False), (2, False), (1, True), (2, True)]


def test_torchruns_report():
    log = "  rank      : 3 (local_rank: 3)\n  exitcode  : -9 (pid: 1829)\n  error_file: <N/A>\n"
    log += "  rank      : 0 (local_rank: 0)\n  exitcode  : 1 (pid: 1)\n"
    assert rank_faults.FAILURE.findall(log) == [("3", "-9"), ("0", "1")]


def test_the_scaling_table():
    table = train_speed.scaling_runs([4, 1], ["zero2", "zero3"], 3)
    assert [run["name"] for run in table] == [
        *("zero2_1", "zero2_4_dealt", "zero2_4", "zero3_1", "zero3_4_dealt", "zero3_4")
    ]
    for run in table:  # the same samples in a step
        assert int(run["gpus"]) * int(run["batch"]) * int(run["gradient_accumulation_steps"]) == 12
    with pytest.raises(ValueError, match=r"4 GPUs are no multiple of each of \[3, 4\]"):
        train_speed.scaling_runs([3, 4], ["zero2"], 1)
    speeds = {"zero2_1": 10.0, "zero2_4_dealt": 38.0, "zero2_4": 32.0, "zero3_1": 8.0, "zero3_4_dealt": 28.8}
    found = {name: {"samples/s": speed, "losses": {"1": 5.0, 2: 4.0 + speed / 100}} for name, speed in speeds.items()}
    found["zero3_4"] = {"exit status": 124, "losses": {}}
    rows = {row["name"]: row for row in train_speed.scaling(table, found)}
    assert rows.keys() == speeds.keys()
    assert rows["zero2_1"]["efficiency against 1"] == 1 and rows["zero2_1"]["loss differs by"] == 0
    assert rows["zero2_4_dealt"]["efficiency against 1"] == 0.95 and rows["zero2_4_dealt"]["of undealt"] == 1.188
    assert rows["zero2_4"]["efficiency against 1"] == 0.8 and "of undealt" not in rows["zero2_4"]
    assert rows["zero3_4_dealt"]["efficiency against 1"] == 0.9 and "of undealt" not in rows["zero3_4_dealt"]
    assert rows["zero3_1"]["loss differs by"] == 0 and rows["zero3_4_dealt"]["loss differs by"] == 0.208


def test_the_row_of_our_run_beside_peers(monkeypatch, tmp_path):
    """Figures after the 10th step alone, each step by its time."""
    asked = {}

    def run(words, workspace, output, args):
        asked.update(words)
        folder = output / "llava_qwen_anyres_8"
        folder.mkdir(parents=True)
        columns = (
            "step,samples_per_second,visual_tokens_per_second,text_tokens_per_second,mfu,peak_memory_gib,data_wait"
        )
        rows = ["10,1,9,9,0.9,3.0,0.9", "11,8,1000,100,0.2,5.0,0.5", "12,4,400,50,0.5,4.0,0.2"]
        (folder / "speed.csv").write_text("\n".join([columns, *rows]))
        return {"exit status": 0, "samples/s": 5.0, "losses": {10: 90.0, 11: 7.0, 12: 6.0}}

    monkeypatch.setattr(peers.train_speed, "run", run)
    monkeypatch.setattr(peers, "versions", lambda python: ({"torch": "2"}, "host"))
    out = tmp_path / "peers.json"
    out.write_text(json.dumps({"matmul TFLOP/s": 700.5}))
    args = argparse.Namespace(out=out, workspace=tmp_path, cpu=False)
    assert not peers.run_ours("anyres:8", tmp_path / "output", args)
    row = peers.read(out)["rows"]["anyres:8"]
    assert {key: row[key] for key in ("ms", "loss", "tokens of a step", "MFU", "waits for data", "peak GiB")} == {
        **{"ms": 1600, "loss": 6.5, "tokens of a step": 1000, "MFU": 0.4, "waits for data": 0.3, "peak GiB": 5.0}
    }
    assert asked["mm_packing_peak_tflops"] == "700.5" and "(672, 336)" in asked["image_grid_pinpoints"]


def test_the_row_of_ms_swift():
    """Its log has the seconds since the start over the steps so far; operations of a sample are those of TRL's row."""
    speeds = {1: 2.0, 10: 0.5, 11: 0.6, 12: 0.5}
    logs = [
        {"loss": 10.0 + step, "global_step/max_steps": f"{step}/12", "train_speed(s/it)": speed, "memory(GiB)": 20.5}
        for step, speed in speeds.items()
    ] + [{"train_loss": 1.0, "global_step/max_steps": "12/12", "train_speed(s/it)": 9.0}, {"log_history": []}]
    trl, native = {"MFU": 0.3, "samples/s": 8.0, "tiles of a step": 40.0}, {"MFU": 0.9, "samples/s": 60.0}
    row = peers_swift.measured(logs, 8, argparse.Namespace(steps=12), {"rows": {"trl:8": trl, "native:8": native}})
    assert row["samples/s"] == pytest.approx(16) and row["ms"] == pytest.approx(500)
    assert row["loss"] == 21.5 and row["peak GiB"] == 20.5 and row["MFU"] == pytest.approx(0.6)
