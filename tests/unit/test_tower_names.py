"""Which tower a name means: the prefix, what a checkpoint noted, what the folder says, the words in the name."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from llava_packing_tower.checkpoint.hub import resolve_folder
from llava_packing_tower.integrations.llava.tower_builder import hooked, tower_class
from llava_packing_tower.towers import names
from llava_packing_tower.towers.names import tower_kind
from llava_packing_tower.towers.packing_tower import HEVCViTPackingVisionTower
from llava_packing_tower.train import launcher
from llava_packing_tower.utils.errors import UsageError

CLONE = "llava-packing-tower/checkpoints"  # a clone of this project: "packing" is in the name of a parent


@pytest.mark.parametrize(
    "name", ["checkpoints/large", "towers/llava_vit_large_packing", "x/aimv2-packing", "y/b_standard"]
)
def test_a_path_of_ours_that_is_not_here_is_no_question_to_the_hub(tmp_path, monkeypatch, name):
    asked = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshots(asked, cached="owner/a_packing"))
    for word in (name, f"packing:{name}"):
        with pytest.raises(ValueError, match=r"does not exist in .* hf download "):
            HEVCViTPackingVisionTower(word, SimpleNamespace(mm_vision_select_layer=-1))
    assert {options.get("local_files_only") for _, options in asked} == {True}


def test_other_names_go_to_the_hub_and_downloaded_ones_are_found(tmp_path, monkeypatch):
    asked = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshots(asked, cached="owner/a_packing"))
    assert resolve_folder("owner/a_packing") == tmp_path
    with pytest.raises(ValueError, match="neither a local folder nor a hub id"):
        resolve_folder("google/siglip2-so400m")
    assert asked[-1][0] == "google/siglip2-so400m" and "config.json" in asked[-1][1]["allow_patterns"]


def snapshots(asked, cached):
    """Stands in for ``snapshot_download``: one repository is there, and no network."""

    def snapshot_download(name, **options):
        asked.append((name, options))
        if name != cached:
            raise LocalEntryNotFoundError("no network")
        Path("model.safetensors").touch()
        return str(Path.cwd())

    return snapshot_download


def make_folder(root, name, model_type):
    folder = root / name
    folder.mkdir(parents=True)
    content = {} if model_type is None else {"model_type": model_type}
    (folder / "config.json").write_text(json.dumps(content))
    return str(folder)


@pytest.mark.parametrize(
    ("name", "model_type", "kind"),
    [
        ("my_tower", "siglip2_packing", "packing"),  # ours, whatever it is called
        ("clip-vit", "llava_vit_packing", "packing"),
        ("aimv2-large-packing", "aimv2", "packing"),  # published: by the folder's own name
        ("llava_vit_packing", "llava_vit", "packing"),
        ("hevc_vit_large", "llava_vit", "hevc_vit"),
        ("hevc_vit_large", "llava_vit_packing", "hevc_vit"),
        ("aimv2-large", "aimv2", None),
        (f"{CLONE}/aimv2-large", "aimv2", None),
        (f"{CLONE}/clip-vit-large-patch14-336", "clip_vision_model", None),
        ("clip_packing", "clip", None),
        ("hevc_vit/clip-vit", "clip", None),
        ("hevc_vit_clip", "clip_vision_model", None),
        ("x_packing", None, "packing"),  # a config.json that does not say: the name
    ],
)
def test_a_folder_is_what_its_config_says(tmp_path, name, model_type, kind):
    root = tmp_path / "any"  # pytest's own folders must not decide
    assert "packing" not in str(root).lower() and "hevc" not in str(root).lower()
    folder = make_folder(root, name, model_type)
    assert tower_kind(folder) == kind
    assert tower_kind(folder + "/") == kind
    assert tower_kind(f"packing:{folder}") == "packing"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("/nowhere/packing/llava_vit_large", "packing"),
        ("org/Model-PACKING", "packing"),
        ("/nowhere/hevc_vit/large", "hevc_vit"),
        ("openai/clip-vit-large-patch14-336", None),
        (None, None),
    ],
)
def test_with_nothing_to_look_at_the_name_decides(name, kind):
    assert tower_kind(name) == kind


def test_a_checkpoint_knows_its_tower_when_the_folder_is_gone():
    note = {"weights": "checkpoint", "config": {"model_type": "dinov3_packing"}}
    assert tower_kind("/gone/my_tower") is None and tower_kind("/gone/my_tower", note) == "packing"
    assert tower_kind("/gone/my_tower", {"config": {"model_type": "onevision_encoder"}}) == "hevc_vit"


def test_one_line_says_why_a_name_with_packing_is_not_ours(tmp_path, caplog):
    folder = make_folder(tmp_path, f"{CLONE}/clip", "clip_vision_model")
    with caplog.at_level(logging.INFO, names.logger.name):
        assert [tower_class(folder) for _ in range(3)] == [None] * 3
    assert len(caplog.records) == 1 and "clip_vision_model" in caplog.text


def test_llava_never_makes_a_random_clip_of_an_encoder_of_ours(tmp_path):
    built = hooked(lambda vision_tower_cfg, **kwargs: "LLaVA's own")
    folder = make_folder(tmp_path, "siglip2-so400m", "siglip2")
    with pytest.raises(ValueError, match=f"random weights. Write packing:{folder}"):
        built(type("Config", (), {"mm_vision_tower": folder}))
    clip = make_folder(tmp_path, "clip", "clip_vision_model")
    assert built(type("Config", (), {"mm_vision_tower": clip})) == "LLaVA's own"


def test_the_launcher_reads_the_folder(tmp_path, files):
    ours = make_folder(tmp_path, "my_tower", "siglip2_packing")
    plan = launcher.make_plan(files(mm_vision_tower=ours), num_processes=1)
    assert f"{ours} (packing tower)" in plan.describe()
    clip = make_folder(tmp_path, "clip", "clip_vision_model")
    assert f"{clip} (LLaVA's own)" in launcher.make_plan(files(mm_vision_tower=clip), num_processes=1).describe()
    with pytest.raises(UsageError, match="Write packing:"):
        launcher.make_plan(files(mm_vision_tower=make_folder(tmp_path, "dino", "dinov3_vit")), num_processes=1)
    (tmp_path / "clip" / "config.json").write_text("{")
    with pytest.raises(UsageError, match="not valid JSON"):
        launcher.make_plan(files(mm_vision_tower=clip), num_processes=1)
