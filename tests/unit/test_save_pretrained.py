"""Saving and loading as transformers promises it: keywords are obeyed or refused, and no save is mixed with another."""

import json
import os
import socket
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import transformers
import warm
from families import TINY, tiny
from transformers import AutoModel

from llava_packing_tower.checkpoint.weights import WeightFiles

pytestmark = pytest.mark.newest
NAMES = list(TINY)


def weights(folder):
    files = WeightFiles(folder)
    return {key: files[key] for key in files.shapes()}


def same(model, tensors):
    found = model.state_dict()
    return found.keys() == tensors.keys() and all(torch.equal(found[key], tensors[key]) for key in found)


def names(folder):
    return sorted(file.name for file in folder.iterdir())


# ---------------------------------------------------------------- save_pretrained


@pytest.mark.parametrize("name", NAMES)
def test_state_dict_is_what_is_written(name, tmp_path):
    model = tiny(name)
    average = {key: torch.full_like(value, 0.5, dtype=torch.bfloat16) for key, value in model.state_dict().items()}
    model.save_pretrained(tmp_path / "x", state_dict=average, is_main_process=True, save_function=torch.save)
    assert same(type(model).from_pretrained(tmp_path / "x", dtype="auto"), average)
    assert json.loads((tmp_path / "x/config.json").read_text())["dtype"] == "bfloat16"


def test_tensors_that_could_not_be_loaded_again_are_not_written(tmp_path):
    model = tiny("siglip2")
    full = model.state_dict()
    first = next(iter(full))
    for wrong, word in (
        ({**full, first: torch.empty(0)}, "mis-shaped"),
        ({key: full[key] for key in list(full)[1:]}, "missing"),
        ({**full, "lora_A": torch.ones(1)}, "unexpected"),
        ({**full, first: full[first].to("meta")}, "have no values"),
    ):
        with pytest.raises(ValueError, match=word):
            model.save_pretrained(tmp_path / "x", state_dict=wrong)
        assert not (tmp_path / "x").exists()
    model.post_layernorm.weight.ds_id = 3  # as DeepSpeed marks a partitioned weight
    with pytest.raises(ValueError, match="ZeRO-3: gather them"):
        model.save_pretrained(tmp_path / "x")


def test_an_empty_state_dict_means_that_the_weights_are_elsewhere(tmp_path):
    model = tiny("siglip2")
    model.save_pretrained(tmp_path / "x")
    model.save_pretrained(tmp_path / "x", state_dict={})  # transformers' Trainer, where ZeRO-3 gathers nothing
    assert names(tmp_path / "x") == ["config.json"]


@pytest.mark.parametrize(
    ("options", "error", "word"),
    [
        ({"variant": "fp16"}, ValueError, "a folder of its own"),
        ({"push_to_hub": True}, ValueError, "upload_folder"),
        ({"safe_serialization": False}, ValueError, "safetensors only"),
        ({"max_shards": 3}, TypeError, "max_shards"),
    ],
)
def test_what_is_not_obeyed_is_refused(options, error, word, tmp_path):
    with pytest.raises(error, match=word):
        tiny("aimv2").save_pretrained(tmp_path / "x", **options)
    assert not (tmp_path / "x").exists()


def test_other_processes_write_nothing(tmp_path):
    tiny("aimv2").save_pretrained(tmp_path / "x", is_main_process=False)
    assert not (tmp_path / "x").exists()


# ---------------------------------------------------------------- one save replaces another


@pytest.mark.parametrize("first", [40_000, 20_000, "5GB"])
@pytest.mark.parametrize("second", [30_000, "5GB"])
def test_a_save_removes_what_it_supersedes(first, second, tmp_path):
    old, new = tiny("dinov3", seed=1), tiny("dinov3", seed=2)
    old.save_pretrained(tmp_path / "x", max_shard_size=first)
    for other in ("model_ema.safetensors", "model.fp16.safetensors", "optimizer.bin"):
        (tmp_path / "x" / other).write_bytes(b"kept")
    new.save_pretrained(tmp_path / "x", max_shard_size=second)
    new.save_pretrained(tmp_path / "y", max_shard_size=second)
    assert names(tmp_path / "x") == sorted(
        [*names(tmp_path / "y"), "model_ema.safetensors", "model.fp16.safetensors", "optimizer.bin"]
    )
    assert same(type(new).from_pretrained(tmp_path / "x"), new.state_dict())
    assert (second == "5GB") == ("model.safetensors" in names(tmp_path / "x"))


def test_two_saves_in_a_folder_are_not_read(tmp_path):
    old, new = tiny("dinov3", seed=1), tiny("dinov3", seed=2)
    old.save_pretrained(tmp_path / "old")
    new.save_pretrained(tmp_path / "new", max_shard_size=40_000)
    shards = sorted((tmp_path / "new").glob("model-*"))
    assert len(shards) > 2
    (tmp_path / "new/model.safetensors").write_bytes((tmp_path / "old/model.safetensors").read_bytes())
    with pytest.raises(ValueError, match="two saved models"):
        type(new).from_pretrained(tmp_path / "new")
    (tmp_path / "new/model.safetensors").unlink()
    index = tmp_path / "new/model.safetensors.index.json"
    content = json.loads(index.read_text())
    other = shards[0].with_name(shards[0].name.replace("-of-0", "-of-1"))
    other.write_bytes(shards[0].read_bytes())
    moved = {k: other.name if v == shards[0].name else v for k, v in content["weight_map"].items()}
    index.write_text(json.dumps({**content, "weight_map": moved}))
    with pytest.raises(ValueError, match="shards of two saved models"):
        type(new).from_pretrained(tmp_path / "new")
    index.write_text(json.dumps(content))
    shards[0].write_bytes((tmp_path / "old/model.safetensors").read_bytes())
    with pytest.raises(ValueError, match="belongs to another save"):
        type(new).from_pretrained(tmp_path / "new")


