"""Linear layers in one kernel with what follows them, where a block is compiled for half-precision inference."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from .activations import HALF, Gelu, GeluTanh

if hasattr(torch.library, "custom_op"):  # torch 2.4 and newer

    @torch.library.custom_op("llava_packing::linear_gelu", mutates_args=())
    def _linear_gelu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        if x.is_cuda:
            return torch._addmm_activation(bias, x, weight.t(), use_gelu=True)
        product = nn.functional.linear(x.float(), weight.float(), bias.float())
        return nn.functional.gelu(product, approximate="tanh").to(x.dtype)

    @_linear_gelu.register_fake
    def _(x, weight, bias):
        return x.new_empty(x.shape[0], weight.shape[0])

    @torch.library.custom_op("llava_packing::add_product_", mutates_args=("total",))
    def _add_product(total: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
        total.addmm_(x, weight.t())

    @_add_product.register_fake
    def _(total, x, weight):
        return None

else:
    _linear_gelu = _add_product = None


def linear_act(linear: nn.Linear, act: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """``act(linear(x))`` for ``x`` of ``[N, in]``; one kernel where a GELU is compiled for bfloat16 inference.

    That kernel (cuBLASLt's) applies the tanh form to the float32 sums. For the exact GELU too this is nearer to the
    float32 result than rounding the sums to bfloat16 and taking the exact GELU of those: the forms differ by less than
    5e-4, the rounding of the sums costs more (see the tests).
    """
    if (
        _linear_gelu is not None
        and torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and x.dtype == linear.weight.dtype == torch.bfloat16
        and linear.bias is not None
        and isinstance(act, (Gelu, GeluTanh))
    ):
        return _linear_gelu(x, linear.weight, linear.bias)
    return act(linear(x))


def add_linear(residual: torch.Tensor | None, linear: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """``residual + linear(x)``; compiled for half-precision inference, the product is summed onto the residual in
    float32 by the matmul itself, which saves writing and reading it."""
    if residual is None:
        return linear(x)
    if (
        _add_product is not None
        and torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and x.dtype == residual.dtype == linear.weight.dtype
        and x.dtype in HALF
    ):
        total = residual.clone() if linear.bias is None else residual + linear.bias
        _add_product(total, x, linear.weight)
        return total
    return residual + linear(x)
