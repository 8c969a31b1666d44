"""Native resolution without a host: the rule, the settings, the processor, pooling, newlines, counting."""

from __future__ import annotations

import wave
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import assert_close
from hypothesis import example, given
from hypothesis import strategies as st
from native_data_checks import write_video
from PIL import Image

from llava_packing_tower import PackingImageProcessor
from llava_packing_tower.data import video
from llava_packing_tower.data.images import UnreadableImage
from llava_packing_tower.data.native_config import NativeSettings, check_settings, make_settings, settings_of
from llava_packing_tower.data.native_image_processor import NativeImageProcessor
from llava_packing_tower.data.smart_resize import SmartResize, merge_of
from llava_packing_tower.data.video import probe_clip, read_clip, sample_indices
from llava_packing_tower.multimodal.projectors import MergingProjector, make_projector
from llava_packing_tower.multimodal.truncation import cut_tokens
from llava_packing_tower.multimodal.visual_inputs import Visual, fill_slots, read_visuals
from llava_packing_tower.multimodal.visual_tokens import TokenLayout, arrange, encode_visuals, pool
from llava_packing_tower.towers.packing_tower import HEVCViTPackingVisionTower

IMAGES = TokenLayout(clips=False)

# ---------------------------------------------------------------- the rule


@pytest.mark.parametrize(
    "merge, bounds, size, expected",
    [
        ((1, 1), (1, 1024), (448, 448), (448, 448)),
        ((1, 1), (1, 1024), (100, 50), (98, 56)),  # to the nearest multiples: 7.14 x 3.57 patches
        ((2, 2), (4, 1024), (100, 50), (112, 56)),
        ((1, 4), (4, 1024), (100, 50), (112, 56)),
        ((1, 1), (1, 1024), (4000, 3000), (504, 378)),  # 36 x 27 = 972 of 1024 patches, still 4:3
        ((2, 2), (4, 1024), (4000, 3000), (504, 364)),
        ((1, 1), (1, 100), (4480, 448), (434, 42)),  # a panorama of 10:1
        ((1, 1), (16, 1024), (7, 7), (56, 56)),  # enlarged to the fewest patches
        ((1, 1), (1, 1024), (1, 1), (14, 14)),
        ((1, 1), (1, 1024), (3, 1400), (14, 1400)),  # one patch wide
        ((1, 1), (1, 100), (10, 10000), (14, 1400)),  # and too long for its width: cut down
        ((2, 2), (4, 40), (10, 10000), (28, 280)),
        ((1, 1), (20, 20), (140, 14), (140, 28)),  # rounding up would pass the most: that holds
    ],
)
def test_sizes(merge, bounds, size, expected):
    assert SmartResize(14, merge, *bounds).size(*size) == expected


