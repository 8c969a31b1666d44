"""A run that is killed while it saves goes on from the checkpoint before, and ends where it would have ended; a run
without DeepSpeed's engine is refused."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import host_runs
import pytest
import torch
import yaml
from conftest import FIVE
from host_runs import needs_host
from safetensors.torch import load_file

from llava_packing_tower.train import data_note, resume
from llava_packing_tower.train.data_note import note_of

# Loaded by Python itself in every process of the run: kills the one that writes a certain file. Weights are written by
# the safetensors library, outside of Python's own open(): half of them come onto the disk.
KILLER = """
import os, signal, sys
import safetensors

name = os.environ.get("KILL_WHEN_WRITING") or "\\0"

def watch(event, args):
    if event == "open" and str(args[0]).endswith(name) and "w" in str(args[1]):
        os.kill(os.getpid(), signal.SIGKILL)

def serialize_file(tensors, filename, *args, original=safetensors.serialize_file, **kwargs):
    if not str(filename).endswith(name):
        return original(tensors, filename, *args, **kwargs)
    whole = safetensors.serialize(tensors, *args, **kwargs)
    file = os.open(filename, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.write(file, whole[: len(whole) // 2])
    os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(watch)
safetensors.serialize_file = serialize_file
"""


@needs_host
@pytest.mark.timeout(900)
# The state of the trainer is a checkpoint's last file (weights and optimizer are there), the weights are its first.
@pytest.mark.parametrize(
    ("kind", "file"),
    [pytest.param("zero2", resume.STATE, marks=pytest.mark.long), ("zero3", "model.safetensors")],
)
def test_killed_while_saving(trainings, tmp_path, kind, file):
    config = trainings.config
    words = ["--deepspeed", f"configs/{kind}.json", "--save_strategy", "steps", "--save_steps", "2"]
    words += ["--save_total_limit", "1", "--max_steps", "4"]
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(KILLER)
    output = tmp_path / "llava_llama_killed"
    environment = host_runs.environment(host_runs.NEXT)
    killing = {"PYTHONPATH": str(tmp_path / "hook"), "KILL_WHEN_WRITING": f"checkpoint-4/{file}"}
    killed = host_runs.execute(host_runs.train_command(config, output, *words), {**environment, **killing})
    assert killed.returncode != 0 and f"exitcode  : -{signal.SIGKILL:d}" in killed.stderr, killed.stderr
    assert [c.name for c in resume.checkpoints(output)] == ["checkpoint-2", "checkpoint-4"]
    sizes = {n: (output / f"checkpoint-{n}" / "model.safetensors").stat().st_size for n in (2, 4)}
    assert sizes[4] == (sizes[2] if file == resume.STATE else sizes[2] // 2) > 100_000
    assert not (output / "model.safetensors").exists() and resume.last_complete(output).name == "checkpoint-2"

    log = host_runs.train(config, output, host_runs.NEXT, *words)
    reason = f"checkpoint-4 is not complete (it has no {resume.STATE}): now incomplete-checkpoint-4"
    assert "start: resumes from checkpoint-2" in log and reason in log and "warning" not in log.split("output:")[0]
    noted = json.loads((output / "checkpoint-4" / resume.ORDER).read_text())["data"]
    assert noted == note_of(yaml.safe_load(Path(config).read_text())["data_path"])
    assert "step 3/4" in log and "step 4/4" in log and "step 1/4" not in log and "step 2/4" not in log
    assert [c.name for c in resume.checkpoints(output)] == ["checkpoint-4"]  # save_total_limit
    assert (output / "incomplete-checkpoint-4" / "model.safetensors").stat().st_size == sizes[4]

    # Weights, moments of the optimizer, learning rate, random numbers, place in the data: were one of them not that of
    # the checkpoint, the end would not be that of the same training, never interrupted, to the last bit.
    straight = host_runs.output_of(trainings.run(kind)[0], kind)
    ends = [json.loads((folder / "packing_tower.json").read_text()) for folder in (output, straight)]
    assert ends[0]["step"] == ends[1]["step"] == 4
    assert ends[0]["tensors"] == ends[1]["tensors"]
    weights = [load_file(folder / "model.safetensors") for folder in (output, straight)]
    assert weights[0].keys() == weights[1].keys()
    assert [name for name, tensor in weights[0].items() if not torch.equal(tensor, weights[1][name])] == []

    before = {f: (f.stat().st_mtime_ns, f.stat().st_size) for f in output.rglob("*")}
    log = host_runs.train(config, output, host_runs.NEXT, *words)
    assert "already finished after 4 steps: nothing to do" in log and "loss" not in log
    assert {f: (f.stat().st_mtime_ns, f.stat().st_size) for f in output.rglob("*")} == before


@needs_host
@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_run_that_has_done_all_its_steps(trainings, tmp_path):
    """Killed in its last save, it saves; finished, it does nothing: neither takes a step more."""
    words = ["--deepspeed", "configs/zero2.json", "--save_strategy", "steps", "--save_steps", "4", "--max_steps", "4"]
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(KILLER)
    output = tmp_path / "llava_llama_killed"
    environment = host_runs.environment(host_runs.NEXT)
    killing = {"PYTHONPATH": str(tmp_path / "hook"), "KILL_WHEN_WRITING": f"{output.name}/model.safetensors"}
    killed = host_runs.execute(host_runs.train_command(trainings.config, output, *words), {**environment, **killing})
    assert killed.returncode != 0 and resume.last_complete(output).name == "checkpoint-4", killed.stderr

    log = host_runs.train(trainings.config, output, host_runs.NEXT, *words)
    assert "resumes from checkpoint-4" in log and "all 4 steps were done before" in log and "step 5/" not in log
    straight = host_runs.output_of(trainings.run("zero2")[0], "zero2")
    weights = [load_file(folder / "model.safetensors") for folder in (output, straight)]
    assert weights[0].keys() == weights[1].keys()
    assert [name for name, tensor in weights[0].items() if not torch.equal(tensor, weights[1][name])] == []

    before = {f: (f.stat().st_mtime_ns, f.stat().st_size) for f in output.rglob("*")}
    log = host_runs.train(trainings.config, output, host_runs.NEXT, *words)
    assert "already finished after 4 steps: nothing to do" in log and "loss" not in log
    assert {f: (f.stat().st_mtime_ns, f.stat().st_size) for f in output.rglob("*")} == before

    # Another number of processes, another engine: refused before anything is loaded.
    more = [*words, "--max_steps", "6"]
    for change, processes, said in (
        ([], 1, "saved by 2 processes, but this run has 1"),
        (["--deepspeed", "configs/zero3.json"], 2, "those of ZeRO-1 or 2, but this run uses ZeRO-3"),
        (["--deepspeed", "null"], 2, "saved with DeepSpeed, but this run has no DeepSpeed"),
        (["--per_device_train_batch_size", "1"], 2, "per_device_train_batch_size 2, but this run has 1"),
    ):
        command = host_runs.train_command(trainings.config, output, *more, *change, processes=processes)
        refused = host_runs.execute(command, environment)
        assert refused.returncode == 2 and said in refused.stderr, refused.stdout + refused.stderr
        assert "resumes" not in refused.stdout
    assert {f: (f.stat().st_mtime_ns, f.stat().st_size) for f in output.rglob("*")} == before


def saved_by(folder: Path, *files: str, latest: str | None = None) -> Path:
    made = folder / "checkpoint-8"
    for name in files:
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).touch()
    if latest is not None:
        (made / "latest").write_text(latest)
    (made / resume.STATE).write_text('{"global_step": 8, "max_steps": 20}')
    return made


PLAIN = ("optimizer.pt", "scheduler.pt")
SHARDS = tuple(f"global_step8/bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(3))
RANKS = tuple(f"rng_state_{rank}.pth" for rank in range(3))


@pytest.mark.parametrize(
    ("files", "latest", "processes", "stage", "reason"),
    [
        (("model.safetensors", "rng_state.pth"), None, 1, None, "only weights"),
        (("optimizer.pt", "rng_state.pth"), None, 1, None, "no state of the learning rate"),
        ((*PLAIN, "rng_state.pth"), None, 1, None, None),
        ((*PLAIN, "rng_state.pth"), None, 4, None, "by 1 processes, but this run has 4"),
        ((*PLAIN, *RANKS), None, 3, None, None),
        ((*PLAIN, *RANKS), None, 2, None, "by 3 processes, but this run has 2"),
        ((*PLAIN, *RANKS), None, 3, 2, "saved with no DeepSpeed, but this run has DeepSpeed"),
        ((*SHARDS, "global_step8/mp_rank_00_model_states.pt"), "global_step8", 3, 2, None),
        ((*SHARDS, "global_step8/mp_rank_00_model_states.pt"), "global_step8", 3, 1, None),
        ((*SHARDS, "global_step8/mp_rank_00_model_states.pt"), "global_step8", 3, 3, "those of ZeRO-1 or 2"),
        ((*SHARDS, "global_step8/mp_rank_00_model_states.pt"), "global_step8", 2, 2, "by 3 processes"),
        ((*SHARDS, "global_step8/zero_pp_rank_0_mp_rank_00_model_states.pt"), "global_step8", 3, 3, None),
        ((*SHARDS, "global_step8/zero_pp_rank_0_mp_rank_00_model_states.pt"), "global_step8", 3, 2, "those of ZeRO-3"),
        ((*SHARDS, "global_step8/zero_pp_rank_0_mp_rank_00_model_states.pt"), "global_step8", None, 3, None),
        (
            (*SHARDS, "global_step8/zero_pp_rank_0_mp_rank_00_model_states.pt"),
            "global_step8",
            3,
            None,
            "saved with DeepSpeed, but this run has no DeepSpeed",
        ),
        (("model.safetensors",), "global_step8", 3, 3, "only weights"),
    ],
)
def test_which_run_can_go_on_from_a_checkpoint(tmp_path, files, latest, processes, stage, reason):
    found = resume.misfit(saved_by(tmp_path, *files, latest=latest), processes, stage)
    assert found is None if reason is None else reason in found and "another output_dir" in found


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, None),
        ({"gradient_accumulation_steps": 2, "seed": 42, "dataloader_drop_last": False}, None),
        ({"per_device_train_batch_size": 2}, "per_device_train_batch_size 4, but this run has 2"),
        ({"gradient_accumulation_steps": 4, "ignore_data_skip": True}, "gradient_accumulation_steps 2, but this run"),
        ({"seed": 7}, "seed 42, but this run has 7: the order is another"),
        ({"group_by_modality_length": False}, "group_by_modality_length True, but this run has False"),
        ({"group_by_length": True}, "group_by_length False, but this run has True"),
        ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy random, but this run has group_by"),
        ({"seed": 7, "ignore_data_skip": True}, None),
    ],
)
def test_a_run_goes_on_with_the_samples_that_are_left(tmp_path, changes, said):
    """transformers 4.40 goes on with the old batch and the new accumulation, others at another place in the data."""
    same = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "group_by_modality_length": True}
    assert resume.other_order(tmp_path, same) is None  # of an older version: nothing is known
    resume.check_count(tmp_path, 5)
    resume.note_order(tmp_path, SimpleNamespace(**same, seed=42), 37)
    found = resume.other_order(tmp_path, {**same, **changes})
    assert found is None if said is None else said in found and "another output_dir" in found
    resume.check_count(tmp_path, 37)
    with pytest.raises(ValueError, match="saved with 37 samples, but this run has 40: the order is another"):
        resume.check_count(tmp_path, 40)


def test_data_that_changed_since_a_checkpoint(tmp_path, monkeypatch):
    """Whatever keeps the number of samples, and often the size; another place or time is no change."""
    a, b, listed = tmp_path / "a.json", tmp_path / "b.json", tmp_path / "mix.yaml"
    lines = [f'{{"id": {number}}}' for number in range(1000, 1400)]
    a.write_text(f"[{', '.join(lines)}]"), b.write_text("[{}]")

    def listing(*entries):
        listed.write_text(
            "datasets:\n" + "".join(f"- {{json_path: {f}, sampling_strategy: {s}}}\n" for f, s in entries)
        )

    def said():
        return resume.other_data(tmp_path, {"data_path": str(listed)})

    both = (a, "all"), (b, "first:1")
    listing(*both)
    resume.note_order(tmp_path, SimpleNamespace(), 5)
    assert said() is None  # of an older version
    for whole in (data_note.WHOLE, 16):
        monkeypatch.setattr(data_note, "WHOLE", whole)
        monkeypatch.setattr(data_note, "BLOCK", 16)
        a.write_text(f"[{', '.join(lines)}]")
        listing(*both)
        resume.note_order(tmp_path, SimpleNamespace(), 5, note_of(str(listed)))
        assert said() is None
        os.utime(a, (1, 1))
        (moved := tmp_path / "moved.json").write_bytes(a.read_bytes())
        listing((moved, "all"), (b, "first:1"))
        assert said() is None
        listing(both[1], both[0])
        assert "data_path: the order or number of its files changed since the run began that saved" in said()
        listing(both[0], (b, "end:1"))
        assert f"data_path: {b} changed" in said()
        listing(*both)
        a.write_text(f"[{', '.join(reversed(lines))}]")  # the same size
        assert f"data_path: {a} changed since" in said() and "twice, or never" in said()
        assert resume.other_data(tmp_path, {"data_path": str(listed), "ignore_data_skip": True}) is None
        a.unlink()
        assert f"data_path: {a} changed" in said()
    (tmp_path / resume.ORDER).write_text('{"data": [["a"]]}')
    with pytest.raises(ValueError, match=r"packing_order\.json is damaged: data is \[\['a'\]\]"):
        said()


def test_a_step_that_reached_into_the_next_epoch():
    """transformers 4.40 resumes as if each epoch of 5 micro-batches had 2 whole steps of 2, newer ones make it 3."""
    assert [resume.other_place(step, 2 * step / 5, 5, 2) is None for step in (1, 2, 3, 4)] == [True, True, False, False]
    assert "the 5 micro-batches of an epoch are no multiple of gradient_accu" in resume.other_place(3, 1.2, 5, 2)
    for step, epoch in ((1, 0.4), (2, 0.8), (3, 1.0), (4, 1.4), (6, 2.0)):
        assert resume.other_place(step, epoch, 5, 2) is None
    assert all(resume.other_place(step, step / 3, 6, 2) is None for step in range(9))
    assert all(resume.other_place(step, float(step), 3, 4) is None for step in range(4))  # shorter than a step


@pytest.mark.parametrize("text", ["", "{", "[]", '{"global_step": "8", "max_steps": 9}', '{"global_step": 8}'])
def test_a_damaged_state_is_named(tmp_path, text):
    folder = saved_by(tmp_path, *PLAIN)
    (folder / resume.STATE).write_text(text)
    said = r"checkpoint-8/trainer_state\.json (is damaged|is not valid JSON|must hold a JSON object)"
    with pytest.raises(ValueError, match=said):
        resume.misfit(folder, 1, None)


def test_what_counts_as_finished(tmp_path):
    assert resume.finished(tmp_path, {}) is None
    resume.mark_finished(tmp_path, step=10, max_steps=10, epochs=2.0)
    for values, steps in (
        ({"max_steps": 10}, 10),
        ({"max_steps": "9"}, 10),
        ({"max_steps": 11}, None),
        ({"num_train_epochs": 2}, 10),
        ({"num_train_epochs": "2.5"}, None),
        ({"max_steps": -1, "num_train_epochs": 1}, 10),
        ({}, None),  # three epochs by default
    ):
        assert resume.finished(tmp_path, values) == steps, values
    (tmp_path / resume.FINISHED).write_text("{}")
    with pytest.raises(ValueError, match=r"packing_finished\.json is damaged"):
        resume.finished(tmp_path, {})


@needs_host
@pytest.mark.long  # what the process itself says: tests/hosts/test_compat.py
@pytest.mark.timeout(900)
def test_a_run_that_would_be_plain_ddp_is_refused(trainings, tmp_path):
    """accelerate leaves DeepSpeed out when use_cpu is set: past the launcher's own check, the process refuses.

    With transformers 5 it is not left out.
    """
    from llava_packing_tower.train import launcher

    words = ["--deepspeed", "configs/zero2.json", "--output_dir", str(tmp_path / "llava_llama")]
    plan = launcher.make_plan(trainings.config, words, num_processes=1)
    result = host_runs.execute(
        [*plan.command, "--use_cpu", "True"], {**host_runs.environment(host_runs.NEXT), **plan.environment}
    )
    if FIVE:
        assert result.returncode == 0 and "engine: DeepSpeedEngine, ZeRO stage 2" in result.stdout, result.stderr
        return
    assert result.returncode != 0
    assert "ZeRO-2 was requested, but the model is wrapped in " in result.stderr, result.stderr
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
    assert "saving did not finish" in resume.defect(steps[30])
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
