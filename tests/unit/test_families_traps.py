"""Each mistake that the specification warns of, made on purpose: the golden tensors see it."""

import pytest
import torch
from conftest import ATOL, assert_close
from families import GOLDEN_FAMILIES
from torch.nn import functional as F

from llava_packing_tower.data.patches import PatchLayout, batch_images_to_packing_input, split_packed
from llava_packing_tower.data.positions import prefix_indices
from llava_packing_tower.kernels.rotary import rotate_interleaved
from llava_packing_tower.models import aimv2, dinov3, siglip2

pytestmark = pytest.mark.newest
NAMES = list(GOLDEN_FAMILIES)


@pytest.fixture
def load(golden):
    return lambda name, **options: GOLDEN_FAMILIES[name].from_pretrained(golden / name, **options)


def golden_error(model, expected):
    last, states = model(expected["patches"], expected["grid_thw"], output_hidden_states=True)
    return max(
        (last - expected["last_hidden_state"]).abs().max().item(),
        (torch.stack(states) - expected["hidden_states"]).abs().max().item(),
    )


def visible(model, expected):
    """The error of a wrong variant is far outside of the tolerance."""
    assert golden_error(model, expected) > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_trap_channel_first_rows(load, golden_case, name):
    expected, model = golden_case(name, "images"), load(name)
    images = [expected[f"pixels.{i}"] for i in range(len(expected["grid_thw"]))]
    rows, _ = batch_images_to_packing_input(images, model.config.patch_size, PatchLayout.CHANNEL_FIRST)
    visible(model, {**expected, "patches": rows})


@pytest.mark.parametrize("option", [{"antialias": False}, {"align_corners": True}, {"mode": "bicubic"}])
def test_trap_resizing(load, golden_case, monkeypatch, option):
    interpolate = F.interpolate
    monkeypatch.setattr(siglip2.F, "interpolate", lambda *a, **k: interpolate(*a, **{**k, **option}))
    siglip2.axis_weights.cache_clear()
    visible(load("siglip2"), golden_case("siglip2", "images"))
    siglip2.axis_weights.cache_clear()


def test_trap_row_first_sincos(load, golden_case, monkeypatch):
    right = aimv2.sincos_positions

    def row_first(*args):
        return torch.cat(right(*args).chunk(2, dim=1)[::-1], dim=1)

    monkeypatch.setattr(aimv2, "sincos_positions", row_first)
    visible(load("aimv2_native"), golden_case("aimv2_native", "images"))


@pytest.mark.parametrize("name", ["aimv2_native", "aimv2_learned"])
def test_trap_position_before_norm(load, golden_case, monkeypatch, name):
    model = load(name)
    norm, model.norm_pre = model.norm_pre, torch.nn.Identity()
    prepare = model.prepare

    def norm_last(tokens, grids, positions):
        tokens, *rest = prepare(tokens, grids, positions)
        return norm(tokens), *rest

    monkeypatch.setattr(model, "prepare", norm_last)
    visible(model, golden_case(name, "images"))


def test_trap_neighbour_rotation(load, golden_case):
    model = load("dinov3")
    for layer in model.encoder.layers:
        layer.self_attn.rotate = rotate_interleaved
    visible(model, golden_case("dinov3", "images"))


def test_trap_rotated_prefix(load, golden_case, monkeypatch):
    model, rotary = load("dinov3"), dinov3.rotary_2d
    case = golden_case("dinov3", "images")
    lengths = tuple(case["grid_thw"].prod(1).tolist())

    def with_prefix(centres, *rest):
        _, patches = prefix_indices(lengths, len(model.prefix.weight), centres.device)
        return rotary(torch.ones_like(centres).index_copy(0, patches, centres[patches]), *rest)

    monkeypatch.setattr(dinov3, "rotary_2d", with_prefix)
    visible(model, case)


def test_trap_one_scale_for_both_axes(load, golden_case, monkeypatch):
    def by_longer_side(grids, device):
        indices = [torch.cartesian_prod(torch.arange(h), torch.arange(w)).float() for _, h, w in grids]
        return torch.cat([2 * (part + 0.5) / max(h, w) - 1 for part, (_, h, w) in zip(indices, grids)])

    monkeypatch.setattr(dinov3, "patch_centres", by_longer_side)
    visible(load("dinov3"), golden_case("dinov3", "images"))


@pytest.mark.parametrize("name", NAMES)
def test_trap_normed_hidden_states(load, golden_case, name):
    """The last hidden state is not the normed output."""
    expected = golden_case(name, "images")
    assert (expected["hidden_states"][-1] - expected["last_hidden_state"]).abs().max() > 1e-2
    assert (load(name).final_norm(expected["hidden_states"][-1]) - expected["last_hidden_state"]).abs().max() < 2e-5


@pytest.mark.parametrize(
    ("name", "field", "wrong"),
    [
        ("siglip2", "layer_norm_eps", 1e-5),
        ("aimv2_native", "rms_norm_eps", 1e-4),
        ("aimv2_learned", "rms_norm_eps", 1e-4),
        ("dinov3", "layer_norm_eps", 1e-4),
        ("siglip2", "hidden_act", "gelu"),
        ("aimv2_native", "hidden_act", "gelu"),
        ("dinov3", "hidden_act", "gelu_pytorch_tanh"),
        ("dinov3", "rope_theta", 10000.0),
    ],
)
def test_trap_of_the_config(golden, golden_case, name, field, wrong):
    """The smallest mistakes that there are; the tolerance of the golden test is below each of them."""
    cls, expected = GOLDEN_FAMILIES[name], golden_case(name, "images")
    right = cls.from_pretrained(golden / name)
    config = cls.config_class.from_dict({**right.config.to_dict(), field: wrong})
    assert getattr(right.config, field) != wrong and golden_error(right, expected) < ATOL
    assert golden_error(cls.from_pretrained(golden / name, config=config), expected) > 2 * ATOL


@pytest.mark.parametrize("name", ["aimv2_native", "dinov3"])
def test_trap_qkv_order(load, golden_case, name):
    model = load(name)
    for parameter in (layer.self_attn.qkv.weight for layer in model.encoder.layers):
        q, k, v = parameter.data.chunk(3)
        parameter.data = torch.cat([k, q, v])
    visible(model, golden_case(name, "images"))


def test_trap_gate_and_up(load, golden_case):
    """The remote-code files call the gate fc1 and the way up fc3."""
    model = load("aimv2_native")
    for layer in model.encoder.layers:
        layer.mlp.gate, layer.mlp.fc1 = layer.mlp.fc1, layer.mlp.gate
    visible(model, golden_case("aimv2_native", "images"))


def test_prefix_tokens_in_order(load, golden_case, monkeypatch):
    """CLS first, then the registers: patches cannot tell, the prefix's own outputs can."""
    model, expected = load("dinov3"), golden_case("dinov3", "images")
    prepare = model.prepare
    monkeypatch.setattr(model, "prepare", lambda *inputs: (*prepare(*inputs)[:3], None))
    everything = model(expected["patches"], expected["grid_thw"])
    segments = split_packed(everything, [(1, 1, h * w + 5) for _, h, w in expected["grid_thw"].tolist()])
    assert_close(torch.stack([tokens[:5] for tokens in segments]), expected["prefix_last_hidden_state"])
    assert_close(torch.stack([tokens[0] for tokens in segments]), expected["pooler_output"])
