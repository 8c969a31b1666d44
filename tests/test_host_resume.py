"""A run that is killed while it saves goes on from the checkpoint before, and ends where it would have ended; a run
without DeepSpeed's engine is refused."""

from __future__ import annotations

import json
import signal
from importlib.util import find_spec

import host_runs
import pytest
import torch

from llava_packing_tower import resume

needs_host = pytest.mark.skipif(
    find_spec("llava") is None or find_spec("deepspeed") is None or torch.cuda.is_available(),
    reason="needs LLaVA and DeepSpeed on a machine without a GPU",
)
# Loaded by Python itself in every process of the run: kills the one that is about to write a certain file.
KILLER = """
import os, signal, sys

def watch(event, args, name=os.environ.get("KILL_WHEN_WRITING")):
    if event == "open" and name and str(args[0]).endswith(name) and "w" in str(args[1]):
        os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(watch)
"""


@needs_host
@pytest.mark.timeout(400)
def test_killed_while_saving(trainings, tmp_path):
    config = trainings.config
    words = ["--deepspeed", "configs/zero2.json", "--save_strategy", "steps", "--save_steps", "2"]
    words += ["--save_total_limit", "1", "--max_steps", "4"]
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(KILLER)
    output = tmp_path / "llava_llama_killed"
    environment = host_runs.environment(host_runs.NEXT)
    # The state of the trainer is the last file of a checkpoint: weights and optimizer are there, the end is not.
    killing = {"PYTHONPATH": str(tmp_path / "hook"), "KILL_WHEN_WRITING": f"checkpoint-4/{resume.STATE}"}
    killed = host_runs.execute(host_runs.train_command(config, output, *words), {**environment, **killing})
    assert killed.returncode != 0 and f"exitcode  : -{signal.SIGKILL:d}" in killed.stderr, killed.stderr
    assert [c.name for c in resume.checkpoints(output)] == ["checkpoint-2", "checkpoint-4"]
    assert (output / "checkpoint-4" / "model.safetensors").exists() and not (output / "model.safetensors").exists()
    assert resume.last_complete(output).name == "checkpoint-2"

    log = host_runs.train(config, output, host_runs.NEXT, *words)
    assert "start: goes on from checkpoint-2" in log and "checkpoint-4 is not complete" in log
    assert "step 3/4" in log and "step 4/4" in log and "step 1/4" not in log and "step 2/4" not in log
    assert [c.name for c in resume.checkpoints(output)] == ["checkpoint-4"]  # save_total_limit
    assert (output / "incomplete-checkpoint-4").is_dir()

    straight = host_runs.output_of(trainings.run("zero2")[0], "zero2")  # the same training, never interrupted
    ends = [json.loads((folder / "packing_tower.json").read_text()) for folder in (output, straight)]
    assert ends[0]["step"] == ends[1]["step"] == 4
    assert ends[0]["tensors"] == ends[1]["tensors"]  # to the last bit


@needs_host
def test_a_run_that_would_be_plain_ddp_is_refused(trainings, tmp_path):
    """accelerate leaves DeepSpeed out when use_cpu is set: past the launcher's own check, the process refuses."""
    from llava_packing_tower import launch

    words = ["--deepspeed", "configs/zero2.json", "--output_dir", str(tmp_path / "llava_llama")]
    plan = launch.make_plan(trainings.config, words, num_processes=1)
    result = host_runs.execute(
        [*plan.command, "--use_cpu", "True"], {**host_runs.environment(host_runs.NEXT), **plan.environment}
    )
    assert result.returncode != 0
    assert "ZeRO-2 was asked for, but the model is wrapped in " in result.stderr, result.stderr
    assert not list(tmp_path.rglob("*.safetensors"))


def checkpoint(folder, step: int, files=("model.safetensors", resume.STATE)):
    made = folder / f"checkpoint-{step}"
    made.mkdir(parents=True)
    for name in files:
        (made / name).write_text(name)
    return made


def test_what_counts_as_complete(tmp_path):
    steps = {step: checkpoint(tmp_path, step) for step in (100, 20, 30, 40, 50)}
    for step in (100, 20, 40, 50):
        resume.mark_complete(steps[step])
    checkpoint(tmp_path, 60, files=["mm_projector.bin"])  # of LLaVA 1.x: the projector alone, nothing to go on from
    resume.mark_complete(tmp_path / "checkpoint-60")
    (steps[40] / "model.safetensors").write_text("short")
    (steps[100] / "model.safetensors").unlink()
    assert [c.name for c in resume.checkpoints(tmp_path)] == [f"checkpoint-{n}" for n in (20, 30, 40, 50, 60, 100)]
    assert resume.defect(steps[20]) is resume.defect(steps[50]) is None
    assert "the save did not end" in resume.defect(steps[30])
    assert resume.defect(steps[40]) == "model.safetensors has 5 bytes of 17"
    assert resume.defect(steps[100]) == "model.safetensors is missing"
    assert resume.defect(tmp_path / "checkpoint-60") == "it has no trainer_state.json"
    assert resume.last_complete(tmp_path) == steps[50]
    checkpoint(tmp_path, 0).rename(tmp_path / "incomplete-checkpoint-30")  # of an earlier crash: not overwritten
    lines = resume.set_aside(tmp_path)
    assert [line.split(" ")[0] for line in lines] == [f"checkpoint-{n}" for n in (30, 40, 60, 100)]
    assert [c.name for c in resume.checkpoints(tmp_path)] == ["checkpoint-20", "checkpoint-50"]
    assert (tmp_path / "incomplete-checkpoint-30.2").is_dir() and (tmp_path / "incomplete-checkpoint-100").is_dir()
    assert resume.set_aside(tmp_path) == [] and resume.set_aside(tmp_path / "nothing") == []
