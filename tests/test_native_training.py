"""Training at native resolution through the launcher, on the real hosts, and the checkpoint in a new process."""

from __future__ import annotations

import json

import pytest
import yaml
from host_runs import NEXT, make_workspace, reload, report, train

from llava_packing_tower.cli import UsageError
from llava_packing_tower.launch import make_plan

HOSTS = [
    pytest.param("", id="llava_v1"),
    pytest.param(
        NEXT,
        id="llava_next",
        marks=[pytest.mark.next, pytest.mark.skipif(not NEXT, reason="LLAVA_NEXT_DIR is not set")],
    ),
]
OPTIONS = {
    "image_aspect_ratio": "native",
    "mm_projector_type": "spatial_merge",
    "mm_patch_merge_type": "spatial_unpad",
    "mm_packing_min_patches": 8,
    "mm_packing_max_patches": 40,
    # The workspace's data: seven photos of 60 x 90 to 114 x 60 pixels (height x width), and a sample of text.
    "per_device_train_batch_size": 3,
    "max_steps": 2,
    "learning_rate": 1e-4,
}


@pytest.mark.parametrize("next_dir", HOSTS)
def test_train_save_reload_generate(tmp_path, next_dir):
    config = make_workspace(tmp_path)
    content = {**yaml.safe_load(config.read_text()), **OPTIONS}
    content.pop("mm_vision_tower_lr")
    config.write_text(yaml.safe_dump(content))
    output = tmp_path / "llava_llama_packing_native"
    printed = train(config, output, next_dir, processes=1)
    assert "step 2/2" in printed
    saved = json.loads((output / "config.json").read_text())
    assert saved["image_aspect_ratio"] == "native" and saved["mm_projector_type"] == "spatial_merge"
    kept = {key: value for key, value in saved.items() if key.startswith("mm_packing_") and key != "mm_packing_config"}
    assert kept == {
        "mm_packing_min_patches": 8,
        "mm_packing_max_patches": 40,
        "mm_packing_video": "clip",
        "mm_packing_video_max_patches": None,
    }
    result = report(reload(output, tmp_path, next_dir))
    assert result["answer"] == result["without cache"]
    assert result["tensors"] == json.loads((output / "packing_tower.json").read_text())["tensors"]


@pytest.mark.parametrize(
    "options, words",
    [
        ({"mm_packing_max_patches": 9}, "has no effect without image_aspect_ratio: native"),
        ({"image_aspect_ratio": "native", "mm_packing_max_patches": 3, "mm_packing_min_patches": 4}, "4 is more than"),
        ({"image_aspect_ratio": "native", "mm_packing_video": "slides"}, "clip, frames"),
        ({"image_aspect_ratio": "native", "mm_packing_min_patches": "few"}, "expected a whole number"),
        ({"image_aspect_ratio": "native", "mm_projector_type": "pooler"}, "does not work on images of any size"),
    ],
)
def test_the_launcher_refuses(tmp_path, options, words, monkeypatch):
    monkeypatch.delenv("LLAVA_NEXT_DIR", raising=False)
    names = {"vision_tower": "packing:x/y", "model_name_or_path": "x/y", "data_path": str(tmp_path), "output_dir": "o"}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({**names, **options}))
    with pytest.raises(UsageError, match=words):
        make_plan(config)
