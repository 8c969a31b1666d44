"""`llava-packing convert` with corrupt or hostile files, full or locked disks: a message, a status, nothing left."""

import json
import os
import re
import resource
from pathlib import Path

import pytest
import torch
from conversions import change_weights, config_of, source_state_dict, standard_folder
from safetensors.torch import load_file, save_file

from llava_packing_tower.checkpoint.weights import WeightFiles
from llava_packing_tower.cli.main import main
from llava_packing_tower.convert import pipeline
from llava_packing_tower.convert.sources import read_source
from llava_packing_tower.models.llava_vit.config import LlavaViTConfig


@pytest.fixture
def standard(tmp_path):
    return standard_folder(tmp_path / "standard", num_hidden_layers=2)


@pytest.fixture
def refused(tmp_path, capsys):
    """Convert ``source`` and check that it is refused, with these words, and that nothing is left on the disk."""

    def check(source, *words, options=("--no-verify",), output=None):
        before = sorted(tmp_path.rglob("*"))
        status = main(["convert", str(source), "--output_dir", str(output or tmp_path / "out"), *options])
        text = capsys.readouterr().err
        assert "ERROR: " in text and "Traceback" not in text
        assert status == (1 if "was not written" in text else 2)  # the disk's fault, or the source's
        for word in words:
            assert word in text, (word, text)
        assert sorted(tmp_path.rglob("*")) == before

    return check


# -------------------------------------------------------------------- files


@pytest.mark.parametrize("keep", [0, 5, 1000, -1])
def test_truncated_weights(standard, refused, keep):
    file = standard / "model.safetensors"
    os.truncate(file, keep if keep >= 0 else file.stat().st_size + keep)
    refused(standard, f"cannot read {file}, it is damaged")


@pytest.mark.parametrize("old_format", [False, True])
def test_truncated_training_checkpoint(standard, refused, tmp_path, old_format):
    file = tmp_path / "backbone.pt"
    weights = source_state_dict(load_file(standard / "model.safetensors"))
    torch.save(weights, file, _use_new_zipfile_serialization=not old_format)
    os.truncate(file, file.stat().st_size // 2)
    refused(file, f"cannot read {file}, it is damaged", options=("--num_attention_heads", "2", "--no-verify"))


def test_a_header_that_claims_more_than_the_file_holds(standard, refused):
    file = standard / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes((2**40).to_bytes(8, "little") + content[8:])
    refused(standard, f"cannot read {file}, it is damaged")


class Code:
    """What a hostile pickle does: runs something while it is read."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self):
        return os.mkdir, (str(self.victim),)


@pytest.mark.parametrize("name", ["backbone.pt", "backbone.pth", "pytorch_model.bin"])
@pytest.mark.parametrize("old_format", [False, True])
def test_pickled_code_is_not_run(standard, refused, tmp_path, name, old_format):
    weights = load_file(standard / "model.safetensors")
    victim = tmp_path / "victim"
    if name.endswith(".bin"):
        (standard / "model.safetensors").unlink()
        file = source = standard / name
        source = standard
    else:
        file = source = tmp_path / name
    torch.save({**weights, "code": Code(victim)}, file, _use_new_zipfile_serialization=not old_format)
    refused(source, f"cannot read {file}, it is damaged, or holds more than tensors (code?)")
    assert not victim.exists()


def test_no_state_dict(refused, tmp_path):
    torch.save([1, 2], tmp_path / "list.pt")
    refused(tmp_path / "list.pt", "contains no state dict, found list")
    torch.save({"epoch": 3}, tmp_path / "empty.pt")
    refused(tmp_path / "empty.pt", "contains no tensors")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pt")
    refused(tmp_path / "other.pt", "is not a LlavaViT checkpoint", "first names: weight")
    refused(tmp_path / "absent.pt", "does not exist")
    refused(tmp_path / "absent", "does not exist")
    (tmp_path / "notes.txt").write_text("x")
    refused(tmp_path / "notes.txt", "weights end in .pt")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_infinity(standard, refused, value):
    def spoil(tensors):
        tensors["encoder.layers.1.self_attn.k_proj.weight"][3, 5] = value

    change_weights(standard, spoil)
    refused(standard, "1 of 12288 numbers of", "encoder.layers.1.self_attn.k_proj.weight", "are NaN or infinite")


def test_values_that_the_wanted_dtype_cannot_hold(standard, refused):
    change_weights(standard, lambda tensors: tensors["layernorm_pre.weight"].mul_(0).add_(1e5))
    refused(standard, "layernorm_pre.weight has values up to 1e+05", options=("--dtype", "float16", "--no-verify"))


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"model_type": 3}', '{"model_type": ["llava_vit"]}'])
def test_a_config_that_is_none(standard, refused, text):
    (standard / "config.json").write_text(text)
    refused(standard, "config")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("layer_norm_eps", "1e-6"),
        ("layer_norm_eps", -1e-6),
        ("layer_norm_eps", float("nan")),
        ("rope_theta", None),
        ("rope_theta", 0),
        ("image_size", 4.5),
        ("image_size", 0),
        ("use_head", "no"),
        ("num_attention_heads", True),
        ("num_hidden_layers", -1),
    ],
)
def test_config_values_that_cannot_be(standard, refused, field, value):
    (standard / "config.json").write_text(json.dumps({**config_of(standard), field: value}))
    refused(standard, f"{field} in its config is {value!r}")


def test_a_config_that_only_the_standard_model_cannot_use(standard, refused, monkeypatch):
    """Nothing that the result would hold: the verification finds it. (torch_dtype, to some transformers versions.)"""

    def from_dict(content):
        raise AttributeError("module 'torch' has no attribute 'float77'")

    monkeypatch.setattr(LlavaViTConfig, "from_dict", from_dict)
    refused(standard, "its config cannot be used: module 'torch' has no attribute 'float77'", options=())


@pytest.mark.parametrize(
    "content", [{"image_mean": "bright"}, {"size": {"side": 3}}, {"resample": 99}, {"image_std": [1, 2]}]
)
def test_an_image_processor_that_does_not_work(standard, refused, content):
    (standard / "preprocessor_config.json").write_text(json.dumps(content))
    refused(standard, "preprocessor_config.json describes no image processor")


def test_an_index_that_lies(standard, refused):
    tensors = load_file(standard / "model.safetensors")
    (standard / "model.safetensors").unlink()
    save_file(tensors, standard / "model-00001-of-00001.safetensors")
    index = {"weight_map": dict.fromkeys([*tensors, "encoder.more"], "model-00001-of-00001.safetensors")}
    (standard / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(standard, "says that encoder.more is in model-00001-of-00001.safetensors, but it is not")
    index["weight_map"].pop("encoder.more")
    index["weight_map"]["layernorm_pre.weight"] = "model-00002-of-00002.safetensors"
    (standard / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(standard, "cannot read", "model-00002-of-00002.safetensors")


# -------------------------------------------------------------------- disks


def test_a_folder_that_cannot_be_written(standard, refused, tmp_path):
    """Nobody, not even root, may make files in /sys; for other users a folder without the right to write is there."""
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(0o555)
    if os.access(locked, os.W_OK):
        locked = Path("/sys")
    for output in (locked / "out", locked / "more" / "out"):
        refused(standard, f"{output} was not written" if locked == Path("/sys") else "cannot be written", output=output)


def test_an_output_that_is_a_file(standard, refused, tmp_path):
    (tmp_path / "out").write_text("mine")
    refused(standard, "exists and is not a folder")
    assert (tmp_path / "out").read_text() == "mine"
    refused(standard, "cannot be written", output=tmp_path / "out" / "deeper")


def test_a_disk_without_room(standard, refused, tmp_path, monkeypatch):
    class Usage:
        free = 1.8e6

    monkeypatch.setattr(pipeline.shutil, "disk_usage", lambda folder: Usage)
    refused(standard, "2.3 MB (the result, and a temporary copy for the verification)", "1.8 MB free", options=())
    assert main(["convert", str(standard), "--output_dir", str(tmp_path / "one"), "--no-verify"]) == 0
    Usage.free = 1.0e6
    refused(standard, "it needs 1.1 MB, the disk has 1.0 MB free")


def test_a_disk_that_fills_up_while_writing(standard, refused, tmp_path):
    """The system refuses the bytes behind the first 100000 of a file, after some tensors have been written."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        refused(standard, f"{tmp_path / 'a' / 'b' / 'out'} was not written", output=tmp_path / "a" / "b" / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_an_interrupted_conversion_leaves_nothing(standard, tmp_path, monkeypatch):
    def interrupt(*args):
        assert len(list(tmp_path.glob(".out.*/out/model.safetensors"))) == 1  # all of it written, under another name
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "verify_conversion", interrupt)
    with pytest.raises(KeyboardInterrupt):
        main(["convert", str(standard), "--output_dir", str(tmp_path / "out")])
    assert os.listdir(tmp_path) == ["standard"]


