"""The vision towers of VLMs against what their references make of the golden checkpoints, and what they promise."""

import json
import re
import shutil

import pytest
import torch
from conftest import assert_close
from families import VLM_FAMILIES, pack, per_image, tiny
from PIL import Image
from safetensors.torch import load_file, save_file

from llava_packing_tower import Qwen3VLVisionPacking, RadioPacking
from llava_packing_tower.checkpoint.weights import WeightFiles
from llava_packing_tower.data.patches import batch_images_to_packing_input, split_packed, unpatchify
from llava_packing_tower.data.segments import read_grid
from llava_packing_tower.models.registry import family_for, part_of, type_of
from llava_packing_tower.utils.files import read_json

pytestmark = pytest.mark.newest
NAMES = list(VLM_FAMILIES)


@pytest.fixture
def load(golden):
    return lambda name, **options: VLM_FAMILIES[name].from_pretrained(golden / name, **options)


def pixels_of(case):
    return [case[f"pixels.{i}"] for i in range(sum(key.startswith("pixels.") for key in case))]


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("name", NAMES)
def test_golden(load, golden, golden_case, name, backend):
    """All hidden states in raster order and all gradients, in one packed pass over images and clips."""
    case, model = golden_case(name, "images"), load(name, attn_implementation=backend)
    rows, grid = pack(model, pixels_of(case))
    last, states = model(rows, grid, output_hidden_states=True)
    for ours, theirs in zip(states, case["hidden_states"], strict=True):
        assert_close(ours, theirs)
    assert torch.equal(model(rows, grid), last)
    (states[-1] * case["weights"]).sum().backward()
    raw, files = read_json(golden / name / "config.json"), WeightFiles(golden / name, part=model.tower_prefix)
    _, plan = model.plan(raw, files.shapes())
    parameters = dict(model.named_parameters())
    for key, recipe in plan.recipes.items():
        if not all(f"grad.{source}" in case for source in recipe.sources):
            assert parameters[key].grad is None, key  # a final norm, which takes no part
            continue
        theirs = recipe.build(*(case[f"grad.{source}"] for source in recipe.sources))
        assert theirs.abs().max() > 0, key
        # (the gradients are sums over hundreds of tokens)
        assert_close(parameters[key].grad, theirs, atol=2e-5 * max(1.0, theirs.abs().max().item()))
    gradients = {key.removeprefix("grad.") for key in case if key.startswith("grad.")}
    assert gradients <= {source for recipe in plan.recipes.values() for source in recipe.sources}


# ---------------------------------------------------------------- the tower of a whole checkpoint


@pytest.mark.parametrize("name", NAMES)
def test_only_the_shard_with_the_tower_is_read(tmp_path, golden, load, name):
    """The other two need not be there, nor be readable."""
    shutil.copytree(golden / name, tmp_path / "whole")
    (tmp_path / "whole" / "model-00001-of-00003.safetensors").unlink()
    (tmp_path / "whole" / "model-00003-of-00003.safetensors").write_bytes(b"damaged")
    model, info = VLM_FAMILIES[name].from_pretrained(tmp_path / "whole", output_loading_info=True)
    for key, value in load(name).state_dict().items():
        assert torch.equal(model.state_dict()[key], value)
    decoder = [key for key in info["unexpected_keys"] if ".mlp.up_proj" in key and "layers" in key]
    assert len(decoder) == 5 and not info["missing_keys"]  # listed as left, the one in the tower's shard among them


@pytest.mark.parametrize("name", NAMES)
def test_the_tower_alone_in_a_folder(tmp_path, golden, load, name):
    model, raw = load(name), read_json(golden / name / "config.json")
    tensors = load_file(golden / name / "model-00002-of-00003.safetensors")
    own = {key: value for key, value in tensors.items() if re.match(model.tower_prefix, key)}
    vision = raw.get("vision_config", raw)
    (tmp_path / "config.json").write_text(json.dumps({**vision, "model_type": alone_type(name)}))
    save_file({without_prefix(model, key): value for key, value in own.items()}, tmp_path / "model.safetensors")
    again = VLM_FAMILIES[name].from_pretrained(tmp_path)
    assert all(torch.equal(again.state_dict()[key], value) for key, value in model.state_dict().items())


def alone_type(name):
    """What transformers (or the author) calls a folder with this tower alone."""
    return VLM_FAMILIES[name].source_model_types[-1]


def without_prefix(model, key):
    return re.sub(f"^({model.tower_prefix})", "", key)


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_tensor_or_one_too_many_is_an_error(tmp_path, golden, name):
    shard = "model-00002-of-00003.safetensors"
    for change in ("missing", "unexpected"):
        folder = tmp_path / change
        shutil.copytree(golden / name, folder)
        tensors, index = load_file(folder / shard), read_json(folder / "model.safetensors.index.json")
        key = next(k for k in tensors if k.endswith(("norm1.weight", "ln_1.weight")))
        new = key.replace("1.weight", "7.weight")
        if change == "missing":
            del tensors[key], index["weight_map"][key]
        else:
            tensors[new], index["weight_map"][new] = torch.ones(2), shard
        save_file(tensors, folder / shard)
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(ValueError, match=f"1 {change}"):
            VLM_FAMILIES[name].from_pretrained(folder)