@given(
    width=st.integers(1, 5000),
    height=st.integers(1, 5000),
    merge=st.sampled_from([(1, 1), (2, 2), (1, 4)]),
    least=st.integers(1, 400),
    more=st.integers(4, 2000),
)
@example(width=2, height=3, merge=(2, 2), least=5, more=4)  # enlarged to 2 x 2 tokens, of which two fit
def test_the_rule_holds_for_every_image(width, height, merge, least, more):
    rule = SmartResize(16, merge, least, least + more)
    rows, columns = rule.grid(width, height)
    assert rows % merge[0] == 0 and columns % merge[1] == 0 and rows >= 1 and columns >= 1
    assert rows * columns <= least + more
    tokens = rule.tokens(width, height)
    assert tokens == (rows // merge[0], columns // merge[1])
    tall, wide = rule.unit
    if least <= rows * columns and round(height / tall) == rows // merge[0]:
        assert abs(columns * 16 - width) <= wide or rows * columns > (least + more) // 2
    # Turning an image by 90 degrees turns its grid, if the unit is square.
    if merge != (1, 4) and width != height:
        assert rule.grid(height, width) == (columns, rows)
    if least <= rows * columns:
        assert rule.size(*rule.size(width, height)) == rule.size(width, height)


@pytest.mark.parametrize(
    "bounds, merge, words",
    [
        ((5, 4), (1, 1), "5 is larger than"),
        ((1, 3), (2, 2), "2 x 2"),
        ((0, 4), (1, 1), "got 0"),
        ((1, 2.5), (1, 1), "2.5"),
    ],
)
def test_impossible_bounds(bounds, merge, words):
    with pytest.raises(ValueError, match=words):
        SmartResize(14, merge, *bounds)


# ---------------------------------------------------------------- settings


def test_settings_come_from_arguments_then_checkpoint_then_defaults():
    earlier = SimpleNamespace(mm_packing_min_patches=9, mm_packing_video="frames")
    args = SimpleNamespace(mm_projector_type="spatial_merge", mm_packing_min_patches=None, mm_packing_max_patches=200)
    made = make_settings(args, earlier, 1024, image_only=False)
    assert made == NativeSettings(9, 200, "frames", None)
    assert make_settings(SimpleNamespace(), SimpleNamespace(), 1024, True) == NativeSettings(16, 1024, "frames")
    assert make_settings(SimpleNamespace(), SimpleNamespace(), 9, False) == NativeSettings(9, 9, "clip")
    config = SimpleNamespace(image_aspect_ratio="native", **made.items())
    assert settings_of(config) == made
    assert settings_of(SimpleNamespace(image_aspect_ratio="pad", **made.items())) is None
    with pytest.raises(ValueError, match="no mm_packing_max_patches"):
        settings_of(SimpleNamespace(image_aspect_ratio="native", mm_packing_min_patches=3))
    with pytest.raises(ValueError, match="use 'frames'"):
        make_settings(SimpleNamespace(mm_packing_video="clip"), SimpleNamespace(), 9, image_only=True)


@pytest.mark.parametrize(
    "values, words",
    [
        ({"mm_projector_type": "pooler"}, "'pooler' does not work"),
        ({"mm_patch_merge_type": "spatial_maxpool2x2"}, "flat, spatial, spatial_unpad"),
        ({"mm_packing_video": "film"}, "clip, frames"),
        ({"mm_packing_min_patches": 0}, "got 0"),
        ({"mm_packing_min_patches": 9, "mm_packing_max_patches": 8}, "9 is larger than"),
        ({"mm_packing_max_patches": 3, "mm_projector_type": "patch_merger"}, "1 x 4"),
        ({"mm_newline_position": "rows"}, "one_token"),
        ({"mm_packing_video_max_patches": -1}, "got -1"),
        ({"add_faster_video": True}, "add_faster_video"),
    ],
)
def test_settings_that_cannot_be_carried_out(values, words):
    with pytest.raises(ValueError, match=words):
        check_settings(values)


def test_settings_that_can():
    for projector in (None, "linear", "mlp3x_gelu", "mlp2x_res2x_gelu", "identity", "spatial_merge", "patch_merger"):
        check_settings({"mm_projector_type": projector, "mm_patch_merge_type": "spatial_unpad"})


# ---------------------------------------------------------------- pixels


def photo(height, width, mode="RGB"):
    noise = np.random.default_rng(height).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise).convert(mode)


def native(merge=(1, 1), least=1, most=64, together=None, **base):
    base = PackingImageProcessor(size=56, **base)
    rule = SmartResize(14, merge, least, most)
    return NativeImageProcessor(base, rule, NativeSettings(least, most, "clip", together))


def test_square_photos_of_the_fixed_size_have_the_pixels_of_the_fixed_processor():
    images = [photo(56, 56), photo(56, 56, "L")]
    processor = native()
    fixed = processor.base.preprocess(images, return_tensors="pt")["pixel_values"]
    assert torch.equal(processor.preprocess(images, return_tensors="pt")["pixel_values"], fixed)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "1", "CMYK", "LA"])
