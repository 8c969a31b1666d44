"""`llava-packing convert`: hub ids, --images, --device, named sizes; sources that are converted in memory."""

import os

import huggingface_hub
import numpy as np
import pytest
import torch
from conversions import packing_folder, same_bits, source_state_dict, standard_folder
from PIL import Image, ImageFile
from safetensors.torch import load_file

from llava_packing_tower import HEVCViTPackingVisionTower, LlavaViTPackingModel, create_model
from llava_packing_tower.cli.main import main
from llava_packing_tower.convert import pipeline, test_images
from llava_packing_tower.data.patches import batch_images_to_packing_input
from llava_packing_tower.integrations.llava import tower_builder
from llava_packing_tower.models.llava_vit.presets import ONEVISION, PRESETS, register_preset
from llava_packing_tower.models.llava_vit.standard import LlavaViTModel
from llava_packing_tower.towers.standard_tower import HEVCViTVisionTower


@pytest.fixture
def standard(tmp_path):
    return standard_folder(tmp_path / "standard", num_hidden_layers=1)


def convert(*args):
    return main(["convert", *map(str, args)])


# -------------------------------------------------------------------- hub ids


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A download cache as huggingface_hub keeps it, with one model; nothing else can be reached."""
    commit = "c" * 40
    model = tmp_path / "cache" / "models--lab--hevc-vit"
    standard_folder(model / "snapshots" / commit, num_hidden_layers=1)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return model / "snapshots" / commit


def test_a_hub_id_is_a_source_like_a_folder(hub, tmp_path):
    before = sorted(path for path in (tmp_path / "cache").rglob("*"))
    assert convert("lab/hevc-vit", "--no-verify") == 0  # into the working directory
    same_bits(packing_folder(hub, tmp_path / "expected"), tmp_path / "hevc-vit_packing")
    assert sorted(path for path in (tmp_path / "cache").rglob("*")) == before
    found = LlavaViTPackingModel.from_pretrained("lab/hevc-vit").state_dict()
    expected = load_file(tmp_path / "expected" / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_hub_id_that_cannot_be_reached(hub, tmp_path, capsys):
    assert convert("lab/other", "--no-verify") == 2
    assert "'lab/other' is neither a local folder nor a hub id that can be reached" in capsys.readouterr().err
    assert not list(tmp_path.glob("*packing*"))


# -------------------------------------------------------------------- --images, --device


@pytest.mark.usefixtures("small_pictures")
def test_the_users_own_photos(standard, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "photos"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for index, name in enumerate(("a.png", "b.JPG", "grey.bmp")):
        array = generator.integers(0, 255, (60 + 10 * index, 90, 3), dtype=np.uint8)
        Image.fromarray(array[..., 0] if name == "grey.bmp" else array).save(folder / name)
    (folder / "notes.txt").write_text("no photo")
    opened = []
    open_photo = test_images.open_photo
    monkeypatch.setattr(test_images, "open_photo", lambda file: opened.append(file.name) or open_photo(file))
    assert convert(standard, "--images", folder, "--output_dir", tmp_path / "out") == 0
    assert set(opened) == {"a.png", "b.JPG", "grey.bmp"}
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)  # lmms-eval sets it
    (folder / "a.png").write_bytes((folder / "a.png").read_bytes()[:300])
    assert convert(standard, "--images", folder, "--output_dir", tmp_path / "broken") == 2
    assert "a.png cannot be read as an image" in capsys.readouterr().err
    for empty in (tmp_path / "absent", tmp_path / "out"):
        assert convert(standard, "--images", empty, "--output_dir", tmp_path / "broken") == 2
        assert "not a folder, or no file in it ends in" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ["out", "photos", "standard"]


def test_without_any_photos_the_way_out_is_said(standard, tmp_path, monkeypatch, capsys):
    def missing(photo):
        raise FileNotFoundError

    monkeypatch.setattr(test_images, "source_of", missing)
    assert convert(standard, "--output_dir", tmp_path / "out") == 2
    assert "pip install scikit-learn" in (text := capsys.readouterr().err) and "--images" in text
    assert os.listdir(tmp_path) == ["standard"]


@pytest.mark.usefixtures("small_pictures")
def test_device(standard, tmp_path, monkeypatch, capsys):
    used = []
    from_weights = LlavaViTModel.from_weights.__func__

    def watch(cls, config, plan, files, dtype, device="cpu"):
        used.append(torch.device(device).type)
        return from_weights(cls, config, plan, files, dtype, "cpu")

    monkeypatch.setattr(LlavaViTModel, "from_weights", classmethod(watch))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device in ("auto", "cpu"):
        assert convert(standard, "--device", device, "--output_dir", tmp_path / device) == 0
    assert used == ["cpu", "cpu"]
    assert convert(standard, "--device", "cuda", "--output_dir", tmp_path / "out") == 2
    assert "this machine has no CUDA device" in capsys.readouterr().err
    assert convert(standard, "--device", "abacus", "--output_dir", tmp_path / "out") == 2
    assert "--device abacus" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pipeline.resolve_device("auto").type == "cuda"


# -------------------------------------------------------------------- named sizes


def test_a_training_checkpoint_of_a_named_size(tmp_path, capsys):
    """With its real sizes; the name says the number of heads, which the weights do not."""
    model = create_model("llava_vit_small_ln").bfloat16()
    torch.save({"state_dict": source_state_dict(model.state_dict())}, tmp_path / "backbone.pt")
    names = ("--model_name", "llava_vit_small_ln", "--target_model_name", "hf_llava_vit_packing_small_ln")
    assert convert(tmp_path / "backbone.pt", *names, "--no-verify") == 0
    assert "patch 16, width 384, layers 6, heads 6, MLP 1536" in capsys.readouterr().out
    found = LlavaViTPackingModel.from_pretrained(tmp_path / "backbone_hf_packing", dtype="auto")
    assert sum(parameter.numel() for parameter in found.parameters()) == 12_716_928
    assert found.dtype == torch.bfloat16
    assert torch.equal(found.patch_embed.proj.weight, model.embeddings.patch_embedding.weight)


def test_a_checkpoint_of_the_onevision_training_code(tmp_path, capsys):
    """``backbone.pt`` of ``training/checkpoint_utils.py``: the standard names, without a config.json."""
    model = create_model("ov_encoder_base", num_hidden_layers=1, intermediate_size=64)
    torch.save(model.state_dict(), tmp_path / "backbone.pt")
    assert convert(tmp_path / "backbone.pt", "--model_name", "ov_encoder_base", "--no-verify") == 2
    assert "num_hidden_layers: ov_encoder_base has 12, the checkpoint 1" in capsys.readouterr().err
    register_preset("ov_encoder_tiny", ONEVISION, num_attention_heads=12, image_size=224)
    try:
        assert convert(tmp_path / "backbone.pt", "--model_name", "ov_encoder_tiny", "--no-verify") == 0
        torch.save(source_state_dict(model.state_dict()), tmp_path / "old.pt")
        assert convert(tmp_path / "old.pt", "--model_name", "ov_encoder_tiny", "--no-verify") == 2
    finally:
        del PRESETS["ov_encoder_tiny"]
    assert "has the tensor names of a llava_vit_source" in capsys.readouterr().err
    found = LlavaViTPackingModel.from_pretrained(tmp_path / "backbone_packing")
    assert (found.config.num_attention_heads, found.config.image_size, found.config.layer_norm_eps) == (12, 224, 1e-6)
    assert torch.equal(found.patch_embed.proj.weight, model.embeddings.patch_embedding.weight)


# -------------------------------------------------------------------- in memory


@torch.no_grad()
def test_from_pretrained_converts_in_memory_and_says_so(standard, tmp_path, caplog):
    folder = packing_folder(standard, tmp_path / "packing")
    converted = LlavaViTPackingModel.from_pretrained(folder)
    assert "in memory" not in caplog.text
    direct = LlavaViTPackingModel.from_pretrained(standard)
    message = f"{standard}: a llava_vit checkpoint, converted to llava_vit_packing in memory"
    assert [record.getMessage() for record in caplog.records] == [message]
    rows, grid = batch_images_to_packing_input([torch.randn(3, 64, 96), torch.randn(3, 4, 32, 32)], 32)
    for left, right in zip(direct(rows, grid, return_dict=False)[:2], converted(rows, grid, return_dict=False)[:2]):
        assert torch.equal(left, right)


def test_nothing_loads_with_random_attention(standard):
    """The upstream fault: names that the class does not know were skipped, and the attention stayed random."""
    (standard / "config.json").write_text(
        (standard / "config.json").read_text().replace('"llava_vit"', '"llava_vit_packing"')
    )
    with pytest.raises(ValueError, match=r"5 missing, 9 unexpected"):
        LlavaViTPackingModel.from_pretrained(standard)
    with pytest.raises(ValueError, match=r"5 missing, 9 unexpected"):
        HEVCViTPackingVisionTower(str(standard), Args())


class Args:
    mm_vision_select_layer = -1


def test_the_hooks_hevc_vit_rule_is_the_standard_tower(standard):
    """A name with "hevc_vit" and without "packing" selects it, and it gives the packing tower's features."""
    rule = tower_builder.tower_class
    assert rule("lab/hevc_vit_large") is HEVCViTVisionTower
    assert rule("lab/hevc_vit_large_packing") is HEVCViTPackingVisionTower
    images = torch.randn(2, 3, 64, 96)
    left, right = HEVCViTVisionTower(str(standard), Args()), HEVCViTPackingVisionTower(str(standard), Args())
    assert torch.allclose(left(images), right(images), atol=2e-5)


def test_others_may_read_what_was_written(tmp_path, standard):
    """Temporary files are for their owner alone; on a shared cluster a checkpoint must not be."""
    umask = os.umask(0o027)
    try:
        model = LlavaViTModel.from_pretrained(standard)
        model.save_pretrained(tmp_path / "saved")
    finally:
        os.umask(umask)
    assert {f.stat().st_mode & 0o777 for f in (tmp_path / "saved").iterdir()} == {0o640}
    assert (tmp_path / "saved").stat().st_mode & 0o777 == 0o750
    convert(standard, "--output_dir", tmp_path / "converted", "--no-verify")
    assert {f.stat().st_mode & 0o077 for f in (tmp_path / "converted").iterdir()} == {0o077 & (0o666 & ~umask)}
