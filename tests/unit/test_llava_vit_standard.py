"""The standard model against the golden tensors, and the parts of its contract that they do not reach."""

import pytest
import torch
from conftest import assert_close
from safetensors.torch import load_file

from llava_packing_tower.models.llava_vit.standard import (
    LlavaViTConfig,
    LlavaViTModel,
    OneVisionEncoderConfig,
    OneVisionEncoderModel,
    residual_indices,
)


def onevision(golden):
    config = OneVisionEncoderConfig.from_pretrained(golden / "onevision_encoder")
    return LlavaViTModel.from_pretrained(golden / "llava_vit", config=config)


def samples(case):
    """(pixels, tokens per sample) in the order of the pack."""
    pixels = [case[f"pixels.{i}"] for i in range(len(case["grid_thw"]))]
    return list(zip(pixels, case["grid_thw"].prod(1).tolist()))


def clip_and_indices(pixels, frames, patch, context=64):
    """The frames at their places in a clip of zeros, and the flat indices of their patches."""
    clip = torch.zeros(1, 3, context, *pixels.shape[-2:])
    clip[0, :, frames] = pixels if pixels.dim() == 4 else pixels[:, None]
    plane = pixels.shape[-1] * pixels.shape[-2] // patch**2
    return clip, (torch.tensor(frames)[:, None] * plane + torch.arange(plane)).flatten()[None]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("folder", "name"),
    [("llava_vit", "images"), ("llava_vit", "mixed"), ("llava_vit", "video8"), ("llava_vit_variant", "images")],
)
def test_every_golden_case_sample_by_sample(golden, golden_case, folder, name, attention):
    model = LlavaViTModel.from_pretrained(golden / folder, attn_implementation=attention)
    case, patch, start = golden_case(folder, name), model.config.patch_size, 0
    for index, (pixels, count) in enumerate(samples(case)):
        rows = slice(start, start + count)
        start += count
        if pixels.dim() == 4:
            frames = case["patch_positions"][rows, 0].unique().tolist()
            clip, visible = clip_and_indices(pixels, frames, patch)
        else:
            clip, visible = pixels[None], None
        with torch.no_grad():
            out = model(clip, visible_indices=visible, output_hidden_states=True)
        assert_close(out.last_hidden_state[0], case["last_hidden_state"][rows])
        if "hidden_states" in case:
            assert_close(torch.stack(out.hidden_states)[:, 0], case["hidden_states"][:, rows])
        if "pooler_output" in case:
            assert_close(out.pooler_output[0], case["pooler_output"][index])
        else:
            assert out.pooler_output is None


def test_a_plain_clip_stands_at_frames_0_to_t(golden, golden_case):
    case = golden_case("llava_vit", "video8_default_positions")
    out = LlavaViTModel.from_pretrained(golden / "llava_vit")(case["pixels.0"][None])
    assert_close(out.last_hidden_state[0], case["last_hidden_state"])
    assert_close(out.pooler_output, case["pooler_output"])


@torch.no_grad()
def test_onevision_reads_images_clips_indices_and_positions(golden, golden_case):
    model = onevision(golden)
    case = golden_case("onevision_encoder", "image")
    out = model(case["pixels.0"][None], output_hidden_states=True)
    assert_close(out.last_hidden_state[0], case["last_hidden_state"])
    assert_close(torch.stack(out.hidden_states)[:, 0], case["hidden_states"])
    case = golden_case("onevision_encoder", "video")
    clip = case["pixels.0"][None]
    for options in ({"visible_indices": case["visible_indices"]}, {"patch_positions": case["patch_positions"][None]}):
        out = model(clip, **options)
        assert_close(out.last_hidden_state[0], case["last_hidden_state"])
        assert_close(out.pooler_output, case["pooler_output"])
    out = model(clip)
    assert_close(out.last_hidden_state[0], case["last_hidden_state_no_positions"])
    with pytest.raises(ValueError, match="0 to 383"):
        model(torch.zeros(1, 3, 65, 8, 12))