def test_every_photo_keeps_its_shape(mode):
    processor = native(merge=(2, 2), least=4)
    made = processor([photo(30, 100, mode), photo(90, 20, mode), photo(3, 3, mode)], return_tensors="pt")
    assert [tuple(p.shape) for p in made["pixel_values"]] == [(3, 28, 112), (3, 84, 28), (3, 28, 28)]
    assert all(p.isfinite().all() for p in made["pixel_values"])


def test_what_a_photo_of_its_own_size_becomes_is_resized_not_cropped():
    pixels = native().preprocess(photo(70, 30), return_tensors="pt")["pixel_values"][0]
    assert pixels.shape == (3, 70, 28)
    expected = np.asarray(photo(70, 30).resize((28, 70), Image.Resampling.BICUBIC), np.float32) / 255
    mean, std = (np.float32(v) for v in (native().image_mean, native().image_std))
    assert_close(pixels, torch.from_numpy((expected - mean) / std).permute(2, 0, 1), 1e-6)


def test_frames_of_a_video_share_one_size_and_the_bound_of_the_video():
    clip = np.random.default_rng(0).integers(0, 255, (6, 60, 100, 3), dtype=np.uint8)
    processor = native(together=60)
    assert processor.preprocess(clip, return_tensors="pt")["pixel_values"].shape == (6, 3, 28, 56)  # 10 patches each
    assert processor.preprocess(photo(60, 100), return_tensors="pt")["pixel_values"].shape == (1, 3, 56, 98)
    one = processor.preprocess(clip[:1], return_tensors="pt")["pixel_values"]
    assert one.shape == (1, 3, 56, 98)  # a video of one frame
    assert native().preprocess(clip, return_tensors="pt")["pixel_values"].shape == (6, 3, 56, 98)
    listed = [photo(60, 100)] * 6  # a folder of frames, where a sample with a video is read; else photos
    with processor.reading(video=True):
        assert processor.preprocess(listed, return_tensors="pt")["pixel_values"].shape == (6, 3, 28, 56)
    assert processor.preprocess(listed, return_tensors="pt")["pixel_values"].shape == (6, 3, 56, 98)


def test_a_blank_image_is_one_token_and_the_saved_processor_is_the_base():
    processor = native(merge=(1, 4), least=4)
    assert processor.crop_size == {"height": 14, "width": 56}
    assert processor.to_dict() == PackingImageProcessor(size=56).to_dict()
    other = processor.preprocess(photo(14, 56), return_tensors="pt", do_normalize=False)["pixel_values"]
    assert other.shape == (1, 3, 14, 56) and other.min() >= 0 and other.max() <= 1


def test_a_tower_with_a_native_config_has_the_native_processor(golden):
    args = SimpleNamespace(
        mm_vision_select_layer=-1,
        mm_projector_type="spatial_merge",
        image_aspect_ratio="native",
        mm_packing_min_patches=4,
        mm_packing_max_patches=100,
        mm_packing_video="clip",
    )
    tower = HEVCViTPackingVisionTower(str(golden / "hevc_packing_tower"), args, delay_load=True)
    tower.load_model()
    rule = tower.image_processor.rule
    assert (rule.merge, rule.min_patches, rule.max_patches) == ((2, 2), 4, 100)
    assert rule.patch_size == tower.config.patch_size
    tower.set_native(None)
    assert type(tower.image_processor) is PackingImageProcessor


# ---------------------------------------------------------------- tokens


def test_merging_takes_neighbours_and_repeats_the_edge():
    projector = MergingProjector(1, 4, (2, 2))
    projector.ln_q = projector.mlp = torch.nn.Identity()
    features = torch.arange(15.0)[:, None]  # 3 rows of 5
    cells = projector(features, [(1, 3, 5)])
    assert cells.tolist() == [
        [0, 1, 5, 6],
        [2, 3, 7, 8],
        [4, 4, 9, 9],
        [10, 11, 10, 11],
        [12, 13, 12, 13],
        [14, 14, 14, 14],
    ]
    projector.merge = (1, 4)
    assert projector(features, [(1, 3, 5)])[:3].tolist() == [[0, 1, 2, 3], [4, 4, 4, 4], [5, 6, 7, 8]]
    with pytest.raises(ValueError, match="16 patches, the features 15"):
        projector(features, [(1, 4, 4)])
    with pytest.raises(ValueError, match="15 patches without a grid"):
        projector(features)


