"""liger-kernel in a decoder's layers: stand-ins for its kernels, which need a GPU, show what is asked of it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn.functional import silu
from transformers import Qwen2Config, Qwen2ForCausalLM

from llava_packing_tower.integrations.llava import liger
from llava_packing_tower.integrations.llava.decoder_attention import read_rows, without_mask
from llava_packing_tower.integrations.llava.liger import fuse_layers, unsupported_liger, wrong_layers
from llava_packing_tower.integrations.llava.patcher import Patches
from llava_packing_tower.multimodal.packed_decoder import pack_batch

pytestmark = pytest.mark.newest
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def rms_norm(x, weight, eps, offset=0.0, casting_mode="llama", in_place=True):
    assert not in_place and casting_mode == "llama" and offset == 0.0
    wide = x.double()
    return (weight.double() * wide * (wide.pow(2).mean(-1, True) + eps).rsqrt()).to(x.dtype)


def rope(q, k, cos, sin, position_ids=None, unsqueeze_dim=1, rotary_dim=None):
    half = q.shape[-1] // 2
    turn = [torch.cat((-x[..., half:], x[..., :half]), dim=-1) for x in (q, k)]
    return tuple(x * cos[:, None] + y * sin[:, None] for x, y in zip((q, k), turn))


def swiglu(a, b):
    return silu(a) * b


@pytest.fixture
def installed(monkeypatch):
    """Stand-ins that count their calls; torch has no RMSNorm of its own."""
    calls = {}
    monkeypatch.setattr(liger, "TORCH_NORM", False)

    def counted(name, function):
        def call(*args, **kwargs):
            calls[name] = calls.get(name, 0) + 1
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(liger, "missing_package", None)
    monkeypatch.setattr(liger, "on_gpu", lambda tensor: True)
    for name, function in (("liger_rms_norm", rms_norm), ("liger_rope", rope), ("liger_swiglu", swiglu)):
        monkeypatch.setattr(liger, name, counted(name, function), raising=False)
    return calls


@pytest.fixture
def patches():
    patches = Patches()
    yield patches
    patches.undo()


@pytest.fixture
def model():
    config = Qwen2Config(vocab_size=20, num_key_value_heads=2, pad_token_id=0, **SIZES)
    model = Qwen2ForCausalLM(config).train()
    with torch.no_grad():  # as made, attention is so flat that its gradients are noise
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.4 + ("norm" in name))
    return model


def run(model):
    """Hidden states and gradients of two samples in one row."""
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()
    row = pack_batch(mask, torch.full((2, 5), -100))
    generator = torch.Generator().manual_seed(3)
    embeds = torch.randn(1, 8, 32, generator=generator)
    with without_mask(model.model):
        out = model.model(inputs_embeds=embeds, position_ids=row.position_ids, use_cache=False)[0]
    gradients = torch.autograd.grad(
        out.square().sum(), [p for n, p in model.model.named_parameters() if "embed" not in n]
    )
    return [out, *gradients]


def test_right_kernels_pass_and_wrong_ones_do_not(installed, model, monkeypatch):
    layer = model.model.layers[0]
    assert wrong_layers(layer, torch.device("cpu"), torch.float32) is None
    assert wrong_layers(layer, torch.device("cpu"), torch.bfloat16) is None
    wrong = (
        ("RMSNorm", "liger_rms_norm", lambda x, w, eps, in_place: rms_norm(x, w, eps + 0.3, in_place=in_place)),
        ("RMSNorm", "liger_rms_norm", lambda x, w, eps, in_place: rms_norm(x, w + 0.05, eps, in_place=in_place)),
        ("rotary", "liger_rope", lambda q, k, cos, sin: rope(q, k, cos, -sin)),
        ("SwiGLU", "liger_swiglu", lambda a, b: silu(b) * a),
    )
    for name, function, stand_in in wrong:
        with monkeypatch.context() as change:
            change.setattr(liger, function, stand_in)
            assert f"{name} is wrong" in wrong_layers(layer, torch.device("cpu"), torch.float32)
            assert f"{name} is wrong" in wrong_layers(layer, torch.device("cpu"), torch.bfloat16)

    def fails(*args, **kwargs):
        raise RuntimeError("no such kernel\nand more")

    monkeypatch.setattr(liger, "liger_swiglu", fails)
    assert wrong_layers(layer, torch.device("cpu"), torch.float32) == "its SwiGLU fails: RuntimeError: no such kernel"


def test_a_gradient_that_is_wrong_is_seen(installed, model, monkeypatch):
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, a, b):
            ctx.save_for_backward(a, b)
            return silu(a) * b

        @staticmethod
        def backward(ctx, gradient):
            a, b = ctx.saved_tensors
            return gradient * b, gradient * silu(a)

    monkeypatch.setattr(liger, "liger_swiglu", Wrong.apply)
    assert "SwiGLU" in wrong_layers(model.model.layers[0], torch.device("cpu"), torch.float32)


def test_a_backward_that_writes_over_its_inputs_is_taken(installed, model, monkeypatch):
    class InPlace(torch.autograd.Function):
        """As liger's own: the gradients stand in the tensors that the forward was given."""

        @staticmethod
        def forward(ctx, a, b):
            ctx.save_for_backward(a, b)
            return (silu(a.float()) * b.float()).to(a.dtype)

        @staticmethod
        def backward(ctx, gradient):
            a, b = ctx.saved_tensors
            wide, sigmoid = a.float(), torch.sigmoid(a.float())
            of_b = gradient.float() * silu(wide)
            of_a = gradient.float() * b.float() * sigmoid * (1 + wide * (1 - sigmoid))
            a.data.copy_(of_a)
            b.data.copy_(of_b)
            return a, b

    monkeypatch.setattr(liger, "liger_swiglu", InPlace.apply)
    assert wrong_layers(model.model.layers[0], torch.device("cpu"), torch.bfloat16) is None


