"""The patches of a video in which something happens: what is kept, where it stands, and what is refused."""

import json
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from clips import SIZE, place, write_clip
from PIL import Image

from llava_packing_tower.data import codec
from llava_packing_tower.data.codec import CodecClip, codec_clip, mosaic_side, places_of
from llava_packing_tower.data.images import UnreadableImage
from llava_packing_tower.data.placed_samples import (
    mark_datasets,
    read_array,
    refuse_positions,
    selector_of,
    square_side,
)
from llava_packing_tower.data.video import read_clip

pytest.importorskip("av")
PATCH, BUDGET = 14, 8 * 18 * 18


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    write_clip(folder / "still.mp4")
    write_clip(folder / "grain.mp4", grain=6)
    write_clip(folder / "mpeg4.mp4", codec="mpeg4")
    write_clip(folder / "short.mp4", frames=5)
    return folder


def cells(number, rows, columns, width=448, height=256):
    """Rows and columns of the patches that hold the thing in a frame."""
    top, left = place(number)
    inside = range(1, SIZE, 4)
    return {((top + y) * rows // height, (left + x) * columns // width) for y in inside for x in inside}


def covered(positions, frames, total, offset):
    """In which part of the frames that are looked at all patches of the thing are there."""
    there = {tuple(map(int, position)) for position in positions}
    found = 0
    for number in frames:
        time = int(places_of(np.array([number]), total)[0])
        found += all((time, row + offset, column) in there for row, column in cells(number, 10, 18))
    return found / len(frames)


@pytest.mark.parametrize(("name", "least"), [("still", 1), ("grain", 0.9), ("mpeg4", 0.95)])
def test_at_an_equal_budget_the_kept_patches_cover_what_moves_and_uniform_frames_do_not(clips, name, least):
    """A clip of 128 frames, 2592 patches: 22 % of those of the 64 frames that are looked at, or 8 whole frames."""
    file = str(clips / f"{name}.mp4")
    clip = codec_clip(file, PATCH, BUDGET)
    assert clip.mosaics.shape == (8, 18 * PATCH, 18 * PATCH, 3) and clip.positions.shape == (BUDGET, 3)
    assert (clip.total, len(clip.indices), clip.fps) == (128, 64, 16.0)
    assert covered(clip.positions, clip.indices, clip.total, 4) >= least

    uniform = read_clip(file, upbound=8, force=True)
    rows, columns = (part.ravel() for part in np.mgrid[:18, :18])
    times = places_of(np.array(uniform.indices), uniform.total)
    patches = np.concatenate([np.stack([np.full(324, time), rows, columns], axis=1) for time in times])
    assert len(patches) == len(clip.positions)
    assert covered(patches, clip.indices, clip.total, 4) <= 8 / 64


def test_patches_show_what_stands_at_their_positions(clips):
    """Each patch of the mosaics is that of the frame, resized, at its row and column; the first frame is all there."""
    clip = codec_clip(str(clips / "still.mp4"), PATCH, BUDGET)
    assert len({tuple(position) for position in clip.positions.tolist()}) == BUDGET
    frames = read_clip(str(clips / "still.mp4"), upbound=64, force=True)
    assert frames.indices == clip.indices
    side = 18
    grid = clip.positions.reshape(8, side, side, 3)
    times = places_of(np.array(clip.indices), 128)
    assert set(clip.positions[:, 0]) <= set(times) and {0.0, 63.0} <= set(times)
    first = {(int(row), int(column)) for time, row, column in clip.positions if time == 0}
    assert first == {(row, column) for row in range(4, 14) for column in range(18)}
    sizes = (18 * PATCH, 10 * PATCH)
    pictures = [np.asarray(Image.fromarray(f).resize(sizes, Image.Resampling.BICUBIC)) for f in frames.frames]
    for mosaic, row, column in ((0, 0, 0), (3, 7, 11), (7, 17, 17), (5, 2, 16)):
        time, y, x = grid[mosaic, row, column]
        shown = clip.mosaics[mosaic, row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH]
        number = int(np.flatnonzero(times == time)[0])
        top, left = (int(y) - 4) * PATCH, int(x) * PATCH
        assert np.abs(shown.astype(int) - pictures[number][top : top + PATCH, left : left + PATCH]).max() <= 2


def test_neighbors_that_a_projector_merges_are_neighbors_in_the_video(clips):
    clip = codec_clip(str(clips / "grain.mp4"), PATCH, BUDGET)
    blocks = clip.positions.reshape(8, 9, 2, 9, 2, 3)
    assert (blocks[:, :, 1] - blocks[:, :, 0] == (0, 1, 0)).all()
    assert (blocks[..., 1, :] - blocks[..., 0, :] == (0, 0, 1)).all()
    assert (blocks[:, :, 0, :, 0, 1:] % 2 == 0).all()


def test_motion_alone_draws_the_patches(clips, monkeypatch):
    """Without a change of brightness the vectors decide; without vectors (mpeg4 has them too) the change does."""
    rows, columns = 4, 6
    names = ("w", "h", "dst_x", "dst_y", "motion_x", "motion_y", "motion_scale")
    dtype = [(name, "i4") for name in names]
    still = [(16, 16, x, y, 40, 0, 4) for x in range(8, 96, 16) for y in range(8, 64, 16)]
    vectors = np.array([*still, (16, 16, 70, 40, -40, 12, 4)], dtype)  # a panning camera, and one thing
    found = codec._motion(vectors, SimpleNamespace(width=96, height=64), rows, columns)
    assert found.shape == (2, 3) and np.flatnonzero(found).tolist() == [1 * 3 + 2]
    assert not codec._motion(None, SimpleNamespace(width=96, height=64), rows, columns).any()
    pixels = np.zeros((3, 4 * 8, 6 * 8, 3), np.uint8)
    pixels[1, :16, 16:32] = 200
    scores = codec._scores(pixels, np.zeros((3, 2, 3)), np.array([900.0, 50.0, 60.0]), 8)
    assert np.argwhere(scores > 0).tolist() == [[1, 0, 1], [2, 0, 1]] and scores[2, 0, 1] > scores[1, 0, 1]


def test_a_clip_with_fewer_patches_than_the_budget(clips):
    """5 frames of 10 x 18 patches fill 8 mosaics of 10 x 10, and stand where they were in the video."""
    clip = codec_clip(str(clips / "short.mp4"), PATCH, BUDGET)
    assert clip.indices == [0, 1, 2, 3, 4] and clip.mosaics.shape[0] == 8
    assert len(clip.positions) <= 5 * 10 * 18 and set(clip.positions[:, 0]) <= {0, 16, 32, 47, 63}


@pytest.mark.parametrize(
    ("budget", "candidates", "side"), [(10368, 10**6, 36), (10367, 10**6, 34), (10368, 800, 10), (32, 10**6, 2)]
)
def test_the_side_of_a_mosaic(budget, candidates, side):
    assert mosaic_side(budget, candidates) == side


def test_what_is_refused(clips, tmp_path, monkeypatch):
    (tmp_path / "torn.mp4").write_bytes((clips / "still.mp4").read_bytes()[:3000])
    with pytest.raises(UnreadableImage, match=r"torn\.mp4"):
        codec_clip(str(tmp_path / "torn.mp4"), PATCH, BUDGET)
    with pytest.raises(ValueError, match="31 patches for a video are fewer than 8 blocks of 2 x 2"):
        codec_clip(str(clips / "still.mp4"), PATCH, 31)
    with pytest.raises(ValueError, match="must be a file or one of codec, codec-video-prep, got 'h264'"):
        codec_clip(str(clips / "still.mp4"), PATCH, BUDGET, "h264")
    monkeypatch.setattr(codec, "find_spec", lambda name: None)
    for selector, package in (("codec", "av"), ("codec-video-prep", "codec-video-prep")):
        with pytest.raises(ValueError, match=f"pip install {package}"):
            codec_clip(str(clips / "still.mp4"), PATCH, BUDGET, selector)


def test_codec_video_prep(clips, tmp_path, monkeypatch):
    """Its canvases and positions, as version 0.2.5 writes them; canvases that only fill up are left out."""
    seen = {}

    def run_preinfer(video, out_dir, **options):
        seen.update(options, video=video)
        names = [f"canvas_{n}.png" for n in range(3)]
        for number, name in enumerate(names):
            Image.new("RGB", (56, 14), (number, 0, 0)).save(f"{out_dir}/{name}")
        positions = np.stack([np.repeat([0, 99, -1], 4), np.tile([0, 0, 1, 1], 3), np.tile([0, 1, 0, 1], 3)], axis=1)
        np.save(f"{out_dir}/src_patch_position.npy", positions if video != "few.mp4" else positions[:5])
        return SimpleNamespace(canvas_files=names, summary={"total_frames": 199, "fps": 25.0})

    package = ModuleType("codec_video_prep")
    package.run_preinfer = run_preinfer
    monkeypatch.setitem(sys.modules, "codec_video_prep", package)
    monkeypatch.setattr(codec, "find_spec", lambda name: True)
    monkeypatch.setattr(codec.shutil, "which", lambda program: None)
    with pytest.raises(ValueError, match="needs the program ffprobe"):
        codec_clip(str(clips / "still.mp4"), PATCH, BUDGET, "codec-video-prep")
    monkeypatch.setattr(codec.shutil, "which", lambda program: "/usr/bin/ffprobe")
    clip = codec_clip(str(clips / "still.mp4"), PATCH, 8 * 36 * 36, "codec-video-prep")
    assert isinstance(clip, CodecClip) and clip.mosaics.shape == (2, 14, 56, 3) and clip.fps == 25.0
    assert clip.positions[:, 0].tolist() == [0] * 4 + [32] * 4 and clip.indices == [0, 99]
    assert (seen["patch"], seen["images_per_group"], seen["max_pixels"]) == (14, 8, (36 * 14) ** 2)
    monkeypatch.setattr(codec, "check_video", lambda file: None)
    with pytest.raises(UnreadableImage, match="3 canvases of 4 patches, but 5 positions"):
        codec_clip("few.mp4", PATCH, BUDGET, "codec-video-prep")


# ---------------------------------------------------------------- samples


def test_a_selector_needs_a_video():
    assert selector_of({"video": "a.mp4", "positions_thw": "codec"}) == "codec"
    assert selector_of({"video": "a.mp4", "positions_thw": "a.npy"}) is None and selector_of({"image": "a.png"}) is None
    for sample in ({"id": 7, "image": ["a.png"], "positions_thw": "codec"}, {"id": 7, "positions_thw": "codec"}):
        with pytest.raises(ValueError, match="sample 7: positions_thw 'codec' needs a video file"):
            selector_of(sample)


def test_the_side_of_published_mosaics():
    assert square_side(8 * 36 * 36, 8) == 36
    assert [square_side(*numbers) for numbers in ((10, 2), (9, 2), (0, 3), (8, 0))] == [None] * 4


def test_a_dataset_of_a_yaml_says_codec_for_its_videos(tmp_path):
    own = [
        {"id": 1, "video": "a.mp4"},
        {"id": 2, "image": "a.png"},
        {"id": 3, "video": "b.mp4", "positions_thw": "b.npy"},
    ]
    other = [{"id": 4, "video": "a.mp4"}]
    for name, samples in (("own", own), ("other", other)):
        (tmp_path / f"{name}.json").write_text(json.dumps(samples))
    listed = [
        {"json_path": str(tmp_path / "own.json"), "positions_thw": "codec"},
        {"json_path": str(tmp_path / "other.json")},
    ]
    (tmp_path / "data.yaml").write_text(json.dumps({"datasets": listed}))
    samples = [dict(sample) for sample in (*own, *other)]
    mark_datasets(str(tmp_path / "data.yaml"), samples)
    assert [sample.get("positions_thw") for sample in samples] == ["codec", None, "b.npy", None]
    listed[0]["positions_thw"] = "all.npy"
    (tmp_path / "data.yaml").write_text(json.dumps({"datasets": listed}))
    with pytest.raises(ValueError, match=r"of a dataset must be one of codec, codec-video-prep, got 'all\.npy'"):
        mark_datasets(str(tmp_path / "data.yaml"), samples)


def test_positions_that_a_mode_would_drop_are_refused():
    samples = [{"id": "a", "image": "a.png"}, {"id": "b", "image": "b.png", "positions_thw": "b.npy"}]
    refuse_positions(samples[:1], "pad")
    for mode in ("pad", "square", "anyres"):
        with pytest.raises(ValueError, match=f"1 of 2 samples have positions_thw .sample b.*{mode}.* cannot use"):
            refuse_positions(samples, mode)


def test_arrays(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(6, dtype=np.int32).reshape(2, 3))
    assert read_array(str(tmp_path / "a.npy")).dtype == np.float32
    np.save(tmp_path / "nan.npy", np.full((2, 3), np.nan))
    with pytest.raises(ValueError, match="6 positions are NaN or infinite"):
        read_array(str(tmp_path / "nan.npy"))
