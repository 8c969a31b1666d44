"""What "LlavaViT Packing Model", a document (001) of the LLaVA-ViT time, promises: each of its blocks of code.

Paths, devices and checkpoints are ours: no GPU, no download, small models with random weights. Where a document is
wrong, docs/documents.md says how. The other four documents are in test_documents_packing.py.
"""

import json
import sys
import types

import numpy as np
import pytest
import torch
from conftest import assert_close
from conversions import lively, source_state_dict
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional as F

from llava_packing_tower import (
    LlavaViTPackingConfig,
    LlavaViTPackingModel,
    PatchLayout,
    batch_images_to_packing_input,
    compute_patch_positions_from_grid_thw,
    compute_patch_positions_with_interpolated_temporal,
    create_model,
    image_to_packing_input,
    interpolate_frame_indices,
    patchify,
    remap_state_dict_packing,
)
from llava_packing_tower.models.llava_vit import timm_names
from llava_packing_tower.models.llava_vit.presets import SOURCE, register_preset
from llava_packing_tower.models.llava_vit.source import create_source_model
from llava_packing_tower.models.llava_vit.standard_positions import clip_in_context, rotary_table

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def normalized(image):
    """A PIL image as the documents' torchvision transforms make it: 0..1, then CLIP's mean and std."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    return (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def photo(width=640, height=480, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def colored(count=8, side=224):
    return [Image.new("RGB", (side, side), color=(i * 30, i * 20, i * 10)) for i in range(count)]


def packing_model(**fields):
    return lively(LlavaViTPackingModel(LlavaViTPackingConfig(**{**SMALL, "patch_size": 16, **fields})).eval())


# ---------------------------------------------------------------- 001: grids and images


def test_001_grids():
    """Grids of the examples, and the rows that they stand for."""
    for side, patch, frames, rows in ((224, 16, 1, 196), (448, 14, 1, 1024), (224, 16, 8, 1568), (448, 14, 8, 8192)):
        pixels = torch.zeros(3, frames, side, side) if frames > 1 else torch.zeros(3, side, side)
        packed, grid = image_to_packing_input(pixels, patch)
        assert grid.tolist() == [[frames, side // patch, side // patch]] and len(packed) == rows
    assert len(compute_patch_positions_from_grid_thw(torch.tensor([[1, 14, 14], [1, 32, 32]]))) == 1220


@pytest.mark.parametrize("kind", ["PIL image", "array", "gray", "RGBA"])
def test_001_one_picture(kind):
    """A picture is resized to whole patches and normalized; 640 x 470 with patch 16 is 40 x 29 patches."""
    picture = photo(640, 470)
    shown = {"array": np.array(picture), "gray": picture.convert("L"), "RGBA": picture.convert("RGBA")}.get(
        kind, picture
    )
    rows, grid = image_to_packing_input(shown, patch_size=16)
    assert rows.shape == (29 * 40, 768) and grid.tolist() == [[1, 29, 40]]
    rgb = picture.convert("L").convert("RGB") if kind == "gray" else picture
    assert_close(rows, patchify(normalized(rgb.resize((640, 464))), 16), 1e-6)
    outputs = packing_model()(hidden_states=rows, grid_thw=grid)
    assert outputs.last_hidden_state.shape == (1160, 64)


def test_001_a_batch_of_pictures():
    """Pictures, arrays and tensors of several sizes in one batch; one pooled vector each."""
    pictures = [photo(224, 224), np.array(photo(230, 239, 1)), normalized(photo(448, 448, 2))]
    rows, grid = batch_images_to_packing_input(pictures, patch_size=16)
    assert rows.shape == (1176, 768) and grid.tolist() == [[1, 14, 14], [1, 14, 14], [1, 28, 28]]
    outputs = packing_model()(hidden_states=rows, grid_thw=grid)
    assert outputs.last_hidden_state.shape == (1176, 64) and outputs.pooler_output.shape == (3, 64)
    alone = [image_to_packing_input(picture)[0] for picture in pictures]
    assert torch.equal(rows, torch.cat(alone))
    last = batch_images_to_packing_input([photo(32, 32)], 16, PatchLayout.CHANNEL_LAST)[0]
    assert_close(last[0], patchify(normalized(photo(32, 32)), 16, PatchLayout.CHANNEL_LAST)[0], 1e-6)


@pytest.mark.parametrize(
    ("picture", "words"),
    [
        (photo(15, 40), r"image 1 is 40 x 15 pixels .* less than a patch of 16"),
        (np.zeros((32, 32, 3), np.float32), r"image 1: an array must be uint8 .* got float32 \[32, 32, 3\]"),
        (np.zeros((2, 2, 32, 3), np.uint8), r"image 1: an array must be uint8"),
        ("photo.jpg", r"image 1 must be a tensor .* got str"),
    ],
)
def test_001_a_picture_that_cannot_be_taken(picture, words):
    with pytest.raises(ValueError, match=words):
        batch_images_to_packing_input([photo(32, 32), picture], 16)


# ---------------------------------------------------------------- 001: videos


def interpolated(frames=8):
    return interpolate_frame_indices(torch.arange(frames).unsqueeze(0), torch.tensor([frames]), 64)


def test_001_eight_frames():
    places = interpolated()
    assert places.tolist() == [[0, 9, 18, 27, 36, 45, 54, 63]]
    positions = compute_patch_positions_with_interpolated_temporal(places, 14, 14, device=torch.device("cpu"))
    assert positions.shape == (1568, 3) and positions[4].tolist() == [0, 0, 4]
    assert positions[195].tolist() == [0, 13, 13] and positions[196].tolist() == [9, 0, 0]
    rows, grids = batch_images_to_packing_input(colored(), 16)
    assert rows.shape == (1568, 768) and grids.tolist() == [[1, 14, 14]] * 8
    model = packing_model().to(torch.bfloat16)
    grid = torch.tensor([[8, 14, 14]])
    outputs = model(hidden_states=rows.bfloat16(), grid_thw=grid, patch_positions=positions)
    assert outputs.last_hidden_state.shape == (1568, 64) and outputs.pooler_output.shape == (1, 64)
    plain = model(hidden_states=rows.bfloat16(), grid_thw=grid).last_hidden_state
    assert not torch.allclose(plain, outputs.last_hidden_state, atol=0.1)


def test_001_an_image_and_a_video_in_one_batch():
    image_rows, image_grid = image_to_packing_input(Image.new("RGB", (224, 224), "green"))
    video_rows, _ = batch_images_to_packing_input(colored(), 16)
    video_positions = compute_patch_positions_with_interpolated_temporal(interpolated(), 14, 14)
    model = packing_model()
    rows, grid = torch.cat([image_rows, video_rows]), torch.cat([image_grid, torch.tensor([[8, 14, 14]])])
    positions = torch.cat([compute_patch_positions_from_grid_thw(image_grid), video_positions])
    outputs = model(hidden_states=rows, grid_thw=grid, patch_positions=positions)
    assert outputs.last_hidden_state.shape == (1764, 64) and outputs.pooler_output.shape == (2, 64)
    alone = model(hidden_states=image_rows, grid_thw=image_grid)
    assert_close(outputs.last_hidden_state[:196], alone.last_hidden_state)
    assert_close(outputs.pooler_output[:1], alone.pooler_output)


# ---------------------------------------------------------------- 001: the source model


def registry():
    """timm's, as far as names are registered in it."""
    names, timm, models = {}, types.ModuleType("timm"), types.ModuleType("timm.models")
    timm.models, models.is_model = models, names.__contains__
    models.register_model = lambda entry: names.setdefault(entry.__name__, entry)
    timm.create_model = lambda name, **options: names[name](**options)
    return {"timm": timm, "timm.models": models}


