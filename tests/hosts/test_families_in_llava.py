"""All families but LlavaViT inside a real host: published checkpoints, tuned for one step, saved, reloaded."""

from __future__ import annotations

import importlib.util
import json
import sys

import host_runs
import pytest
import torch
from families import ALL_FAMILIES, GOLDEN_FAMILIES, VLM_FAMILIES
from safetensors.torch import load_file

from llava_packing_tower.checkpoint.hashing import tensor_digest

pytestmark = [
    # Looked for, not imported: in this process it may have to be another one (LLAVA_NEXT_DIR).
    pytest.mark.skipif(importlib.util.find_spec("llava") is None, reason="no LLaVA is installed"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="the runs here are for machines without a GPU"),
    pytest.mark.timeout(600),
]

# The host's own train(), as `llava-packing train` starts it; its trainer tells the gradients of the tower.
TRAIN_AND_RELOAD = """
import inspect, json, os, sys
from importlib import import_module
from pathlib import Path
from llava_packing_tower.integrations import llava as hosts
from llava_packing_tower.train import entrypoint as train_entry
from llava_packing_tower.train.launcher import make_plan, to_argv
from llava_packing_tower.checkpoint.hashing import tensor_digest
from llava_packing_tower.towers.packing_tower import HEVCViTPackingVisionTower

plan = make_plan(sys.argv[1], sys.argv[2:], num_processes=1)
sys.argv[1:] = to_argv(plan.values)
os.environ.update(plan.environment)
hosts.apply()
trainer = import_module("llava.train.train").LLaVATrainer
training_step, told = trainer.training_step, {}

def step(self, model, *args, **kwargs):
    loss = training_step(self, model, *args, **kwargs)
    tower = model.get_vision_tower()
    assert isinstance(tower, HEVCViTPackingVisionTower)
    told["tower"], told["family"] = type(tower).__name__, type(tower.vision_tower).__name__
    for name, parameter in tower.vision_tower.named_parameters():
        told.setdefault("gradients", {})[name] = None if parameter.grad is None else parameter.grad.norm().item()
    return loss

trainer.training_step = step
train_entry.main()
folder = sys.argv[sys.argv.index("--output_dir") + 1]
builder = import_module("llava.model.builder")
v1 = "device" in inspect.signature(builder.load_pretrained_model).parameters
how = {"device": "cpu", "device_map": "cpu"} if v1 else {"attn_implementation": "sdpa", "torch_dtype": "bfloat16"}
_, model, processor, _ = builder.load_pretrained_model(folder, None, "llava_llama", **how)
tower = model.get_vision_tower()
told["reloaded"] = [type(tower.vision_tower).__name__, tower.hidden_size, tower.num_patches]
told["processor"] = [processor.image_mean, processor.image_std, processor.resample, processor.patch_size]
told["digests"] = {name: tensor_digest(value) for name, value in tower.vision_tower.state_dict().items()}
Path(folder, "told.json").write_text(json.dumps(told))
"""


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("families")
    host_runs.make_workspace(folder)
    return folder


# Projectors: the VLM's own, one that merges 3 x 3 patches, and LLaVA's.
STARTS = {name: "mlp2x_gelu" for name in ALL_FAMILIES}
STARTS |= {"qwen3_vl": "checkpoint", "qwen2_5_vl": "checkpoint", "moonvit": "checkpoint"}
STARTS |= {"radio": "spatial_merge_3x3", "onevision2": "spatial_merge_2x2", "perception_encoder": "linear"}
CELLS = {"checkpoint": 2, "spatial_merge_2x2": 2, "spatial_merge_3x3": 3}


# Of the towers of VLMs one in both hosts: what differs between hosts is the same for all of them.
RUNS = [(name, host) for host in host_runs.HOSTS for name in (*GOLDEN_FAMILIES, "qwen3_vl")]
RUNS += [(name, host_runs.HOSTS[0]) for name in VLM_FAMILIES if name != "qwen3_vl"]


