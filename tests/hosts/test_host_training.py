"""Real hosts, unedited: train, save, reload in a new process, generate. Tuned towers survive; frozen ones are kept."""

from __future__ import annotations

import importlib.util
import json
import shutil

import host_runs
import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_packing_tower import LlavaViTPackingConfig, LlavaViTPackingModel
from llava_packing_tower.checkpoint.hashing import tensor_digest

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
pytestmark = [
    # Looked for, not imported: in this process it may have to be another one (LLAVA_NEXT_DIR).
    pytest.mark.skipif(importlib.util.find_spec("llava") is None, reason="no LLaVA is installed"),
    pytest.mark.newest,
    pytest.mark.skipif(torch.cuda.is_available(), reason="the runs here are for machines without a GPU"),
    pytest.mark.timeout(600),
]
IN_MODEL = "model.vision_tower.vision_tower."
KINDS = ("zero2", "zero3", "fsdp", "lora")


def damaged(checkpoint, name: str, change, file: str = "model.safetensors"):
    """A copy of a checkpoint beside it, with ``change(tensors)`` done to its weights."""
    copy = checkpoint.parent / name
    shutil.copytree(checkpoint, copy)
    tensors = load_file(copy / file)
    change(tensors)
    save_file(tensors, copy / file, metadata={"format": "pt"})
    return copy


@pytest.fixture(scope="module")
def runs(trainings):
    """Folder and log of each kind of training."""
    return {kind: trainings.run(kind) for kind in (*KINDS, "frozen")}


@pytest.fixture(scope="module")
def workspace(trainings):
    return trainings.workspace