def test_001_the_source_model_against_the_packed_one(monkeypatch, tmp_path):
    """A ``backbone.pt`` in the source model, by its timm name, and converted: an image, and 8 frames in a longer clip.

    (The document names the large model, whose patch is 14, with a patch of 16; small has 16.)
    """
    for name, module in registry().items():
        monkeypatch.setitem(sys.modules, name, module)
    timm_names.when_timm_is_there(sys.modules["timm"])
    timm = sys.modules["timm"]
    sizes = dict(num_hidden_layers=2)
    torch.save(
        {"model": source_state_dict(create_model("llava_vit_small_ln", **sizes).state_dict())}, tmp_path / "b.pt"
    )
    source = timm.create_model("llava_vit_small_ln", pretrained=False, **sizes)
    loaded = torch.load(tmp_path / "b.pt", weights_only=True)
    source.load_state_dict(loaded.get("model", loaded.get("state_dict", loaded)), strict=False)
    source = source.eval()
    packed = LlavaViTPackingModel(LlavaViTPackingConfig(**{**source.config.to_dict(), "layer_norm_eps": 1e-5})).eval()
    packed.load_state_dict(remap_state_dict_packing(loaded["model"]))
    assert packed.patch_size == source.patch_size == 16

    image = normalized(photo(224, 224)).unsqueeze(0)
    theirs = source(image)["visible_embeddings"].flatten(0, -2)
    rows, grid = batch_images_to_packing_input(image, 16)
    positions = compute_patch_positions_from_grid_thw(grid)
    ours = packed(hidden_states=rows, grid_thw=grid, patch_positions=positions).last_hidden_state
    assert F.cosine_similarity(theirs, ours, dim=-1).min() > 0.99
    assert_close(theirs, ours)

    frames = torch.stack([normalized(frame) for frame in colored()], dim=1).unsqueeze(0)
    clip, visible = clip_in_context(frames, interpolated(), 16)
    assert clip.shape == (1, 3, 64, 224, 224) and visible.shape == (1, 1568)
    theirs = source(clip, visible_indices=visible, mask_ratio=None)["visible_embeddings"].flatten(0, -2)
    positions = compute_patch_positions_with_interpolated_temporal(interpolated(), 14, 14, torch.device("cpu"))
    rows, grid = image_to_packing_input(frames[0], 16)
    ours = packed(hidden_states=rows, grid_thw=grid, patch_positions=positions).last_hidden_state
    assert F.cosine_similarity(theirs, ours, dim=-1).min() > 0.99


