"""The vision towers of VLMs as LLaVA sees them: images, clips, projectors."""

from types import SimpleNamespace

import pytest
import torch
from conftest import assert_close
from families import VLM_FAMILIES, per_image, tiny
from PIL import Image
from torch import nn

from llava_packing_tower import HEVCViTPackingVisionTower
from llava_packing_tower.data.native_config import NativeSettings, check_settings, make_settings
from llava_packing_tower.data.smart_resize import known_merge, merge_of
from llava_packing_tower.integrations.llava.checkpoint_projector import NOTE, checkpoint_projector
from llava_packing_tower.integrations.llava.sample_sizes import SizeReader
from llava_packing_tower.multimodal.projectors import MergingProjector, make_projector
from llava_packing_tower.multimodal.visual_inputs import Visual
from llava_packing_tower.multimodal.visual_tokens import TokenLayout, encode_visuals, tower_inputs
from llava_packing_tower.train.sequence_lengths import ImageCounter

pytestmark = pytest.mark.newest
NAMES = list(VLM_FAMILIES)
TEMPORAL = ["qwen3_vl", "qwen2_5_vl"]
MERGING = {"qwen3_vl": (128, 2), "qwen2_5_vl": (128, 2), "moonvit": (128, 2), "onevision2": (48, 3)}
"""Families with a projector in their checkpoint: the width of its output, and the side of its cells."""


def tower_of(golden, name, layer=-1, **more):
    args = SimpleNamespace(**{"mm_vision_select_layer": layer, "mm_projector_type": "mlp2x_gelu", **more})
    return HEVCViTPackingVisionTower(f"packing:{golden / name}", args)


def pixels_of(case):
    return [case[f"pixels.{i}"] for i in range(sum(key.startswith("pixels.") for key in case))]