def test_onevision_folder_loads_with_its_own_config_and_by_auto_model(golden, tmp_path):
    from transformers import AutoModel

    (tmp_path / "config.json").write_text((golden / "onevision_encoder" / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes((golden / "llava_vit" / "model.safetensors").read_bytes())
    assert isinstance(LlavaViTModel.from_pretrained(tmp_path).config, OneVisionEncoderConfig)
    model = AutoModel.from_pretrained(tmp_path)
    assert isinstance(model, OneVisionEncoderModel) and model.config.rope_temporal_size == 64
    assert isinstance(AutoModel.from_pretrained(golden / "llava_vit"), LlavaViTModel)


def test_saved_keys_and_values_are_those_of_the_checkpoint(golden, tmp_path):
    LlavaViTModel.from_pretrained(golden / "llava_vit").save_pretrained(tmp_path / "out")
    left, right = (
        load_file(golden / "llava_vit" / "model.safetensors"),
        load_file(tmp_path / "out" / "model.safetensors"),
    )
    assert left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


@torch.no_grad()
def test_residual_map_keeps_the_strongest_patches_in_order(golden):
    model = LlavaViTModel.from_pretrained(golden / "llava_vit")
    clip, residual = torch.randn(2, 3, 3, 8, 12), torch.randn(2, 3, 3, 8, 12)
    chosen = residual_indices(residual, 4, keep=7)
    energy = residual.abs().unfold(3, 4, 4).unfold(4, 4, 4).sum((1, 5, 6)).flatten(1)
    for row, indices in zip(energy, chosen):
        assert indices.tolist() == sorted(row.argsort(descending=True)[:7].tolist())
    all_patches = model(clip, visible_indices=residual)  # 18 patches, fewer than 2048
    assert_close(all_patches.last_hidden_state, model(clip).last_hidden_state)


@torch.no_grad()
def test_feature_layers_are_the_hidden_states(golden):
    model = LlavaViTModel.from_pretrained(golden / "llava_vit")
    pixels = torch.randn(2, 3, 8, 12)
    states = model(pixels, output_hidden_states=True).hidden_states
    for index, state in zip((2, 0), model(pixels, feature_layers=(2, 0))):
        assert torch.equal(state, states[index])


def test_gradient_checkpointing_changes_nothing():
    model = LlavaViTModel(LlavaViTConfig(64, 96, 3, 2, patch_size=4)).train()
    pixels, grads = torch.randn(2, 3, 8, 12), []
    for checkpointing in (False, True):
        model.zero_grad()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(pixels).pooler_output.square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert model.encoder.gradient_checkpointing
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads))


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((1, 3, 8), {}, "got \\[1, 3, 8\\]"),
        ((1, 4, 8, 8), {}, "got \\[1, 4, 8, 8\\]"),
        ((1, 3, 8, 10), {}, "multiples of 4"),
        ((1, 3, 8, 8), {"visible_indices": torch.tensor([[0, 4]])}, "0 to 4.*0 to 3"),
        ((1, 3, 8, 8), {"visible_indices": torch.tensor([[-1, 2]])}, "-1 to 2"),
        ((2, 3, 8, 8), {"visible_indices": torch.tensor([[0, 2]])}, "\\[2, K\\]"),
        ((1, 3, 2, 8, 8), {"visible_indices": torch.zeros(1, 3, 1, 8, 8)}, "residual map"),
        ((1, 3, 8, 8), {"patch_positions": torch.zeros(1, 5, 3)}, "\\[1, 4, 3\\]"),
    ],
)
def test_bad_input(golden, shape, options, message):
    model = LlavaViTModel.from_pretrained(golden / "llava_vit")
    with pytest.raises(ValueError, match=message):
        model(torch.zeros(shape), **options)


def test_unknown_attention_backend(golden):
    with pytest.raises(ValueError, match="auto, sdpa and eager"):
        LlavaViTModel.from_pretrained(golden / "llava_vit", attn_implementation="flash_attention_2")