@pytest.fixture
def tiny_source(golden):
    told = json.loads((golden / "timm_source" / "config.json").read_text())["packing_config"]
    weights = load_file(golden / "timm_source" / "model.safetensors")
    names = ("patch_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    fields = {name: told[name] for name in names if name in told}
    register_preset("llava_vit_tiny_ln", SOURCE, **fields)
    model = create_source_model("llava_vit_tiny_ln").eval()
    return model, weights


def test_001_the_source_model_computes_what_the_training_code_did(tiny_source, golden_case):
    """Its own eps included: patches without contrast, an image and a video of the golden case."""
    model, weights = tiny_source
    model.load_state_dict(weights, strict=False)
    case = golden_case("timm_source", "mixed")
    starts, found, heads = 0, [], []
    for index, (frames, h, w) in enumerate(case["grid_thw"].tolist()):
        pixels = case[f"pixels.{index}"].unsqueeze(0)
        positions = case["patch_positions"][starts : starts + frames * h * w]
        starts += frames * h * w
        if frames == 1:
            output = model(pixels)
        else:
            clip, visible = clip_in_context(pixels, positions[:: h * w, 0].unsqueeze(0), model.patch_size)
            output = model(clip, visible_indices=visible, mask_ratio=None)
        found.append(output["visible_embeddings"][0])
        heads.append(output["head_output"])
    assert_close(torch.cat(found), case["source_visible_embeddings"])
    assert_close(torch.cat(heads), case["source_head_output"])


def test_001_a_source_checkpoint_is_loaded_whole_or_refused(tiny_source):
    model, weights = tiny_source
    short = {name: tensor for name, tensor in weights.items() if name != "transformer.layers.1.attn.in_proj.bias"}
    for wrong, words in (
        (short, "3 missing"),
        ({**weights, "strange": torch.zeros(3)}, "1 unexpected"),
        ({**weights, "ln_post.weight": torch.zeros(3)}, "1 mis-shaped"),
    ):
        with pytest.raises(ValueError, match=words):
            model.load_state_dict(wrong, strict=False)
    model.load_state_dict({"state_dict": weights})
    model.load_state_dict(model.state_dict())
    with pytest.raises(ValueError, match="no name of the training code"):
        create_source_model("hf_llava_vit_small_ln")


def test_001_positions_and_residuals_of_the_source_model(tiny_source):
    model, weights = tiny_source
    model.load_state_dict(weights)
    patch = model.patch_size
    clip = torch.randn(2, 3, 4, 2 * patch, 3 * patch, generator=torch.Generator().manual_seed(0))
    whole = model(clip)["visible_embeddings"]
    positions = compute_patch_positions_from_grid_thw(torch.tensor([[4, 2, 3]]))
    assert torch.equal(model(clip, patch_positions=positions)["visible_embeddings"], whole)
    visible = torch.tensor([[0, 5, 7], [2, 3, 23]])
    some = model(clip, visible)["visible_embeddings"]
    assert torch.equal(model(clip, visible, patch_positions=positions)["visible_embeddings"], some)
    residual = torch.zeros(2, 1, 4, 2 * patch, 3 * patch)
    assert_close(model(clip, residual)["visible_embeddings"], whole)  # 24 patches: fewer than are kept
    with pytest.raises(ValueError, match=r"patch_positions must be \[24, 3\]"):
        model(clip, patch_positions=positions[:5])


# ---------------------------------------------------------------- 001: models and weights


def test_001_rotary_angles_by_upstreams_name(tiny_source):
    """``model.video_rope``: the angles of the grid, and of given positions, are those that the model turns by."""
    rope, head_dim = (
        tiny_source[0].video_rope,
        tiny_source[0].config.hidden_size // tiny_source[0].config.num_attention_heads,
    )
    positions = compute_patch_positions_from_grid_thw(torch.tensor([[3, 2, 4]])).view(1, -1, 3)
    angles = rope(t=3, h=2, w=4)
    assert angles.shape == (24, rope.half) and torch.equal(rope.forward_from_positions(positions)[0], angles)
    cos, _ = rotary_table(positions, head_dim, tiny_source[0].config.rope_theta)
    assert_close(angles.cos(), cos[0, 0, :, : rope.half])


def test_001_quick_start():
    config = LlavaViTPackingConfig(
        patch_size=16, hidden_size=768, num_attention_heads=12, num_hidden_layers=2, num_channels=3
    )
    model = LlavaViTPackingModel(config).bfloat16().eval()
    rows = torch.randn(196, 768, dtype=torch.bfloat16)
    outputs = model(hidden_states=rows, grid_thw=torch.tensor([[1, 14, 14]], dtype=torch.long))
    assert outputs.last_hidden_state.shape == (196, 768)


@pytest.mark.parametrize("size", ["small", "base", "large", "huge", "giant"])
def test_001_models_by_name(size, monkeypatch):
    for name, module in registry().items():
        monkeypatch.setitem(sys.modules, name, module)
    timm_names.when_timm_is_there(sys.modules["timm"])
    with torch.device("meta"):
        model = sys.modules["timm"].create_model(f"hf_llava_vit_packing_{size}_ln", pretrained=False)
    assert isinstance(model, LlavaViTPackingModel) and model.patch_size == (16 if size in ("small", "base") else 14)