@pytest.mark.parametrize("name", NAMES)
def test_features_in_raster_order_of_any_block(golden, golden_case, name):
    """``select_layer`` counts blocks: -1 is the output of the last one, before any projector."""
    case = golden_case(name, "images")
    images = pixels_of(case)
    for layer in (-1, -2, 1):
        features = tower_of(golden, name, layer)(images)
        assert_close(torch.cat(features), case["hidden_states"][layer])
    tower = tower_of(golden, name)
    assert tower.hidden_size == 32 and tower.num_patches == tower.num_patches_per_side**2
    same = torch.stack([images[0], images[0].flip(1)])
    assert_close(tower(same)[1], tower([same[1]])[0], atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_frozen_tower_is_found_again_and_a_changed_one_refused(golden, name):
    tower = tower_of(golden, name)
    note = tower.packing_config("folder")
    again = tower_of(golden, name, mm_packing_config=note)
    image = torch.randn(3, 12, 8)
    assert torch.equal(tower([image])[0], again([image])[0])
    with pytest.raises(ValueError, match="has changed since this LLaVA checkpoint was trained"):
        tower_of(golden, name, mm_packing_config={**note, "fingerprint": "0" * 64})


@pytest.mark.parametrize("name", NAMES)
def test_the_image_processor(golden, name):
    """Mean and deviation of its own file; the bounds of areas that some files give are no sizes of images."""
    tower = tower_of(golden, name)
    processor = tower.image_processor
    assert processor.size["shortest_edge"] == tower.image_size == processor.crop_size["height"]
    assert tower.image_size % tower.config.patch_size == 0


# ---------------------------------------------------------------- clips behind a projector


@pytest.mark.parametrize("name", TEMPORAL)
def test_tokens_of_clips_and_images(golden, name):
    """A clip of five frames has three temporal patches; as frames, it has five."""
    tower = tower_of(golden, name)
    visuals = [
        Visual(torch.randn(5, 3, 8, 12), is_video=True, frame_indices=(0, 2, 4, 6, 8), total_frames=9),
        Visual(torch.randn(1, 3, 4, 8)),
        Visual(torch.randn(2, 3, 8, 8), is_video=True),
    ]
    identity = nn.Identity()
    tokens = encode_visuals(tower, identity, visuals, TokenLayout(clips=True, pool_stride=1))
    assert [len(x) for x in tokens] == [3 * 6, 2, 4]
    expected = per_image(tower.vision_tower, [visuals[0].frames.transpose(0, 1)])[0]
    assert_close(tokens[0], expected, atol=1e-5)
    tokens = encode_visuals(tower, identity, visuals, TokenLayout(clips=False, pool_stride=1))
    assert [len(x) for x in tokens] == [5 * 6, 2, 8]
    assert_close(tokens[2][4:], per_image(tower.vision_tower, [visuals[2].frames[1]])[0], atol=1e-5)


@pytest.mark.parametrize("kind", ["checkpoint", "spatial_merge_3x3", "mlp2x_gelu"])
@pytest.mark.parametrize("name", NAMES)
def test_sizes_of_samples_are_those_of_their_tokens(golden, name, kind):
    """Dealing asks for tokens and patches before a sample is encoded."""
    tower = tower_of(golden, name, mm_projector_type=kind)
    clips = "frames" if tower.vision_tower.image_only else "clip"
    keys = {"mm_packing_min_patches": 4, "mm_packing_max_patches": 60, "mm_packing_video": clips}
    config = SimpleNamespace(image_aspect_ratio="native", mm_projector_type=kind, mm_spatial_pool_stride=2, **keys)
    tower.set_native(NativeSettings(4, 60, clips))
    model = SimpleNamespace(config=config, get_vision_tower=lambda: tower)
    data = SimpleNamespace(image_aspect_ratio="native", image_processor=tower.image_processor)
    reader = SizeReader(SimpleNamespace(data_args=data), model)
    merge = tower.merge
    projector = MergingProjector(32, 24, merge) if merge != (1, 1) else nn.Linear(32, 24)
    rows, run = [], tower.vision_tower.forward
    tower.vision_tower.forward = lambda hidden_states, *args, **more: (
        rows.append(len(hidden_states)),
        run(hidden_states, *args, **more),
    )[1]
    patch = tower.config.patch_size
    for frames, is_video in ((5, True), (1, False), (2, True)):
        pixels = torch.randn(frames, 3, 7 * patch, 4 * patch)
        rows.clear()
        with torch.no_grad():
            tokens = encode_visuals(tower, projector, [Visual(pixels, is_video)], reader.layout)[0]
        size = reader._tensor(pixels, None, "video" if is_video else "image")
        assert (size.tokens, size.patches) == (len(tokens), sum(rows))


@pytest.mark.parametrize("kind", ["checkpoint", "spatial_merge_3x3"])
@pytest.mark.parametrize("name", NAMES)
def test_lengths_before_the_start_are_counted_from_below(golden, tmp_path, name, kind):
    """From the files of the whole VLM alone: never more tokens of an image than it will have, and as many where the
    files say how many patches are a token."""
    folder = tmp_path / "vlm"
    folder.mkdir()
    (folder / "config.json").write_bytes((golden / name / "config.json").read_bytes())
    (folder / "preprocessor_config.json").write_text('{"size": {"height": 16, "width": 16}}')
    Image.new("RGB", (53, 31)).save(tmp_path / "photo.png")
    values = {"mm_projector_type": kind, "image_aspect_ratio": "native", "image_folder": tmp_path}
    values |= {"mm_packing_max_patches": 60, "mm_packing_min_patches": 4, "model_name_or_path": tmp_path}
    tower = tower_of(golden, name, mm_projector_type=kind)
    tower.set_native(NativeSettings(4, 60, "frames"))
    rows, columns = tower.image_processor.rule.tokens(53, 31)
    found = ImageCounter(values, folder)("photo.png")
    assert found == rows * columns or (kind == "checkpoint" and found == 1 and name not in MERGING)


def test_frames_with_an_image_each_cannot_share_a_patch():
    visuals = [Visual(torch.randn(1, 3, 8, 8), group=1) for _ in range(2)]
    assert len(tower_inputs(visuals, 4, clips=True)[0]) == 1
    with pytest.raises(ValueError, match="a patch of this tower covers 2 frames"):
        tower_inputs(visuals, 4, clips=True, frames_per_patch=2)


# ---------------------------------------------------------------- projectors


@pytest.mark.parametrize(
    ("kind", "side"), [("spatial_merge_3x3", 3), ("spatial_merge_2x2", 2), ("spatial_merge_4x4", 4)]
)
def test_merges_of_any_square(kind, side):
    """Against a loop over cells; what is left over at an edge is a cell of its last rows and columns, repeated."""
    assert merge_of(kind) == (side, side)
    projector = make_projector(kind, 5, 7)
    grids = [(2, 7, 5), (1, 3, 3), (1, 1, 8)]
    features = [torch.randn(t * h * w, 5) for t, h, w in grids]
    tokens = projector(torch.cat(features), grids)
    expected = []
    for (t, h, w), own in zip(grids, features, strict=True):
        image = projector.ln_q(own).view(t, h, w, 5)
        for frame in image:
            for top in range(0, h, side):
                for left in range(0, w, side):
                    rows = [min(top + i, h - 1) for i in range(side)]
                    columns = [min(left + i, w - 1) for i in range(side)]
                    expected.append(projector.mlp(torch.cat([frame[r, c] for r in rows for c in columns])))
    assert_close(tokens, torch.stack(expected), atol=1e-5)


def test_names_of_merges():
    assert known_merge("spatial_merge_12x12") == (12, 12)
    for name in ("spatial_merge_3x2", "spatial_merge_0x0", "spatial_merge_3", "mlp2x_gelu", None):
        assert known_merge(name) is None
    check_settings({"mm_projector_type": "spatial_merge_3x3"})
    check_settings({"mm_projector_type": "checkpoint"})
    with pytest.raises(ValueError, match=r"do not|does not work on images of any size"):
        check_settings({"mm_projector_type": "spatial_merge_3x2"})
    with pytest.raises(ValueError, match="mm_packing_max_patches 8 is too small for one token of 3 x 3"):
        check_settings({"mm_projector_type": "spatial_merge_3x3", "mm_packing_max_patches": 8})


@pytest.mark.parametrize(("kind", "unit"), [("spatial_merge_3x3", 12), ("checkpoint", 8), ("mlp2x_gelu", 4)])
def test_native_images_are_whole_cells(golden, kind, unit):
    args = SimpleNamespace(mm_vision_select_layer=-1, mm_projector_type=kind)
    tower = HEVCViTPackingVisionTower(f"packing:{golden / 'qwen3_vl'}", args)
    tower.set_native(NativeSettings(9, 100, "clip"))
    assert tower.image_processor.rule.unit == (unit, unit) and tower.image_processor.frames_per_patch == 2
    settings = make_settings(SimpleNamespace(), SimpleNamespace(), 2, tower.vision_tower.image_only, tower.merge)
    assert settings.max_patches == max(2, (unit // 4) ** 2) and settings.video == "clip"


def llava_config(folder, width=32, text=128, **more):
    return SimpleNamespace(mm_vision_tower=f"packing:{folder}", mm_hidden_size=width, hidden_size=text, **more)


@pytest.mark.parametrize("name", MERGING)
def test_the_projector_of_the_checkpoint(golden, golden_case, name):
    """It makes of the tower's features what the VLM's own makes, and is rebuilt from the config without the VLM."""
    case, tower = golden_case(name, "images"), tower_of(golden, name)
    config = llava_config(golden / name, text=MERGING[name][0])
    projector = checkpoint_projector(config)
    images = pixels_of(case)
    patch, frames = tower.config.patch_size, tower.vision_tower.frames_per_patch
    grids = [
        (-(-(x.shape[1] if x.dim() == 4 else 1) // frames), x.shape[-2] // patch, x.shape[-1] // patch) for x in images
    ]
    assert_close(projector(torch.cat(tower(images)), grids), case["merged"])
    assert projector.merge == (MERGING[name][1],) * 2
    again = checkpoint_projector(llava_config("gone", text=MERGING[name][0], **{NOTE: getattr(config, NOTE)}))
    again.load_state_dict(projector.state_dict())
    assert torch.equal(again(torch.cat(tower(images)), grids), projector(torch.cat(tower(images)), grids))


def test_a_projector_that_does_not_fit_is_refused(golden, tmp_path):
    with pytest.raises(ValueError, match="puts out tokens of width 128; this model needs 40"):
        checkpoint_projector(llava_config(golden / "qwen3_vl", text=40))
    with pytest.raises(ValueError, match="takes features of width 32; this model needs 128"):
        checkpoint_projector(llava_config(golden / "qwen3_vl", width=128))
    with pytest.raises(ValueError, match="dinov3_vit checkpoint, has no projector to start from"):
        checkpoint_projector(llava_config(golden / "dinov3"))
    tiny("qwen3_vl").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="qwen3_vl_packing checkpoint, has no projector"):
        checkpoint_projector(llava_config(tmp_path))
