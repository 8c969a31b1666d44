"""The token report: what a dataset costs, and what is wrong with it, before the first step."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from native_data_checks import turns, write_video
from PIL import Image

from llava_packing_tower import PackingImageProcessor
from llava_packing_tower.data.native_config import NativeSettings
from llava_packing_tower.data.native_image_processor import NativeImageProcessor
from llava_packing_tower.data.samples import check_places, spread_indices
from llava_packing_tower.data.smart_resize import SmartResize
from llava_packing_tower.multimodal.dataset_report import MEASURED, measure
from llava_packing_tower.multimodal.visual_tokens import TokenLayout, arrange, token_count

TOKEN = -200


def to_ids(sample, index):
    """A word is a token."""
    words = " ".join(turn["value"] for turn in sample["conversations"]).split()
    return [TOKEN if word == "<image>" else 1 for word in words]


def processor(merge=(1, 1), least=4, most=40, together=None):
    rule = SmartResize(14, merge, least, most)
    return NativeImageProcessor(PackingImageProcessor(size=56), rule, NativeSettings(least, most, "clip", together))


@pytest.fixture
def folder(tmp_path):
    for name, size in {"kept.png": (60, 30), "tiny.png": (5, 5), "huge.png": (4000, 3000)}.items():
        Image.fromarray(np.zeros((size[1], size[0], 3), np.uint8)).save(tmp_path / name)
    (tmp_path / "broken.png").write_bytes(b"no photo")
    write_video(tmp_path / "clip.mp4", 9)
    return str(tmp_path)


def sample(text, **media):
    return {"conversations": turns(text), **media}


def test_counts(folder):
    samples = [
        sample("<image> what", image="kept.png"),
        sample("one <image> two <image>", image=["tiny.png", "huge.png"]),
        sample("words alone"),
        sample("<image> then", video="clip.mp4"),
        sample("<image> gone", image="broken.png"),
    ]
    folders = {"image": folder, "video": folder}
    layout = TokenLayout(True, "spatial_unpad", "frame")
    report = measure(samples, processor(), layout, to_ids, TOKEN, 40, folders, {"wanted_fps": 2})
    # kept: 60 x 30 is 4 x 2 patches; tiny: 2 x 2 of its 1 x 1; huge: 7 x 5; the clip: 5 frames of 48 x 64, 3 x 5.
    assert report.patches == [8, 4, 35, 15]
    assert report.tokens == [8 + 2, 4 + 2, 35 + 5, 5 * (2 * 3) + 5]
    assert report.lengths == [2 + 10, 3 + 6 + 40, 3, 2 + 35]
    assert (report.reduced, report.enlarged) == (1, 1)
    assert report.cut == (1, 1 + 6 + 1 + 40 - 40) and report.unreadable == ["broken.png"]
    text = "\n".join(report.lines())
    assert "5 samples, 4 images and videos" in text and "4 to 35, median 15, 62 in all" in text
    assert "2 kept (to whole patches), 1 reduced, 1 enlarged" in text
    assert "over mm_packing_max_patches: 1 images, most of all " in text and "huge.png to 1/" in text
    assert "model_max_length 40: 1 are longer" in text
    assert any("1 of 5 samples are longer" in w and "8 visual tokens" in w for w in report.warnings())
    assert any("broken.png" in w for w in report.warnings())


def test_nothing_to_warn_about(folder):
    report = measure([sample("words")], processor(), TokenLayout(True), to_ids, TOKEN, 40, {}, None)
    assert report.warnings() == [] and len(report.lines()) == 2


def test_a_large_dataset_is_sampled_evenly():
    assert spread_indices(5, 10) == [0, 1, 2, 3, 4]
    spread = spread_indices(10 * MEASURED + 7, MEASURED)
    assert len(spread) == MEASURED == len(set(spread)) and spread[-1] > 9.9 * MEASURED


def test_samples_that_do_not_fit_together_are_named():
    good = [sample("<image>", image="a"), sample("none", image="a"), sample("<image> <image>", image=["a", "b"])]
    check_places([*good, sample("<image>", video="v"), sample("text")], True)
    bad = [sample("<image> <image>", image="a", id="x7"), sample("<image>"), sample("<image>", image=["a", "b"])]
    with pytest.raises(ValueError, match=r"3 of 6 samples .*\n  sample x7: 1 images, 2 <image>\n  sample 4: 0 images"):
        check_places([*good, *bad], True)
    with pytest.raises(ValueError, match=r"1 of 4 .*reads no videos"):
        check_places([*good, sample("<image>", video="v")], False)


@pytest.mark.parametrize("merge", ["flat", "spatial", "spatial_unpad"])
@pytest.mark.parametrize("position", ["grid", "frame", "one_token", "no_token"])
def test_counted_tokens_are_made_tokens(merge, position):
    for mode in ("average", "max", "bilinear"):
        for stride in (1, 2, 3):
            layout = TokenLayout(True, merge, position, stride, mode)
            for grid in ((1, 1, 1), (3, 3, 5), (2, 1, 4), (1, 4, 2)):
                for is_video in (False, True) if grid[0] == 1 else (True,):
                    made = arrange(torch.zeros(grid[0] * grid[1] * grid[2], 2), grid, is_video, layout, torch.zeros(2))
                    assert len(made) == token_count(grid, is_video, layout), (layout, grid, is_video)


def test_settings_of_the_report_are_those_of_the_model():
    from llava_packing_tower.integrations.llava.native_resolution import token_layout

    settings = NativeSettings(1, 9, "frames")
    arguments = SimpleNamespace(mm_patch_merge_type="spatial_unpad", mm_newline_position="frame")
    assert token_layout(arguments, settings) == TokenLayout(False, "spatial_unpad", "frame", 2, "bilinear")