def test_projectors_by_name():
    assert make_projector("mlp2x_gelu", 8, 4) is None and merge_of("mlp2x_gelu") == (1, 1)
    for name, merge in (("spatial_merge", (2, 2)), ("patch_merger", (1, 4))):
        projector = make_projector(name, 8, 5)
        assert projector.merge == merge_of(name) == merge
        assert projector(torch.randn(2, 16, 8)).shape == (2, 4, 5)


def test_pooling_on_the_real_grid():
    frames = torch.arange(2 * 3 * 5.0).view(-1, 1)
    pooled, grid = pool(frames, (2, 3, 5), 2, "max")
    assert grid == (2, 1, 2) and pooled[:, 0].tolist() == [6, 8, 21, 23]
    pooled, grid = pool(frames, (2, 3, 5), 2, "average")
    assert grid == (2, 1, 2) and pooled[:, 0].tolist() == [3, 5, 18, 20]
    pooled, grid = pool(frames, (2, 3, 5), 2, "bilinear")
    assert grid == (2, 2, 3) and len(pooled) == 12
    assert pool(frames, (2, 1, 15), 4, "max")[1] == (2, 1, 3)  # a side shorter than the stride
    with pytest.raises(ValueError, match="'median'"):
        pool(frames, (2, 3, 5), 2, "median")


