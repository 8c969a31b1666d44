"""Weight files as they lie on disks: wrapped, in capitals, not downloaded; and timm's folders that say less."""

import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from llava_packing_tower import DINOv3ViTPacking, HEVCViTPackingVisionTower, Siglip2NaflexPacking
from llava_packing_tower.checkpoint.opening import open_checkpoint

FOLDERS = ("dinov3_timm", "siglip2_timm", "aimv2_timm", "pe_core_timm")


@pytest.fixture(scope="module")
def meta(golden):
    return torch.load(golden / "authors" / "dinov3_meta.pth", weights_only=True)


@pytest.mark.parametrize("key", ["model", "state_dict", "teacher", "model_state_dict", "ema"])
def test_a_state_dict_under_any_one_key(meta, tmp_path, key, caplog):
    torch.save({key: meta, "epoch": 3, "optimizer": {"param_groups": []}}, tmp_path / "wrapped.pth")
    assert open_checkpoint(tmp_path / "wrapped.pth").files.shapes().keys() == meta.keys()


def test_several_state_dicts_are_refused(meta, tmp_path):
    torch.save({"teacher": meta, "student": meta}, tmp_path / "two.pth")
    with pytest.raises(ValueError, match=re.escape("holds 2 models, teacher, student: save the one that is meant")):
        open_checkpoint(tmp_path / "two.pth")


def test_suffixes_in_capitals(golden, tmp_path):
    for name, found in (("dinov3_meta.pth", "A.PTH"), ("siglip2_big_vision.npz", "B.NPZ")):
        shutil.copy(golden / "authors" / name, tmp_path / found)
    shutil.copy(golden / "authors" / "dinov3_timm" / "model.safetensors", tmp_path / "C.SafeTensors")
    for name, kind in (("A.PTH", "dinov3_meta"), ("B.NPZ", "siglip2_big_vision"), ("C.SafeTensors", "dinov3_timm")):
        assert open_checkpoint(tmp_path / name).raw["model_type"] == kind


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors", "weights.npz"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
            "a pointer of Git LFS",
        ),
        (b"\n<!DOCTYPE html><html></html>", "it is a web page, not weights"),
        (b"", "it is damaged: empty"),
    ],
)
def test_what_was_downloaded_in_place_of_weights(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"cannot read .*{re.escape(name)}, .*{words}"):
        open_checkpoint(tmp_path / name)


def test_more_arrays_than_those_of_the_images(golden, tmp_path):
    """Google's files have the tower for text beside it; a strange array of images is refused."""
    with np.load(golden / "authors" / "siglip2_big_vision.npz") as saved:
        arrays = dict(saved)
    step = {"params/txt/Encoder_0/kernel": np.zeros((2, 3), np.float32), "params/t": np.zeros(1, np.float32)}
    np.savez(tmp_path / "whole.npz", **{**arrays, **step})
    exact = Siglip2NaflexPacking.from_pretrained(golden / "authors" / "siglip2_big_vision.npz").state_dict()
    found = Siglip2NaflexPacking.from_pretrained(tmp_path / "whole.npz").state_dict()
    assert all(torch.equal(found[name], exact[name]) for name in exact)
    np.savez(tmp_path / "strange.npz", **arrays, **{"params/img/strange": np.zeros(3, np.float32)})
    with pytest.raises(ValueError, match=r"1 unexpected\n  unexpected: .*strange"):
        Siglip2NaflexPacking.from_pretrained(tmp_path / "strange.npz")


@pytest.mark.parametrize("said", [None, {}, "dinov3"])
@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_of_timm_without_pretrained_cfg(golden, tmp_path, name, said):
    """The family's own pixels are taken; what is no mapping is refused by name."""
    folder = shutil.copytree(golden / "authors" / name, tmp_path / name)
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, "pretrained_cfg": said}))
    args = SimpleNamespace(mm_vision_select_layer=-1)
    if not said:
        tower = HEVCViTPackingVisionTower(f"packing:{folder}", args)
        assert len(tower.image_processor.image_mean) == 3 and tower.hidden_size == 48
        return
    with pytest.raises(ValueError, match=r"pretrained_cfg of timm's config\.json must be a mapping, got 'dinov3'"):
        HEVCViTPackingVisionTower(f"packing:{folder}", args)


def test_a_file_of_meta_in_a_folder_is_named(golden, tmp_path):
    shutil.copy(golden / "authors" / "dinov3_meta.pth", tmp_path / "dinov3_vits16_pretrain_lvd1689m.pth")
    with pytest.raises(ValueError, match=r"it has dinov3_vits16_pretrain_lvd1689m\.pth: give the file itself"):
        DINOv3ViTPacking.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "name", ["https://huggingface.co/timm/vit_small", "hf-hub:timm/vit_small", "hf://timm/vit_small"]
)
def test_an_address_in_place_of_a_hub_id(name):
    with pytest.raises(ValueError, match=f"'{name}' is an address: give the hub id alone"):
        DINOv3ViTPacking.from_pretrained(name)