@pytest.fixture(scope="module")
def reloaded(runs, workspace):
    """Checkpoints loaded in one new process: a report or an error of each. The folders of tuned towers are gone."""
    jobs = {}
    for kind in KINDS:
        folder, _ = runs[kind]
        shutil.rmtree(folder / "vit_packing")
        base = workspace / "llama_tiny" if kind == "lora" else None
        jobs[kind] = {"folder": host_runs.output_of(folder, kind), "base": base}
    whole = jobs["zero2"]["folder"]
    bias = IN_MODEL + "layernorm_pre.bias"
    surplus = bias.replace("layernorm_pre", "layernorm_gone")
    jobs["partial"] = {"folder": damaged(whole, "llava_llama_partial", lambda t: t.pop(bias))}
    jobs["surplus"] = {"folder": damaged(whole, "llava_llama_surplus", lambda t: t.update({surplus: t[bias].clone()}))}
    projector = "model.mm_projector.0.weight"
    jobs["projector"] = {"folder": damaged(whole, "llava_llama_projector", lambda t: t.pop(projector))}
    folder, _ = runs["frozen"]
    jobs["frozen"] = {"folder": host_runs.output_of(folder, "frozen")}
    changed = folder / "llava_llama_changed"
    shutil.copytree(host_runs.output_of(folder, "frozen"), changed)
    other = folder / "changed_packing"
    shutil.copytree(folder / "vit_packing", other)
    tensors = load_file(other / "model.safetensors")
    tensors["layernorm_pre.bias"][3] += 1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    content = json.loads((changed / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps(content | {"mm_vision_tower": str(other)}))
    jobs["changed"] = {"folder": changed}
    return dict(zip(jobs, host_runs.reload(list(jobs.values()), workspace, host_runs.NEXT), strict=True))


def tensors_of_tower(output) -> dict[str, torch.Tensor]:
    """Those that a checkpoint holds, by their names in the tower's own folder."""
    extras = output / "non_lora_trainables.bin"
    saved = torch.load(extras, weights_only=True) if extras.exists() else load_file(output / "model.safetensors")
    word = "vision_tower.vision_tower."
    return {name.split(word)[1]: tensor for name, tensor in saved.items() if word in name}


@pytest.mark.parametrize("kind", KINDS)
def test_the_plan_comes_first(runs, kind):
    log = runs[kind][1]
    stage = {"zero2": 2, "zero3": 3, "lora": host_runs.LORA_STAGE}.get(kind)
    # LoRA: machine 0 is told; ZeRO-2: they meet at a rendezvous.
    where = "2 processes on the CPU" if kind in ("zero3", "fsdp") else "2 machines x 1 process on the CPU, world size 2"
    assert f"engine: {f'DeepSpeed ZeRO-{stage}' if stage else 'FSDP'}, {where}" in log
    lines = log.split("step 1/4  loss")[0].splitlines()
    plan = {line.partition(": ")[0].strip(): line.partition(": ")[2] for line in lines}
    # FSDP's first version wraps the model, its second gives it another class.
    wrapped = ("FullyShardedDataParallel", "FSDPLlavaLlamaForCausalLM", "FSDPLlavaQwenForCausalLM")
    engines = {f"DeepSpeedEngine, ZeRO stage {stage}"} if stage else set(wrapped)
    assert plan["engine"] in {f"{engine}, world size 2, backend gloo" for engine in engines}
    assert plan["tower attention"] == "sdpa (requested: auto)" and plan["start"] == "from the beginning"
    assert plan["tokens per image or per crop"].startswith("64 (112 x 112 pixels")
    assert "mm_vision_tower 670,336 of 670,336, mm_mlp_adapter 33,024 of 33,024" in plan["trained"]
    patches = set(plan["compat patches"].split(", "))
    assert {"cuda_sync", "tower_fp32"} <= patches
    found = {name for name in patches if name.startswith("fsdp")} - {
        "fsdp_pieces"
    }  # that one is not in every accelerate
    assert found == ({"fsdp_on_cpu", "fsdp_tower", "fsdp_dtypes", "fsdp_save"} if kind == "fsdp" else set())
    assert "step 4/4  loss" in log


@pytest.mark.parametrize("kind", KINDS)
def test_a_tuned_tower_is_saved_to_the_last_bit(runs, workspace, kind):
    output = host_runs.output_of(runs[kind][0], kind)
    trained = json.loads((output / "packing_tower.json").read_text())["tensors"]
    before, saved = load_file(workspace / "vit_packing" / "model.safetensors"), tensors_of_tower(output)
    assert {name: tensor_digest(tensor) for name, tensor in saved.items()} == trained  # in memory at the end
    assert saved.keys() == before.keys()
    assert not [name for name, tensor in before.items() if torch.equal(tensor.bfloat16(), saved[name].bfloat16())]
    content = json.loads((output / "config.json").read_text())["mm_packing_config"]
    assert content["weights"] == "checkpoint" and "fingerprint" not in content


@pytest.mark.parametrize("kind", KINDS)
def test_a_tuned_tower_reloads_to_the_last_bit_without_its_folder(runs, reloaded, workspace, kind):
    output, loaded = host_runs.output_of(runs[kind][0], kind), reloaded[kind]
    assert "error" not in loaded, loaded
    content = json.loads((output / "config.json").read_text())
    # With a LoRA this may be the dtype of the base, float32: of the same values.
    dtype = getattr(torch, content.get("torch_dtype") or content["dtype"])
    assert loaded["tower"] == "HEVCViTPackingVisionTower" and loaded["dtype"] == str(dtype)
    saved = tensors_of_tower(output)
    assert loaded["tensors"] == {name: tensor_digest(tensor.to(dtype)) for name, tensor in saved.items()}
    assert loaded["answer"] == loaded["without cache"] and len(loaded["answer"]) == 4

    # The features too: those of the file's tensors in a model that LLaVA had nothing to do with.
    from PIL import Image

    from llava_packing_tower import HEVCViTPackingVisionTower, PackingImageProcessor

    content = json.loads((workspace / "vit_packing" / "config.json").read_text())
    model = LlavaViTPackingModel(LlavaViTPackingConfig.from_dict(content)).to(dtype)
    model.load_state_dict(saved)
    settings = type("Settings", (), {"mm_vision_select_layer": -1, "mm_projector_type": "mlp2x_gelu"})
    tower = HEVCViTPackingVisionTower(str(workspace / "vit_packing"), settings())
    tower.vision_tower = model.eval()
    photo = Image.open(workspace / "images" / "3.png").convert("RGB")
    side = max(photo.size)  # LLaVA's `pad`: a square of the mean colour
    processor = PackingImageProcessor.from_pretrained(workspace / "vit_packing")
    square = Image.new("RGB", (side, side), tuple(int(255 * x) for x in processor.image_mean))
    square.paste(photo, ((side - photo.width) // 2, (side - photo.height) // 2))
    pixels = processor.preprocess(square, return_tensors="pt")["pixel_values"]
    assert tensor_digest(pixels) == loaded["pixels"]
    with torch.no_grad():
        assert tensor_digest(tower(pixels.to(dtype))) == loaded["features"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("partial", "layernorm_pre.bias"),
        ("surplus", "in the checkpoint, but not in the tower: vision_tower.layernorm_gone"),
        ("projector", "missing from the files: model.mm_projector.0.weight"),
        ("changed", "has changed since"),
    ],
)
def test_a_reload_that_is_not_whole_is_an_error(reloaded, damage, message):
    assert message in reloaded[damage].get("error", ""), reloaded[damage]


def test_a_frozen_tower_comes_from_its_folder(runs, reloaded, workspace):
    folder, log = runs["frozen"]
    assert "world size 1" in log and "mm_vision_tower 0 of 670,336" in log
    before, output = load_file(workspace / "vit_packing" / "model.safetensors"), host_runs.output_of(folder, "frozen")
    for name, tensor in tensors_of_tower(output).items():  # not even rounded
        assert torch.equal(tensor, before[name]), name
    content = json.loads((output / "config.json").read_text())["mm_packing_config"]
    assert content["weights"] == "folder" and len(content["fingerprint"]) == 64
    loaded = reloaded["frozen"]
    assert loaded["tensors"] == {name: tensor_digest(tensor) for name, tensor in before.items()}
    assert loaded["answer"] == loaded["without cache"]