@pytest.mark.parametrize(
    "position, expected",
    [
        ("grid", [0, 1, 9, 2, 3, 9, 4, 5, 9, 6, 7, 9]),
        ("frame", [0, 1, 2, 3, 9, 4, 5, 6, 7, 9]),
        ("one_token", [0, 1, 2, 3, 4, 5, 6, 7, 9]),
        ("no_token", [0, 1, 2, 3, 4, 5, 6, 7]),
    ],
)
def test_newlines_of_a_video(position, expected):
    layout = TokenLayout(True, "spatial_unpad", position, pool_stride=1)
    tokens, newline = torch.arange(8.0)[:, None], torch.tensor([9.0])
    assert arrange(tokens, (2, 2, 2), True, layout, newline)[:, 0].tolist() == expected
    flat = TokenLayout(True, "flat", position, pool_stride=1)
    assert arrange(tokens, (2, 2, 2), True, flat, newline)[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert arrange(tokens, (1, 4, 2), False, layout, newline)[:, 0].tolist() == [0, 1, 9, 2, 3, 9, 4, 5, 9, 6, 7, 9]


def test_a_clip_has_the_golden_features(golden, golden_case):
    """Eight frames, whose places are interpolated as LlavaViT was trained; in another order they are something else."""
    case = golden_case("llava_vit", "video8")
    tower = HEVCViTPackingVisionTower(str(golden / "llava_vit"), SimpleNamespace(mm_vision_select_layer=-1))
    frames = case["pixels.0"].transpose(0, 1)

    def encode(frames, clips=True):
        layout = TokenLayout(clips, pool_stride=1)
        return encode_visuals(tower, torch.nn.Identity(), [Visual(frames, is_video=True)], layout)[0]

    expected = case["hidden_states"][-1]
    assert_close(encode(frames), expected)
    per_frame = torch.cat([encode_visuals(tower, torch.nn.Identity(), [Visual(f[None])], IMAGES)[0] for f in frames])
    assert_close(encode(frames, clips=False), per_frame)
    assert (encode(frames) - per_frame).abs().max() > 0.1
    turned = encode(frames.flip(0)).unflatten(0, (8, -1)).flip(0).flatten(0, 1)
    assert (turned - expected).abs().max() > 0.1
    assert_close(encode(frames[:1]), encode(frames[:1], clips=False))  # a video of one frame is an image


@pytest.mark.parametrize("family", ["siglip2", "dinov3", "aimv2_native"])
def test_families_of_images_take_videos_frame_by_frame(golden, family):
    tower = HEVCViTPackingVisionTower(str(golden / family), SimpleNamespace(mm_vision_select_layer=-1))
    p, channels = tower.config.patch_size, tower.config.num_channels
    clip, image = Visual(torch.randn(3, channels, 2 * p, 4 * p), is_video=True), torch.randn(channels, 3 * p, 2 * p)
    layout = TokenLayout(clips=False, pool_stride=1)
    video, photo = encode_visuals(tower, torch.nn.Identity(), [clip, Visual(image[None])], layout)
    assert_close(photo, tower([image])[0])
    assert_close(video, torch.cat([tower([frame])[0] for frame in clip.frames]))
    with pytest.raises(ValueError, match="images only"):
        encode_visuals(tower, torch.nn.Identity(), [clip], TokenLayout(clips=True))
    placed = Visual(image[None], patch_positions=torch.zeros(6, 3))
    with pytest.raises(ValueError, match="without patch_positions"):
        encode_visuals(tower, torch.nn.Identity(), [placed], layout)


# ---------------------------------------------------------------- video files


def test_frames_are_sampled_as_the_host_samples_them():
    assert sample_indices(33, 10.0, 2, 0, False) == [0, 5, 10, 15, 20, 25, 30]
    assert sample_indices(33, 10.0, 2, 4, False) == [0, 10, 21, 32]
    assert sample_indices(33, 10.0, 1, 6, False) == [0, 10, 20, 30]
    assert sample_indices(33, 10.0, 1, 6, True) == [0, 6, 12, 19, 25, 32]
    assert sample_indices(3, 0.3, 1, 0, False) == [0, 1, 2]  # slower than asked for: every frame


@pytest.fixture(params=["av", "decord"])
def reader(request, monkeypatch):
    """Videos are read with this library alone."""
    pytest.importorskip(request.param, reason=f"{request.param} is not installed: its way of reading videos is not run")
    monkeypatch.setattr(video, "find_spec", lambda name: name == request.param)
    return request.param


def test_video_files(tmp_path, reader):
    write_video(tmp_path / "a.mp4", 33)
    clip = read_clip(str(tmp_path / "a.mp4"), 1, 5)
    assert (clip.frames.shape, clip.indices, clip.total, clip.fps) == ((5, 48, 64, 3), [0, 8, 16, 24, 32], 33, 4.0)
    assert clip.frames.dtype == np.uint8
    assert np.abs(clip.frames.mean((1, 2, 3)) - np.array([0, 40, 80, 120, 160])).max() < 4
    assert probe_clip(str(tmp_path / "a.mp4"), 1, 5) == (64, 48, 5)
    write_video(tmp_path / "one.mp4", 1)
    assert read_clip(str(tmp_path / "one.mp4")).frames.shape == (1, 48, 64, 3)
    assert probe_clip(str(tmp_path / "one.mp4")) == (64, 48, 1)


def test_a_folder_that_llava_next_takes_for_a_video(tmp_path):
    """It takes ten of its frames, repeated or left out, or frames_upbound with force_sample."""
    folder = tmp_path / "shareVideoGPTV" / "clip"
    folder.mkdir(parents=True)
    with pytest.raises(UnreadableImage, match="the folder is empty"):
        probe_clip(str(folder))
    for number, side in ((1, 30), (0, 20)):
        Image.new("RGB", (side, 50)).save(folder / f"{number}.png")
    assert probe_clip(str(folder), 1, 6) == (20, 50, 10) and probe_clip(str(folder), 1, 6, True) == (20, 50, 6)
    other = folder.rename(tmp_path / "frames")
    with pytest.raises(UnreadableImage, match="cannot be read as a video"):
        probe_clip(str(other))


def test_files_that_are_no_video_or_a_damaged_one(tmp_path, reader):
    write_video(tmp_path / "a.mp4", 33)
    whole = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[:700])
    (tmp_path / "text.mp4").write_bytes(b"no video")
    noise = np.random.default_rng(0).bytes(len(whole) // 4)
    (tmp_path / "damaged.mp4").write_bytes(whole[: len(whole) // 4] + noise + whole[len(whole) // 2 :])
    with wave.open(str(tmp_path / "sound.wav"), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", None))
        sound.writeframes(bytes(8000))
    for name in ("cut.mp4", "text.mp4", "damaged.mp4", "sound.wav", "none.mp4"):
        with pytest.raises(ValueError, match=f"{name}(: No such file| cannot be read as a video)"):
            read_clip(str(tmp_path / name))


def test_both_libraries_read_the_same_frames(tmp_path, monkeypatch):
    for name in ("av", "decord"):
        pytest.importorskip(name, reason=f"{name} is not installed: nothing to compare")
    write_video(tmp_path / "a.mp4", 33)
    clips = []
    for chosen in ("av", "decord"):
        monkeypatch.setattr(video, "find_spec", lambda name, chosen=chosen: name == chosen)
        clips.append(read_clip(str(tmp_path / "a.mp4"), 2, 7, True))
    assert clips[0][1:] == clips[1][1:]
    assert np.abs(clips[0].frames.astype(int) - clips[1].frames).max() <= 2  # rounding in the conversion of colours


def test_without_a_library_for_videos(monkeypatch):
    monkeypatch.setattr(video, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs PyAV or decord: pip install av"):
        read_clip("a.mp4")


# ---------------------------------------------------------------- what LLaVA passes around


def test_modalities_for_each_image_for_each_sample_or_for_all():
    images = [torch.zeros(3, 14, 14), torch.zeros(2, 3, 14, 28), torch.zeros(1, 3, 14, 14)]
    for modalities in (["image", "video", "text"], ["image", "video"]):
        read = read_visuals(images, modalities, None, [1, 1] if len(modalities) == 3 else [1, 2])
        assert [len(v.frames) for v in read] == [1, 2, 1] and read[1].is_video and not read[0].is_video
    batch = torch.zeros(2, 4, 3, 14, 14)
    assert all(v.is_video and len(v.frames) == 4 for v in read_visuals(batch, "video", None, [1, 1]))
    with pytest.raises(ValueError, match="2 modalities for 3 images in 3 samples"):
        read_visuals(images, ["image", "video"], None, [1, 1, 1])
    with pytest.raises(ValueError, match="2 images: at native"):
        read_visuals(images, "image", None, [1, 1, 1])
    with pytest.raises(ValueError, match=r"got \[14, 14\]"):
        read_visuals([torch.zeros(14, 14)], None, None, [1])
    with pytest.raises(ValueError, match="3 frame_indices"):
        read_visuals(images[1:2], "video", [{"frame_indices": [1, 2, 3]}], [1])


def test_slots():
    a, b = torch.ones(3, 2), torch.ones(5, 2)
    assert [len(s) for s in fill_slots([a, b], [1, 0, 1])] == [3, 0, 5]
    assert fill_slots([a, b, a], [1, 0, 1]) == [a, b, a]
    with pytest.raises(ValueError, match=r"1 images, but the 2 samples of the batch have \[1, 1\]"):
        fill_slots([a], [1, 1])


def test_what_truncation_cuts():
    text = [False, True, False, True]
    assert cut_tokens(text, [4, 3], 9) == (0, 0)
    assert cut_tokens(text, [4, 3], 8) == (1, 1)
    assert cut_tokens(text, [4, 3], 4) == (5, 4)
    assert cut_tokens([True, False, False], [4], 5) == (1, 0)
