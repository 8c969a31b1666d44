"""The compiled forms of activations and the hand-over of residual sums: the same numbers as the plain forms."""

import pytest
import torch

from llava_packing_tower.activations import Gelu, GeluTanh, activation, fast_gelu, normal_cdf
from llava_packing_tower.layers import BlockConfig, EncoderBlock
from llava_packing_tower.linears import add_linear, linear_act
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


@pytest.mark.parametrize("name", ["gelu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("spread", [0.3, 1.0, 3.0])
def test_linear_and_gelu_in_one_kernel(name, spread):
    """Compiled bf16 inference: nearer to the exact GELU of the exact product than the two steps in bf16."""
    linear, act = torch.nn.Linear(48, 512).bfloat16(), activation(name)
    x = (torch.randn(300, 48) * spread * 1.7).bfloat16()
    torch._dynamo.reset()
    with torch.no_grad():
        exact = act(torch.nn.functional.linear(*(t.double() for t in (x, linear.weight, linear.bias))))
        plain = act(linear(x))
        calls = []
        compiled = torch.compile(linear_act, backend=lambda graph, _: calls.append(str(graph.graph)) or graph)
        fused = compiled(linear, act, x)
    assert "linear_gelu" in calls[0]
    assert (fused - exact).square().mean() < (plain - exact).square().mean()
    compiled(linear, act, x).sum().backward()  # training takes the two steps
    assert "linear_gelu" not in calls[1] and linear.weight.grad is not None
    assert torch.equal(linear_act(linear, act, x), act(linear(x)))


@pytest.mark.parametrize("act, dtype", [("silu", torch.bfloat16), ("gelu", torch.float32), ("gelu", torch.float16)])
def test_other_activations_and_dtypes_take_two_steps(act, dtype):
    linear, act = torch.nn.Linear(8, 16).to(dtype), activation(act)
    torch._dynamo.reset()
    calls = []
    with torch.no_grad():
        compiled = torch.compile(linear_act, backend=lambda graph, _: calls.append(str(graph.graph)) or graph)
        compiled(linear, act, torch.randn(5, 8, dtype=dtype))
    assert calls and "linear_gelu" not in calls[0]


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


@pytest.mark.parametrize("bias", [True, False])
def test_a_product_is_summed_onto_the_residual(bias):
    """Compiled bf16 inference: as near to the exact sum as product and sum apart; inputs stay as they are."""
    linear = torch.nn.Linear(48, 64, bias=bias).bfloat16()
    residual, x = (torch.randn(300, n).bfloat16() * 2 for n in (64, 48))
    before = residual.clone()
    torch._dynamo.reset()
    with torch.no_grad():
        wide = [None if t is None else t.double() for t in (x, linear.weight, linear.bias)]
        exact = residual.double() + torch.nn.functional.linear(*wide)
        calls = []
        compiled = torch.compile(add_linear, backend=lambda graph, _: calls.append(str(graph.graph)) or graph)
        fused = compiled(residual, linear, x)
    assert "add_product" in calls[0] and torch.equal(residual, before)
    plain = add_linear(residual, linear, x)
    assert torch.equal(plain, residual + linear(x)) and torch.equal(add_linear(None, linear, x), linear(x))
    assert (fused - exact).square().mean() <= 1.3 * (plain - exact).square().mean()
    compiled(residual, linear, x).sum().backward()  # training: apart
    assert "add_product" not in calls[1] and linear.weight.grad is not None


@pytest.mark.parametrize("dtypes", [(torch.float32,) * 3, (torch.float32, torch.bfloat16, torch.bfloat16)])
def test_other_dtypes_are_summed_apart(dtypes):
    """float32, and a float32 residual under autocast."""
    linear = torch.nn.Linear(8, 16).to(dtypes[2])
    torch._dynamo.reset()
    calls = []
    with torch.no_grad():
        compiled = torch.compile(add_linear, backend=lambda graph, _: calls.append(str(graph.graph)) or graph)
        compiled(torch.randn(5, 16, dtype=dtypes[0]), linear, torch.randn(5, 8, dtype=dtypes[1]))
    assert calls and "add_product" not in calls[0]


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