@pytest.mark.parametrize(
    ("name", "next_dir"),
    [pytest.param(name, *host.values, id=f"{name}-{host.id}", marks=host.marks) for name, host in RUNS],
)
def test_one_step_with_the_tower_tuned(workspace, golden, tmp_path, name, next_dir):
    cls, output = ALL_FAMILIES[name], tmp_path / "llava_llama"
    # The prefix alone selects the tower, and model_type the family.
    tower = f"packing:{golden / name}"
    words = ["--mm_vision_tower", tower, "--bf16", "false", "--max_steps", "1", "--output_dir", str(output)]
    words += ["--mm_projector_type", STARTS[name]]
    if name in VLM_FAMILIES:  # their nominal images are large
        words += ["--image_aspect_ratio", "native", "--mm_packing_max_patches", "36"]
    command = [sys.executable, "-c", TRAIN_AND_RELOAD, str(workspace / "config.yaml"), *words]
    result = host_runs.execute(command, host_runs.environment(next_dir), timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    told = json.loads((output / "told.json").read_text())
    assert told["tower"] == "HEVCViTPackingVisionTower" and told["family"] == cls.__name__
    assert "step 1/1  loss" in result.stdout

    # LLaVA reads the last block's output before the final norm: that norm, and nothing else, takes no part.
    before = cls.from_pretrained(golden / name).state_dict()
    idle = {key for key in before if key.startswith(("post_layernorm.", "norm_post.", "norm.", "final_layernorm."))}
    assert told["gradients"].keys() == before.keys() and (name in VLM_FAMILIES or 1 <= len(idle) <= 2)
    assert {key for key, norm in told["gradients"].items() if not norm} == idle

    # The step changed each of them, and what is saved is what was in memory.
    saved = load_file(output / "model.safetensors")
    after = {key: saved[f"model.vision_tower.vision_tower.{key}"] for key in before}
    assert {key for key in before if torch.equal(before[key], after[key])} == idle
    recorded = json.loads((output / "packing_tower.json").read_text())["tensors"]
    assert {key: tensor_digest(tensor) for key, tensor in after.items()} == recorded

    # The checkpoint alone rebuilds the tower, with the family's own image processor.
    config = json.loads((output / "config.json").read_text())
    assert config["mm_packing_config"]["config"]["model_type"] == cls.config_class.model_type
    assert config["mm_hidden_size"] == before["encoder.layers.0.layer_norm1.weight"].numel()
    own = cls.default_image_processor(cls.from_pretrained(golden / name).config)
    cell = CELLS.get(STARTS[name], 1)
    side = -(-own.crop_size["height"] // 4 // cell)
    assert told["reloaded"] == [cls.__name__, config["mm_hidden_size"], side**2]
    assert told["processor"] == [own.image_mean, own.image_std, own.resample, 4]
    if STARTS[name] == "checkpoint":
        assert config["mm_packing_projector"]["merge"] == [2, 2]
        assert saved["model.mm_projector.mlp.2.weight"].shape == (128, 128)


def test_one_step_with_two_towers_tuned(workspace, golden, tmp_path):
    """``packing:A + packing:B``: both are trained, saved in the checkpoint and reloaded from it alone."""
    families, output = ("dinov3", "qwen3_vl"), tmp_path / "llava_llama"
    tower = " + ".join(f"packing:{golden / name}" for name in families)
    words = ["--mm_vision_tower", tower, "--bf16", "false", "--max_steps", "1", "--output_dir", str(output)]
    words += ["--image_aspect_ratio", "native", "--mm_packing_max_patches", "36"]
    words += ["--mm_projector_type", "spatial_merge_2x2", "--mm_packing_fusion", "channel"]
    command = [sys.executable, "-c", TRAIN_AND_RELOAD, str(workspace / "config.yaml"), *words]
    result = host_runs.execute(command, host_runs.environment(""), timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    told = json.loads((output / "told.json").read_text())
    assert told["tower"] == "FusedPackingVisionTower" and told["reloaded"][0] == told["family"] == "FusedModel"

    saved = load_file(output / "model.safetensors")
    recorded = json.loads((output / "packing_tower.json").read_text())["tensors"]
    assert told["digests"].keys() == told["gradients"].keys() == recorded.keys()
    width = 0
    for index, name in enumerate(families):
        before = ALL_FAMILIES[name].from_pretrained(golden / name).state_dict()
        start = f"towers.{index}."
        after = {key: saved[f"model.vision_tower.vision_tower.{start}{key}"] for key in before}
        for key, value in after.items():  # (LLaVA loads in half precision.)
            assert tensor_digest(value) == recorded[f"{start}{key}"]
            assert tensor_digest(value.half()) == told["digests"][f"{start}{key}"]
        still = {key for key in before if torch.equal(before[key], after[key])}
        assert still == {key for key in before if not told["gradients"][f"{start}{key}"]} and len(still) <= 2
        width += before["encoder.layers.0.layer_norm1.weight"].numel()
    config = json.loads((output / "config.json").read_text())
    assert config["mm_hidden_size"] == width == told["reloaded"][1] and config["mm_vision_tower"] == tower
    noted = config["mm_packing_config"]
    assert noted["fusion"] == "channel" and noted["weights"] == "checkpoint"
    assert [own["config"]["model_type"] for own in noted["towers"]] == noted["config"]["towers"]
