"""The check of liger-kernel's layers, on a CPU: stand-ins that are right are taken, wrong ones are named."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from llava_packing_tower.integrations.llava import liger

WIDTH, MIDDLE, HEAD = 48, 80, 16


class SwiGLU(torch.autograd.Function):
    """As liger's: the backward writes the gradients over what the forward was given."""

    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return (F.silu(a.float()) * b.float()).to(a.dtype)

    @staticmethod
    def backward(ctx, grad):
        a, b = ctx.saved_tensors
        a32, sigmoid = a.float(), torch.sigmoid(a.float())
        grad_b = (grad.float() * F.silu(a32)).to(b.dtype)
        grad_a = (grad.float() * b.float() * sigmoid * (1 + a32 * (1 - sigmoid))).to(a.dtype)
        a.data.copy_(grad_a)
        b.data.copy_(grad_b)
        return a, b


def rms_norm(x, weight, eps, in_place):
    assert not in_place
    unit = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, True) + eps)
    return (weight * unit.to(x.dtype)).to(x.dtype)


def rope(q, k, cos, sin):
    def turned(x):
        half = torch.cat((-x[..., HEAD // 2 :], x[..., : HEAD // 2]), dim=-1)
        return (x.float() * cos[:, None].float() + half.float() * sin[:, None].float()).to(x.dtype)

    return turned(q), turned(k)


def check(monkeypatch, **changed):
    made = {"liger_rms_norm": rms_norm, "liger_rope": rope, "liger_swiglu": SwiGLU.apply, **changed}
    for name, function in made.items():
        monkeypatch.setattr(liger, name, function, raising=False)
    layer = SimpleNamespace(
        input_layernorm=SimpleNamespace(variance_epsilon=1e-6),
        mlp=SimpleNamespace(down_proj=SimpleNamespace(in_features=MIDDLE)),
        self_attn=SimpleNamespace(head_dim=HEAD),
        hidden_size=WIDTH,
    )
    return liger.wrong_layers(layer, torch.device("cpu"), torch.bfloat16)


def test_right_layers_are_taken_also_where_a_backward_writes_over_its_inputs(monkeypatch):
    assert check(monkeypatch) is None


@pytest.mark.parametrize(
    "changed, words",
    [
        ({"liger_swiglu": lambda a, b: F.silu(b) * a}, "SwiGLU is wrong"),
        ({"liger_rope": lambda q, k, cos, sin: rope(q, k, cos, -sin)}, "rotary is wrong"),
        ({"liger_rms_norm": lambda x, w, eps, in_place: rms_norm(x, w + 0.05, eps, in_place)}, "RMSNorm is wrong"),
        ({"liger_swiglu": lambda a, b: 1 / 0}, "SwiGLU fails: ZeroDivisionError"),
    ],
)
def test_wrong_layers_are_named(monkeypatch, changed, words):
    assert words in check(monkeypatch, **changed)