@pytest.mark.parametrize("name", NAMES)
def test_saved_and_read_again(tmp_path, load, name):
    model = load(name)
    model.save_pretrained(tmp_path)
    again = VLM_FAMILIES[name].from_pretrained(tmp_path)
    assert again.config.to_dict() == {**model.config.to_dict(), **{k: again.config.to_dict()[k] for k in BOOKKEEPING}}
    images = [torch.randn(3, 12, 20), torch.randn(3, 8, 4)]
    assert all(torch.equal(a, b) for a, b in zip(per_image(model, images), per_image(again, images), strict=True))


BOOKKEEPING = ("transformers_version", "architectures", "dtype")


@pytest.mark.parametrize("name", NAMES)
def test_which_family_a_config_means(golden, name):
    raw = read_json(golden / name / "config.json")
    assert family_for(type_of(raw)) is VLM_FAMILIES[name] and part_of(raw) == VLM_FAMILIES[name].tower_prefix
    for model_type in VLM_FAMILIES[name].source_model_types:
        assert family_for(model_type) is VLM_FAMILIES[name]


# ---------------------------------------------------------------- Qwen3-VL


def qwen3_vl(golden, **changes):
    raw = read_json(golden / "qwen3_vl" / "config.json")
    return {**raw, "vision_config": {**raw["vision_config"], **changes}}


def test_a_later_vlm_by_what_its_config_says(golden):
    """An unknown model_type whose vision_config is one that is known; a field that is not known may be another net."""
    later = {**qwen3_vl(golden), "model_type": "qwen4_omni"}
    assert type_of(later) == "qwen3_vl" and family_for(type_of(later)) is Qwen3VLVisionPacking
    assert Qwen3VLVisionPacking.config_from_source(later).num_hidden_layers == 3
    with pytest.raises(ValueError, match=r"not known here: window_size 112"):
        Qwen3VLVisionPacking.config_from_source({**qwen3_vl(golden, window_size=112), "model_type": "qwen4_omni"})
    unknown = {**qwen3_vl(golden, model_type="qwen4_vl"), "model_type": "qwen4_vl"}
    with pytest.raises(ValueError, match="no packed encoder for model_type 'qwen4_vl'"):
        family_for(type_of(unknown))


def test_switches_of_the_config(golden):
    theta = qwen3_vl(golden, rope_parameters={"rope_type": "axial", "rope_theta": 500.0})
    assert Qwen3VLVisionPacking.config_from_source(theta).rope_theta == 500.0
    with pytest.raises(ValueError, match="type 'yarn'; this tower's are 'axial'"):
        Qwen3VLVisionPacking.config_from_source(qwen3_vl(golden, rope_parameters={"rope_type": "yarn"}))
    with pytest.raises(ValueError, match="square number, got 24"):
        Qwen3VLVisionPacking.config_from_source(qwen3_vl(golden, num_position_embeddings=24))
    with pytest.raises(ValueError, match=r"head width 10; 2-D rotary positions need a multiple of 4"):
        tiny("qwen3_vl", hidden_size=40, num_attention_heads=4)


# ---------------------------------------------------------------- frames


def test_rows_of_temporal_patches():
    """Frames in front of the pixels of a row; images are doubled, and an odd clip ends with its last frame twice."""
    image, clip = torch.randn(3, 4, 6), torch.randn(3, 5, 2, 4)
    rows, grid = batch_images_to_packing_input([image, clip], 2, frames_per_patch=2)
    assert grid.tolist() == [[1, 2, 3], [3, 1, 2]] and rows.shape == (12, 24)
    first = rows[1].view(3, 2, 2, 2)
    assert torch.equal(first[:, 0], image[:, :2, 2:4]) and torch.equal(first[:, 1], image[:, :2, 2:4])
    frames = rows[6:].view(3, 2, 3, 2, 2, 2)  # step, column, channel, frame
    assert torch.equal(frames[1, 0, :, 1], clip[:, 3, :, :2]) and torch.equal(frames[2, 1, :, 0], clip[:, 4, :, 2:])
    assert torch.equal(frames[2, :, :, 1], frames[2, :, :, 0])
    stacked, _ = batch_images_to_packing_input(torch.stack([image, image.flip(2)]), 2, frames_per_patch=2)
    assert torch.equal(stacked[:6], rows[:6])
    with_gradient = [image.clone().requires_grad_(), clip.clone().requires_grad_()]
    again, _ = batch_images_to_packing_input(with_gradient, 2, frames_per_patch=2)
    assert torch.equal(again, rows)
    again[6:].sum().backward()
    assert with_gradient[1].grad[:, :4].eq(1).all() and with_gradient[1].grad[:, 4].eq(2).all()
    assert len(unpatchify(rows[:, :12], grid, 2)) == 2


