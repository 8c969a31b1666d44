"""The compiled forms of activations and the hand-over of residual sums: the same numbers as the plain forms."""

import pytest
import torch

from llava_packing_tower.activations import Gelu, GeluTanh, activation, fast_gelu, normal_cdf
from llava_packing_tower.layers import BlockConfig, EncoderBlock
from llava_packing_tower.packing import make_segments
from llava_packing_tower.rotation import ROTATIONS, _Rotated, rotated


def test_normal_cdf():
    x = torch.linspace(-9, 9, 20001, dtype=torch.float64)
    torch.testing.assert_close(normal_cdf(x.float()).double(), torch.special.ndtr(x), atol=3e-7, rtol=0)


def test_fast_gelu_is_the_exact_gelu():
    """In bf16 it must round to the exact value's neighbour at worst: an error of one unit in the last place."""
    x = torch.cat([torch.linspace(-8, 8, 4001), torch.randn(4000)])
    exact = torch.nn.functional.gelu(x.double())
    torch.testing.assert_close(fast_gelu(x).double(), exact, atol=1e-6, rtol=0)
    tanh_form = torch.nn.functional.gelu(x.double(), approximate="tanh")
    assert (tanh_form - exact).abs().max() > 1e-4  # the tanh form would not pass


def test_fast_gelu_gradient():
    x = torch.randn(3000, requires_grad=True)
    weight = torch.randn(3000)
    (fast,) = torch.autograd.grad((fast_gelu(x) * weight).sum(), x)
    wide = x.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad((torch.nn.functional.gelu(wide) * weight.double()).sum(), wide)
    torch.testing.assert_close(fast.double(), exact, atol=3e-6, rtol=0)


@pytest.mark.parametrize("name", ["gelu", "gelu_pytorch_tanh"])
def test_compiled_forms(name):
    """Compiled bf16: as close to the float64 value as the plain bf16 form is."""
    module = activation(name)
    x = (torch.randn(4096) * 3).bfloat16().requires_grad_()
    with torch.no_grad():
        exact = module(x.double())
    torch._dynamo.reset()
    calls = []

    def backend(graph, inputs):
        calls.append([n.target for n in graph.graph.nodes if n.op in ("call_function", "call_method")])
        return graph

    compiled = torch.compile(module, backend=backend)
    out = compiled(x)
    assert not any("gelu" in str(target) for target in calls[0]), "the fast form was not taken"
    plain = module(x)
    assert (out - exact).abs().max() <= (plain - exact).abs().max() * 1.01
    assert activation("silu")(x).shape == x.shape


def test_gelu_kinds_differ():
    x = torch.randn(100)
    assert torch.equal(Gelu()(x), torch.nn.functional.gelu(x))
    assert torch.equal(GeluTanh()(x), torch.nn.functional.gelu(x, approximate="tanh"))


def test_a_pending_sum_is_added_once():
    block = EncoderBlock(BlockConfig(32, 48, 2, "gelu"))
    segments = make_segments([3, 5])
    a, b = torch.randn(8, 32), torch.randn(8, 32)
    apart = sum(block(a, b, segments, None, "eager"))
    whole = sum(block(a + b, None, segments, None, "eager"))
    assert torch.equal(apart, whole)
    assert not torch.allclose(apart, sum(block(a, None, segments, None, "eager")))


@pytest.mark.parametrize("kind", list(ROTATIONS))
def test_the_backward_of_the_rotation_in_one_kernel(kind):
    """The compiled training form: the same rotated q, k and v, and the same gradients, as autograd's."""
    qkv = torch.randn(7, 3, 2, 16)
    angles = torch.randn(7, 1, 16)  # no two alike, unlike in a rotary table: a swapped partner would show
    cos, sin = angles.cos(), 2 * angles.sin()
    grads = [torch.randn(7, 2, 16) for _ in range(3)]

    def run(form):
        leaf = qkv.clone().requires_grad_()
        parts = form(leaf, cos, sin, ROTATIONS[kind])
        return [*parts, *torch.autograd.grad(parts, leaf, grads)]

    torch._dynamo.reset()
    compiled = run(torch.compile(rotated, backend="aot_eager", fullgraph=True))
    for got, want in zip(compiled, run(rotated), strict=True):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=0)
    direct = run(lambda *inputs: _Rotated.apply(*inputs[:3], kind == "pairs"))
    for got, want in zip(direct, run(rotated), strict=True):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=0)
