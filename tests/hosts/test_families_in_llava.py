"""All families but LlavaViT inside a real host: published checkpoints, tuned for one step, saved, reloaded.

Two steps of every family on a GPU: ``tests/gpu/test_families_in_llava_gpu.py``.
"""

from __future__ import annotations

import importlib.util
import json

import family_trainings
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
    pytest.mark.timeout(900),
]

# Projectors: the VLM's own, one that merges 3 x 3 patches, and LLaVA's.
STARTS = {name: "mlp2x_gelu" for name in ALL_FAMILIES}
STARTS |= {"qwen3_vl": "checkpoint", "qwen2_5_vl": "checkpoint", "moonvit": "checkpoint"}
STARTS |= {"radio": "spatial_merge_3x3", "onevision2": "spatial_merge_2x2", "perception_encoder": "linear"}
CELLS = {"checkpoint": 2, "spatial_merge_2x2": 2, "spatial_merge_3x3": 3}


# Of the towers of VLMs one in both hosts: what differs between hosts is the same for all of them.
IN_BOTH = (*GOLDEN_FAMILIES, "qwen3_vl")
FUSED = ("dinov3", "qwen3_vl")
RUNS = [(name, host) for host in host_runs.HOSTS for name in IN_BOTH]
RUNS += [(name, host_runs.HOSTS[0]) for name in (*VLM_FAMILIES, "fusion") if name not in IN_BOTH]


@pytest.fixture(scope="module")
def told_by(tmp_path_factory, golden):
    """What the trainings in a host told, and the folder of their outputs: one process for all of them."""
    kept = {}

    def run(next_dir):
        if next_dir not in kept:
            folder = tmp_path_factory.mktemp("families")
            host_runs.make_workspace(folder)
            jobs = []
            # (Without LLAVA_NEXT_DIR the skipped host has no folder either.)
            for name in dict.fromkeys(name for name, host in RUNS if host.values[0] == next_dir):
                families = FUSED if name == "fusion" else (name,)
                tower = " + ".join(f"packing:{golden / own}" for own in families)  # the prefix alone selects it
                more = {"mm_projector_type": STARTS.get(name, "spatial_merge_2x2"), "max_steps": 1}
                if name not in GOLDEN_FAMILIES:  # their nominal images are large
                    more |= {"image_aspect_ratio": "native", "mm_packing_max_patches": 36}
                if name == "fusion":
                    more["mm_packing_fusion"] = "channel"
                job = family_trainings.job(name, folder / "config.yaml", folder, tower, "cpu", True, **more)
                jobs.append(job)
            kept[next_dir] = family_trainings.start(jobs, folder, next_dir, timeout=500), folder
        return kept[next_dir]

    return run


@pytest.mark.parametrize(
    ("name", "next_dir"),
    [
        pytest.param(name, *host.values, id=f"{name}-{host.id}", marks=host.marks)
        for name, host in RUNS
        if name != "fusion"
    ],
)
def test_one_step_with_the_tower_tuned(told_by, golden, name, next_dir):
    cls, (all_told, folder) = ALL_FAMILIES[name], told_by(next_dir)
    told, output = all_told[name], folder / name / "llava_llama"
    assert "error" not in told, told["error"]
    assert told["tower"] == "HEVCViTPackingVisionTower" and told["family"] == cls.__name__
    assert len(told["losses"]) == 1 and told["step"].startswith("packed decoder: on")

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


def test_one_step_with_two_towers_tuned(told_by, golden):
    """``packing:A + packing:B``: both are trained, saved in the checkpoint and reloaded from it alone."""
    (all_told, folder), families = told_by(""), FUSED
    told, output = all_told["fusion"], folder / "fusion" / "llava_llama"
    assert "error" not in told, told["error"]
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
    assert config["mm_hidden_size"] == width == told["reloaded"][1] and config["mm_vision_tower"].count("packing:") == 2
    noted = config["mm_packing_config"]
    assert noted["fusion"] == "channel" and noted["weights"] == "checkpoint"
    assert [own["config"]["model_type"] for own in noted["towers"]] == noted["config"]["towers"]
