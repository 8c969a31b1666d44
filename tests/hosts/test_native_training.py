"""Training at native resolution through the launcher, on the real hosts, and the checkpoint in a new process."""

from __future__ import annotations

import json

import pytest
import yaml
from host_runs import HOSTS
from native_data_checks import write_video
from native_runs import make_workspace, reload, train
from PIL import Image

from llava_packing_tower.train.launcher import make_plan
from llava_packing_tower.utils.errors import UsageError

OPTIONS = {
    "mm_projector_type": "spatial_merge",
    "mm_patch_merge_type": "spatial_unpad",
    "mm_packing_min_patches": 8,
    "mm_packing_max_patches": 40,
}


@pytest.mark.long  # the demo trains at native resolution, saves, reloads and answers too
@pytest.mark.parametrize("next_dir", HOSTS)
def test_train_save_reload_generate(tmp_path, next_dir):
    printed = train(make_workspace(tmp_path, **OPTIONS), next_dir)
    assert "step 2/2" in printed and "native resolution: 8 samples, 7 images and videos" in printed
    output = tmp_path / "llava_llama_packing_native"
    saved = json.loads((output / "config.json").read_text())
    assert saved["image_aspect_ratio"] == "native" and saved["mm_projector_type"] == "spatial_merge"
    names = ("min_patches", "max_patches", "video", "video_max_patches")
    assert [saved[f"mm_packing_{name}"] for name in names] == [8, 40, "clip", None]
    result = reload(output, [tmp_path / "0.png", tmp_path / "6.png"], next_dir)
    assert result["shapes"] == [[3, 56, 84], [3, 112, 56]]  # of 60 x 90 and 114 x 60 pixels (height x width)
    assert result["answers"] == result["without cache"]
    assert result["tensors"] == json.loads((output / "packing_tower.json").read_text())["tensors"]


@pytest.mark.long  # test_odd_images.py reads them, test_left_out_training.py trains beside what cannot be read
@pytest.mark.parametrize("next_dir", HOSTS)
def test_odd_inputs_do_not_stop_a_run(tmp_path, next_dir):
    """Every sample is drawn once. For LLaVA-NeXT a video of one frame too, and one that cannot be read: left out."""
    photos = {"line.png": ("RGB", (1, 200)), "panorama.jpg": ("L", (1000, 100)), "large.jpg": ("RGB", (4000, 3000))}
    videos = {"clip.mp4": 9, "one.mp4": 1} if next_dir else {}
    options = {"max_steps": 5 if next_dir else 4, "mm_packing_max_patches": 40, "mm_packing_min_patches": 1}
    config = make_workspace(tmp_path, **options, **({"video_folder": str(tmp_path)} if next_dir else {}))
    samples = json.loads((tmp_path / "data.json").read_text())
    for name, (mode, size) in photos.items():
        Image.new(mode, size, 90).save(tmp_path / name)
        samples.append({**samples[0], "id": name, "image": name})
    for name, frames in videos.items():
        write_video(tmp_path / name, frames)
    (tmp_path / "corrupt.mp4").write_bytes(b"no video")
    talk = samples[0]["conversations"]
    if next_dir:
        samples += [{"id": name, "video": name, "conversations": talk} for name in (*videos, "corrupt.mp4")]
    (tmp_path / "data.json").write_text(json.dumps(samples))
    printed = train(config, next_dir)
    steps, count = options["max_steps"], len(samples)
    readable = count - 1 - (1 if next_dir else 0)  # one is text alone
    assert count <= 3 * steps and f"step {steps}/{steps}" in printed
    assert f"native resolution: {count} samples, {readable} images and videos" in printed
    assert ("corrupt.mp4 cannot be read as a video" in printed) == bool(next_dir)
    assert "nan" not in printed.lower()


@pytest.mark.parametrize(
    "options, words",
    [
        ({"mm_packing_max_patches": 9}, "has no effect without image_aspect_ratio: native"),
        ({"image_aspect_ratio": "native", "mm_packing_max_patches": 3, "mm_packing_min_patches": 4}, "4 is larger"),
        ({"image_aspect_ratio": "native", "mm_packing_video": "slides"}, "clip, frames"),
        ({"image_aspect_ratio": "native", "mm_packing_min_patches": "few"}, "expected an integer"),
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