def test_this_decoder_computes_with_it_and_others_do_not(installed, model, patches):
    read_rows(type(model.model.layers[0].self_attn), patches)
    other = copy.deepcopy(model)
    expected = run(model)
    assert not installed
    fuse_layers(model, patches, on=True)
    found = run(model)
    assert installed == {"liger_rms_norm": 5, "liger_rope": 2, "liger_swiglu": 2}
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() <= 1e-4 * b.abs().max()
    installed.clear()
    run(other)
    assert not installed
    fuse_layers(model, patches, on=False)
    run(model)
    assert not installed


def test_the_norm_is_torchs_where_torch_has_one(installed, model, patches, monkeypatch):
    monkeypatch.setattr(liger, "TORCH_NORM", True)
    read_rows(type(model.model.layers[0].self_attn), patches)
    expected = run(model)
    fuse_layers(model, patches, on=True)
    found = run(model)
    assert installed == {"liger_rope": 2, "liger_swiglu": 2}
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() <= 1e-4 * b.abs().max()
    layer = model.model.layers[0]
    assert wrong_layers(layer, torch.device("cpu"), torch.bfloat16) is None
    monkeypatch.setattr(
        torch.nn.functional, "rms_norm", lambda x, shape, weight, eps: rms_norm(x, weight, eps + 0.3, in_place=False)
    )
    assert "RMSNorm is wrong" in wrong_layers(layer, torch.device("cpu"), torch.bfloat16)


def test_off_is_nothing_for_a_model_of_other_modules(patches):
    """A decoder of a class that is not known has no plan but this."""
    fuse_layers(torch.nn.Sequential(torch.nn.Linear(2, 3)), patches, on=False)


def test_undone(installed, model, patches):
    before = type(model.model.norm).forward, type(model.model.layers[0].mlp).forward
    fuse_layers(model, patches, on=True)
    assert (type(model.model.norm).forward, type(model.model.layers[0].mlp).forward) != before
    patches.undo()
    assert (type(model.model.norm).forward, type(model.model.layers[0].mlp).forward) == before


def test_when_it_is_off(model, monkeypatch):
    monkeypatch.setattr(liger, "missing_package", "not installed: pip install liger-kernel")
    assert unsupported_liger(model, False) == "mm_packing_liger: false"
    assert "pip install liger-kernel" in unsupported_liger(model, None)
    with pytest.raises(ValueError, match=r"use_liger_kernel is true, .*pip install liger-kernel"):
        unsupported_liger(model, True)
    monkeypatch.setattr(liger, "missing_package", None)
    assert unsupported_liger(model, None) == "needs a CUDA GPU"
    model.model.layers[0].mlp.act_fn = torch.nn.GELU()
    assert liger._unlike(model.model.layers[0]) == "the activation is GELU"
