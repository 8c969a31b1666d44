"""Real hosts, unedited: train, save, reload in a new process, generate. Tuned towers survive; frozen ones are kept."""

from __future__ import annotations

import csv
import gzip
import importlib.util
import json
import re
import shutil

import host_runs
import pytest
import torch
from conftest import chosen
from safetensors.torch import load_file, save_file

from llava_packing_tower import LlavaViTPackingConfig, LlavaViTPackingModel
from llava_packing_tower.checkpoint.hashing import tensor_digest

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
pytestmark = [
    # Looked for, not imported: in this process it may have to be another one (LLAVA_NEXT_DIR).
    pytest.mark.skipif(importlib.util.find_spec("llava") is None, reason="no LLaVA is installed"),
    pytest.mark.newest,
    pytest.mark.skipif(torch.cuda.is_available(), reason="the runs here are for machines without a GPU"),
    pytest.mark.timeout(900),
]
IN_MODEL = "model.vision_tower.vision_tower."
KINDS = ("zero2", "zero3", "fsdp", "lora")
MARKS = {kind: pytest.mark.newest_long for kind in ("zero2", "fsdp", "lora")}
each_kind = pytest.mark.parametrize("kind", [pytest.param(kind, marks=MARKS.get(kind, [])) for kind in KINDS])


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
    """``runs[kind]``: folder and log of each kind of training, which begins when a test asks for it."""
    return trainings


@pytest.fixture(scope="module")
def workspace(trainings):
    return trainings.workspace


@pytest.fixture(scope="module")
def reloaded(runs, workspace, request):
    """Checkpoints loaded in one new process: a report or an error of each. The folders of tuned towers are gone."""
    jobs = {}
    for kind in (kind for kind in KINDS if kind in {"zero3", *chosen(request, "kind")}):
        folder, _ = runs[kind]
        shutil.rmtree(folder / "vit_packing")
        base = workspace / "llama_tiny" if kind == "lora" else None
        jobs[kind] = {"folder": host_runs.output_of(folder, kind), "base": base}
    whole = jobs["zero3"]["folder"]
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


@each_kind
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


@pytest.mark.parametrize("kind", [*(pytest.param(kind, marks=MARKS.get(kind, [])) for kind in KINDS), "frozen"])
def test_the_log_says_how_fast_it_is(runs, kind):
    folder, log = runs[kind]
    output, samples = host_runs.output_of(folder, kind), 2 if kind == "frozen" else 4
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    logged = [entry for entry in history if "loss" in entry]
    assert len(logged) == 4
    if kind == "frozen":  # the last step was profiled, which slows it
        assert "samples_per_second" not in logged.pop()
    for entry in logged:
        images = entry["visual_tokens_per_second"] / entry["samples_per_second"] * samples / 64
        # Each image has 64 tokens; the text of the data stands in a template of some 40 words.
        assert images == pytest.approx(round(images), abs=0.02) and samples - 1 <= round(images) <= samples
        assert 35 < entry["text_tokens_per_second"] / entry["samples_per_second"] < 60
        assert 0 <= entry["data_wait"] <= 1 and 0 <= entry["rank_wait"] <= 1
        assert (0 < entry["mfu"] < 1) if kind == "frozen" else "mfu" not in entry  # there is no GPU
    if kind == "frozen":
        assert all(entry["rank_wait"] == 0 for entry in logged)  # alone
    lines = [line for line in log.splitlines() if line.startswith("step ")]
    assert len(lines) == 4
    assert all(" samples/s  " in line and "waits: data " in line for line in lines[: len(logged)])
    with (output / "speed.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["samples_per_second"]) for row in rows] == [entry["samples_per_second"] for entry in logged]
    assert (logged[-1]["seconds_left"] == 0) == (len(logged) == 4) and logged[0]["seconds_left"] > 0


def test_the_operations_of_a_real_training(runs):
    """By hand, from the sizes of tower and decoder: one image of 64 patches and a text, or a text alone."""
    folder, _ = runs["frozen"]
    output = host_runs.output_of(folder, "frozen")
    config = json.loads((output / "config.json").read_text())
    tower = config["mm_packing_config"]["config"]
    wide, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    keys = wide // heads * config["num_key_value_heads"]
    token = 2 * config["num_hidden_layers"] * (2 * wide**2 + 2 * wide * keys + 3 * wide * inner)
    patch = (
        2
        * tower["num_hidden_layers"]
        * (4 * tower["hidden_size"] ** 2 + 2 * tower["hidden_size"] * tower["intermediate_size"])
    )
    pairs = 4 * tower["num_hidden_layers"] * tower["hidden_size"] * 64**2
    for entry in json.loads((output / "trainer_state.json").read_text())["log_history"][:3]:
        rates = [entry[f"{name}_tokens_per_second"] for name in ("visual", "text")]
        least = 3 * token * sum(rates) + patch * rates[0] + pairs * rates[0] / 64
        # The head at supervised positions, and attention in the decoder, come on top.
        assert 1 < entry["mfu"] * 0.5e12 / least < 1.5


def test_the_profile_of_a_real_training(runs):
    folder, log = runs["frozen"]
    lines = [line for line in log.splitlines() if line.startswith("profile: ")]
    (file,) = (host_runs.output_of(folder, "frozen") / "profile").iterdir()
    assert file.name == "rank0_steps_4_to_4.json.gz" and str(file) in lines[0]
    names = {event.get("name") for event in json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]}
    assert "aten::addmm" in names or "aten::linear" in names
    assert len(lines) == 4 and "a step takes" in lines[1] and "matmuls" in lines[2] and "bound by" in lines[3]
    parts = [float(share) for share in re.findall(r"([0-9]+)%", lines[1])]
    assert len(parts) == 5 and 97 <= sum(parts) <= 103


@each_kind
def test_a_tuned_tower_is_saved_to_the_last_bit(runs, workspace, kind):
    output = host_runs.output_of(runs[kind][0], kind)
    trained = json.loads((output / "packing_tower.json").read_text())["tensors"]
    before, saved = load_file(workspace / "vit_packing" / "model.safetensors"), tensors_of_tower(output)
    assert {name: tensor_digest(tensor) for name, tensor in saved.items()} == trained  # in memory at the end
    assert saved.keys() == before.keys()
    assert not [name for name, tensor in before.items() if torch.equal(tensor.bfloat16(), saved[name].bfloat16())]
    content = json.loads((output / "config.json").read_text())["mm_packing_config"]
    assert content["weights"] == "checkpoint" and "fingerprint" not in content


@each_kind
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
