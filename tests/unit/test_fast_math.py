"""The parts of a block: activations, and the hand-over of residual sums."""

import torch

from llava_packing_tower.data.segments import make_segments
from llava_packing_tower.models.activations import activation
from llava_packing_tower.models.layers import BlockConfig, EncoderBlock


def test_gelu_kinds_differ():
    x = torch.randn(100)
    exact, tanh_form = activation("gelu")(x), activation("gelu_pytorch_tanh")(x)
    assert torch.equal(exact, torch.nn.functional.gelu(x))
    assert torch.equal(tanh_form, torch.nn.functional.gelu(x, approximate="tanh"))
    assert not torch.equal(exact, tanh_form) and activation("silu")(x).shape == x.shape


def test_the_tanh_form_of_exact_sums_is_nearer_than_the_exact_form_of_rounded_ones():
    """Why fused inference in bf16 may apply the tanh form inside of the product."""
    for spread in (0.3, 1.0, 3.0):
        sums = torch.randn(20000, dtype=torch.float64) * spread
        exact = torch.nn.functional.gelu(sums)
        inside = torch.nn.functional.gelu(sums, approximate="tanh").bfloat16()
        apart = torch.nn.functional.gelu(sums.bfloat16())
        assert (inside - exact).square().mean() < (apart - exact).square().mean()


def test_a_pending_sum_is_added_once():
    block = EncoderBlock(BlockConfig(32, 48, 2, "gelu"))
    segments = make_segments([3, 5])
    a, b = torch.randn(8, 32), torch.randn(8, 32)
    apart = sum(block(a, b, segments, None, "eager"))
    whole = sum(block(a + b, None, segments, None, "eager"))
    assert torch.equal(apart, whole)
    assert not torch.allclose(apart, sum(block(a, None, segments, None, "eager")))