def test_an_interrupted_save_leaves_nothing_that_can_be_mixed(tmp_path, monkeypatch):
    old, new = tiny("dinov3", seed=1), tiny("dinov3", seed=2)
    old.save_pretrained(tmp_path / "x", max_shard_size=40_000)
    replace, calls = os.replace, []

    def once(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise OSError("no space left")
        replace(source, target)

    monkeypatch.setattr(os, "replace", once)
    with pytest.raises(OSError, match="no space"):
        new.save_pretrained(tmp_path / "x", max_shard_size=40_000)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="has no"):
        type(new).from_pretrained(tmp_path / "x")


# ---------------------------------------------------------------- from_pretrained


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, "auto", "sequential", torch.device("cpu")])
def test_device_map(name, device_map, tmp_path):
    model = tiny(name)
    model.save_pretrained(tmp_path / "x")
    for load in (type(model).from_pretrained, AutoModel.from_pretrained):
        again = load(tmp_path / "x", device_map=device_map)
        assert again.device.type == "cpu" and same(again, model.state_dict())


def test_keywords_of_auto_model(tmp_path):
    model = tiny("siglip2")
    model.save_pretrained(tmp_path / "a/b")
    again, info = AutoModel.from_pretrained(
        tmp_path / "a", subfolder="b", attn_implementation="eager", dtype="bfloat16", output_loading_info=True
    )
    assert again.encoder.attention_backend == "eager" and again.dtype == torch.bfloat16
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    assert AutoModel.from_pretrained(tmp_path / "a/b", torch_dtype=torch.float16).dtype == torch.float16
    again = AutoModel.from_pretrained(tmp_path / "a/b")
    assert again.encoder.attention_backend == "auto" and again.dtype == torch.float32
    with pytest.raises(ValueError, match="no subfolder 'c'"):
        type(model).from_pretrained(tmp_path / "a", subfolder="c")


@pytest.mark.parametrize(
    ("options", "error", "word"),
    [
        ({"variant": "fp16"}, TypeError, "subfolder="),
        ({"load_in_8bit": True}, TypeError, "then quantize"),
        ({"ignore_mismatched_sizes": True}, TypeError, "every tensor must fit"),
        ({"offload_folder": "x"}, TypeError, "dispatch_model"),
        ({"layers": 3}, TypeError, "layers"),
        ({"device": "cpu", "device_map": "cpu"}, ValueError, "one of them"),
        ({"device_map": "everywhere"}, ValueError, "is not a device"),
        ({"dtype": "bfloat16", "torch_dtype": "float16"}, ValueError, "differ"),
        ({"attn_implementation": "fastest"}, ValueError, "unknown attention backend"),
        ({"use_safetensors": False}, ValueError, "pytorch_model.bin"),
    ],
)
def test_what_loading_does_not_obey_is_refused(options, error, word, tmp_path):
    model = tiny("siglip2")
    model.save_pretrained(tmp_path / "x")
    with pytest.raises(error, match=word):
        type(model).from_pretrained(tmp_path / "x", **options)


@pytest.mark.parametrize("name", NAMES)
def test_set_attn_implementation(name):
    model = tiny(name)
    model.set_attn_implementation("eager")
    assert model.encoder.attention_backend == "eager"
    model.set_attn_implementation({"": "sdpa"})
    assert model.encoder.attention_backend == "sdpa"
    with pytest.raises(ValueError, match="unknown attention backend"):
        model.set_attn_implementation("fastest")


# ---------------------------------------------------------------- ZeRO-3

TRAINING = """
import sys, torch
from families import TINY, tiny
from transformers import Trainer, TrainingArguments
from llava_packing_tower import batch_images_to_packing_input
from deepspeed.comm.torch import TorchBackend

# Else a C++ operation that only inference uses is built: that takes a compiler, and waits for a build that was killed.
TorchBackend.__init__.__globals__["build_shm_op"] = lambda: None
folder, name = sys.argv[1:]
config = {
    "train_micro_batch_size_per_gpu": 1, "train_batch_size": 1,
    "zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True},
}
arguments = TrainingArguments(
    folder, deepspeed=config, max_steps=1, save_steps=1, report_to=[], per_device_train_batch_size=1,
    remove_unused_columns=False, use_cpu=True,
)
model = tiny(name)
patch, layout = model.config.patch_size, model.patch_layout
rows, grid = batch_images_to_packing_input([torch.randn(3, 2 * patch, 3 * patch)], patch, layout)


class Encoders(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, **_):
        out = model(rows, grid)
        return (out if torch.is_tensor(out) else out[0]).square().mean()


Encoders(model, arguments, train_dataset=[{"x": 1}], data_collator=lambda items: {"x": torch.ones(1)}).train()
"""


@pytest.mark.skipif(transformers.__version__ < "5", reason="Trainer of transformers 4 leaves DeepSpeed out on a CPU")
def test_trainer_under_zero3_saves_whole_tensors(tmp_path):
    pytest.importorskip("deepspeed")
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(TRAINING))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    environment |= {"MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(Path(__file__).parents[1] / "helpers"), os.environ.get("PYTHONPATH", "")]
    )
    command = [sys.executable, str(script), str(tmp_path / "out"), "siglip2"]
    run = warm.execute(command, environment)
    assert run.returncode == 0, run.stderr[-3000:]
    model = tiny("siglip2")
    again = type(model).from_pretrained(tmp_path / "out/checkpoint-1")
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    assert not same(again, model.state_dict())
