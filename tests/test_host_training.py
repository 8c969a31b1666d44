"""Real hosts, unedited: train, save, reload in a new process, generate. Tuned towers survive; frozen ones are kept."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import host_runs
import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_packing_tower.digest import tensor_digest

pytest.importorskip("llava", reason="no LLaVA is installed")

HOSTS = [
    pytest.param("", id="llava_v1"),
    pytest.param(
        host_runs.NEXT,
        id="llava_next",
        marks=[pytest.mark.next, pytest.mark.skipif(not host_runs.NEXT, reason="LLAVA_NEXT_DIR is not set")],
    ),
]
pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="the runs here are for machines without a GPU"),
    pytest.mark.timeout(600),
]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hosts")
    host_runs.make_workspace(folder)
    return folder


def damaged(checkpoint, copy, change):
    """A copy of a checkpoint with ``change(tensors)`` done to its weights."""
    shutil.copytree(checkpoint, copy)
    file = copy / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return copy


@pytest.mark.parametrize("next_dir", HOSTS)
@pytest.mark.parametrize("stage", [2, 3])
def test_a_tuned_tower_survives(workspace, tmp_path, next_dir, stage):
    output = tmp_path / "llava_llama_packing"
    shutil.copytree(workspace / "vit_packing", tmp_path / "vit_packing")
    words = ["--deepspeed", f"configs/zero{stage}.json", "--vision_tower", str(tmp_path / "vit_packing")]
    log = host_runs.train(workspace / "config.yaml", output, next_dir, *words)
    assert f"engine: DeepSpeedEngine, ZeRO stage {stage}, world size 2, backend gloo" in log, log
    assert "step 1/2  loss" in log and "step 2/2  loss" in log
    expected = {"cuda_sync", "tower_fp32", "empty_groups", "inner_loop" if next_dir else "fwd_kw"}
    named = {name for line in log.splitlines() if line.startswith("mends: ") for name in line[7:].split(", ")}
    assert expected <= named, named

    trained = json.loads((output / "packing_tower.json").read_text())["tensors"]
    before = load_file(workspace / "vit_packing" / "model.safetensors")
    saved = {
        k.split("vision_tower.", 1)[1]: v for k, v in load_file(output / "model.safetensors").items() if "vision_t" in k
    }
    # What was in memory when training ended is in the file, to the last bit, and nothing else.
    assert {k.removeprefix("vision_tower."): tensor_digest(v) for k, v in saved.items()} == trained
    assert {k.removeprefix("vision_tower.") for k in saved} == before.keys()
    changed = [k for k, v in before.items() if not torch.equal(v.bfloat16(), saved[f"vision_tower.{k}"].bfloat16())]
    assert set(changed) == before.keys()  # every tensor of the tower was trained
    config = json.loads((output / "config.json").read_text())
    assert config["mm_packing_config"]["weights"] == "checkpoint" and "fingerprint" not in config["mm_packing_config"]

    shutil.rmtree(tmp_path / "vit_packing")  # the tower's own folder is not needed any more
    loaded = host_runs.report(host_runs.reload(output, workspace, next_dir))
    assert loaded["tower"] == "HEVCViTPackingVisionTower"
    if next_dir:  # LLaVA 1.x always loads as float16; there the plugin's own check compared file and memory
        assert loaded["tensors"] == trained
    assert loaded["answer"] == loaded["without cache"]

    if stage == 2 and not next_dir:
        name = "model.vision_tower.vision_tower.layernorm_pre.bias"
        partial = damaged(output, tmp_path / "llava_llama_partial", lambda tensors: tensors.pop(name))
        result = host_runs.reload(partial, workspace, next_dir)
        assert result.returncode != 0 and "layernorm_pre.bias" in result.stderr, result.stderr
        surplus = name.replace("layernorm_pre", "layernorm_gone")
        other = damaged(output, tmp_path / "llava_llama_surplus", lambda t: t.update({surplus: t[name].clone()}))
        result = host_runs.reload(other, workspace, next_dir)
        assert result.returncode != 0 and "with no place in the tower: vision_tower.layernorm_gone" in result.stderr


@pytest.mark.parametrize("next_dir", HOSTS)
def test_a_frozen_tower_comes_from_its_folder_and_a_changed_folder_is_noticed(workspace, tmp_path, next_dir):
    """In float32, and with a learning rate for the tower although it is frozen."""
    output, tower = tmp_path / "llava_llama_packing", tmp_path / "vit_packing"
    shutil.copytree(workspace / "vit_packing", tower)
    words = ["--deepspeed", "configs/zero2.json", "--bf16", "false", "--vision_tower", str(tower)]
    words += ["--mm_tunable_parts", "mm_mlp_adapter,mm_language_model"]
    log = host_runs.train(workspace / "config.yaml", output, next_dir, *words, processes=1)
    assert "world size 1" in log, log
    before = load_file(tower / "model.safetensors")
    saved = load_file(output / "model.safetensors")
    for name, tensor in before.items():  # not even rounded
        assert torch.equal(saved[f"model.vision_tower.vision_tower.{name}"], tensor), name
    config = json.loads((output / "config.json").read_text())
    assert config["mm_packing_config"]["weights"] == "folder" and len(config["mm_packing_config"]["fingerprint"]) == 64
    loaded = host_runs.report(host_runs.reload(output, workspace, next_dir))
    assert loaded["answer"] == loaded["without cache"]

    before["layernorm_pre.bias"][3] += 1
    save_file(before, tower / "model.safetensors", metadata={"format": "pt"})
    result = host_runs.reload(output, workspace, next_dir)
    assert result.returncode != 0 and "has changed since" in result.stderr, result.stdout + result.stderr


def test_a_run_that_would_be_plain_ddp_is_refused(workspace, tmp_path):
    """accelerate leaves DeepSpeed out when use_cpu is set: past the launcher's own check, the process refuses."""
    from llava_packing_tower import launch

    plan = launch.make_plan(
        workspace / "config.yaml",
        ["--deepspeed", "configs/zero2.json", "--output_dir", str(tmp_path / "llava_llama")],
        num_processes=2,
    )
    result = subprocess.run(
        [*plan.command, "--use_cpu", "True"],
        env={**host_runs.environment(""), **plan.environment},
        cwd=host_runs.REPOSITORY,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode != 0
    assert "ZeRO-2 was asked for, but the model is wrapped in DistributedDataParallel" in result.stderr, result.stderr
    assert not list(tmp_path.rglob("*.safetensors"))


def test_mends_switched_off_by_name(workspace, tmp_path):
    script = (
        "import builder_patch, llava.train.train\nfrom llava_packing_tower.hosts import mends\nprint(mends.applied())"
    )
    environment = {**host_runs.environment(""), "LLAVA_PACKING_DISABLE_MENDS": "tower_fp32,fwd_kw"}
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, env=environment, cwd=host_runs.REPOSITORY, capture_output=True, text=True)
    assert "'cuda_sync'" in result.stdout, result.stdout + result.stderr
    assert "tower_fp32" not in result.stdout and "fwd_kw" not in result.stdout