# -------------------------------------------------------------------- memory


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux to measure peak memory")
def test_tensors_are_streamed(tmp_path, monkeypatch):
    """Memory grows by a few tensors, not by the 100 MB of the model (let alone by copies of it)."""
    sizes = dict(hidden_size=512, intermediate_size=2048, num_hidden_layers=7, num_attention_heads=8)
    source = standard_folder(tmp_path / "standard", **sizes)
    monkeypatch.setattr(WeightFiles, "RELEASE_BYTES", 8_000_000)
    assert main(["convert", str(source), "--output_dir", str(tmp_path / "warm"), "--no-verify"]) == 0

    def memory(which):
        return int(re.search(rf"{which}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

    Path("/proc/self/clear_refs").write_text("5")  # the peak starts at the present value
    before = memory("VmRSS")
    assert main(["convert", str(source), "--output_dir", str(tmp_path / "out"), "--no-verify"]) == 0
    assert (tmp_path / "out" / "model.safetensors").stat().st_size > 100e6
    assert memory("VmHWM") - before < 50e6


@pytest.mark.parametrize(
    ("names", "whose"),
    [
        (("cls_token", "storage_tokens", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight"), "DINOv3"),
        (("blocks.0.attn.qkv.bias_mask", "patch_embed.proj.weight"), "DINOv3"),
        (("reg_token", "blocks.3.gamma_1", "patch_embed.proj.weight"), "timm's DINOv3"),
        (("preprocessor.patchifier.proj.weight", "trunk.blocks.0.attn.qkv.weight"), "Apple's own file of AIMv2"),
        (("embeds.proj.weight", "blocks.0.attn.qkv.weight"), "timm's SigLIP2"),
        (("params/img/embedding/kernel",), "Google's own file of SigLIP2"),
    ],
)
def test_a_part_of_the_weights_of_a_supported_family_is_called_by_its_name(tmp_path, names, whose):
    torch.save({name: torch.zeros(2, 2) for name in names}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"looks like .*, but has no tensors named") as caught:
        read_source(str(tmp_path / "weights.pth"))
    assert whose in str(caught.value) and "weights.pth" in str(caught.value)