TEMPORAL = [name for name in NAMES if VLM_FAMILIES[name].takes_positions is False and name.startswith("qwen")]


@pytest.mark.parametrize("name", TEMPORAL)
def test_frames_see_each_other_within_a_patch_only(load, name):
    model = load(name)
    clip = torch.randn(3, 5, 8, 12)
    whole = per_image(model, [clip])[0].view(3, 6, -1)
    for step, frames in enumerate((clip[:, :2], clip[:, 2:4], clip[:, 4:])):
        assert_close(whole[step], per_image(model, [frames])[0], atol=1e-5)
    doubled = torch.stack([clip[:, 4], clip[:, 4]], dim=1)
    assert torch.equal(per_image(model, [doubled])[0], per_image(model, [clip[:, 4]])[0])


@pytest.mark.parametrize("name", TEMPORAL)
def test_positions_from_outside_are_refused(load, name):
    model = load(name)
    rows, grid = pack(model, [torch.randn(3, 2, 8, 8)])
    with pytest.raises(ValueError, match="takes no patch_positions"):
        model(rows, grid, patch_positions=torch.zeros(len(rows), 3))
    with pytest.raises(ValueError, match=r"2 frames.*got \[4, 48\]"):
        model(rows[:, :48], grid)


@pytest.mark.parametrize("name", NAMES)
def test_grids_that_are_no_whole_cells(load, name):
    """The VLM's projector would not take them; the tower does, and each image is what it is alone."""
    model = load(name)
    images = [torch.randn(3, 4 * h, 4 * w) for h, w in ((3, 5), (1, 1), (7, 2), (2, 9))]
    rows, grid = pack(model, images)
    for image, packed in zip(images, split_packed(model(rows, grid), read_grid(grid)), strict=True):
        assert_close(per_image(model, [image])[0], packed, atol=1e-5)


# ---------------------------------------------------------------- RADIO


def radio_folder(golden, folder):
    """The golden RADIO as a folder of its own, under the names of the hub; its config.json is yet to be written."""
    tensors = load_file(golden / "radio" / "model-00002-of-00003.safetensors")
    own = {key.removeprefix("vision_model."): value for key, value in tensors.items() if "radio_model" in key}
    save_file(own, folder / "model.safetensors")
    return read_json(golden / "radio" / "config.json")["vision_config"]


def test_statistics_of_pixels_are_those_of_the_tensors(tmp_path, golden, load):
    """transformers loads its buffers from the file, whatever the config says; so they are read from there here too."""
    vision = radio_folder(golden, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(vision))
    config = RadioPacking.from_pretrained(tmp_path).config
    assert_close(torch.tensor(config.norm_mean), torch.tensor(vision["norm_mean"]) + 0.01, atol=1e-6)
    assert config.norm_mean == load("radio").config.norm_mean
    processor = RadioPacking.load_image_processor(tmp_path, config)
    assert processor.do_rescale and not processor.do_normalize
    pixels = processor.preprocess(Image.new("RGB", (20, 12), (255, 0, 51)), return_tensors="pt")["pixel_values"][0]
    assert_close(pixels[:, 0, 0], torch.tensor([1.0, 0.0, 0.2]), atol=1e-6)


def test_nvidias_own_files(tmp_path, golden, load):
    """Their config.json has none of the fields: sizes are those of the tensors, heads those of the published width."""
    radio_folder(golden, tmp_path)
    own = {"args": {"model": "vit"}, "adaptor_names": [], "preferred_resolution": [24, 24], "version": "c-radio_v3"}
    (tmp_path / "config.json").write_text(json.dumps({**own, "model_type": ""}))
    with pytest.raises(ValueError, match=r"published in the widths 384, 768, .* not 32: give num_attention_heads"):
        RadioPacking.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**own, "num_attention_heads": 2}))
    model, whole = RadioPacking.from_pretrained(tmp_path), load("radio")
    assert model.config.image_size == 24 and model.config.max_img_size == 20 and model.config.layer_scale
    images = [torch.rand(3, 12, 20), torch.rand(3, 32, 8)]
    assert all(torch.equal(a, b) for a, b in zip(per_image(model, images), per_image(whole, images), strict=True))


def test_blocks_without_layer_scale(tmp_path, golden, load):
    """The hub's files have none where the factors are ones."""
    vision = radio_folder(golden, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({key: value for key, value in tensors.items() if "scale" not in key}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(vision))
    model, scaled = RadioPacking.from_pretrained(tmp_path), load("radio")
    assert not model.config.layer_scale and not any("layer_scale" in key for key in model.state_dict())
    with torch.no_grad():
        for key, parameter in scaled.named_parameters():
            if "layer_scale" in key:
                parameter.fill_(1.0)
    image = torch.rand(3, 8, 12)
    assert_close(per_image(model, [image])[0], per_image(scaled, [image])[0], atol=1e-6)
