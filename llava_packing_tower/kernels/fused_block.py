"""A fused block: the two parts around its attention, each a node of the autograd graph, or all of it as one node.

Forward and backward are written out, so that Python calls nine kernels per block forward and fourteen backward without
a compiler's wrappers around them, and what memory bounds is read once: bias gradients fall out of the kernels that
write what they sum, and the input of both norms' products is computed again by the kernels of the norms' backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from types import ModuleType
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ..data.segments import VarlenMetadata
from . import reference

try:
    from . import triton as kernels
except ImportError:  # no Triton: torch's CPU builds, macOS
    kernels = None

Tensor = torch.Tensor
__all__ = ["AfterAttention", "BeforeAttention", "Block", "BlockSpec", "kernels", "operations"]


def operations(x: Tensor) -> ModuleType:
    """The module whose operations take such tensors: Triton's kernels on a GPU, else plain torch."""
    return kernels if x.is_cuda and kernels is not None else reference


@dataclass(frozen=True)
class BlockSpec:
    """What is constant in a block. rotary: a key of ``ROTATE`` or None; activation: of ``ACTIVATIONS``."""

    heads: int
    eps: float
    rms: bool
    rotary: str | None
    activation: str


def _added(partials: Tensor, columns: list[int], like: Tensor) -> tuple[Tensor, ...]:
    """All sums over tokens, added up at once."""
    return operations(like).finish(partials, like.dtype).split(columns)


def _backward(function: Any, ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    """The backward of one of the two parts as a node of its own: its products, then its sums over tokens."""
    part = _Part()  # a checkpoint lets saved tensors be asked for once
    part.kind, part.saved_tensors, part.needs_input_grad = ctx.kind, ctx.saved_tensors, ctx.needs_input_grad
    columns = function.columns(part)
    partials = operations(grads[0]).partials(sum(columns), grads[0])
    products = function.products(part, partials, 0, *grads)
    return None, *function.gradients(part, products, _added(partials, columns, grads[0]))


def _is_one(first: Tensor, second: Tensor) -> bool:
    """Whether two gradients are one tensor, as where a block's two outputs are only added up."""
    return first.data_ptr() == second.data_ptr() and first.stride() == second.stride()


class BeforeAttention(torch.autograd.Function):
    """``total = x + pending``; rotated q, k and v of its norm. Returns total ``[N, hidden]``, and q, k, v ``[N, heads,
    head_dim]``, views of one tensor."""

    @staticmethod
    def forward(
        ctx,
        kind: BlockSpec,
        x: Tensor,
        pending: Tensor | None,
        norm_weight: Tensor,
        norm_bias: Tensor | None,
        qkv_weight: Tensor,
        qkv_bias: Tensor | None,
        cos: Tensor | None,
        sin: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        run = operations(x)
        total, normed, stats = run.add_norm(x, pending, norm_weight, norm_bias, kind.eps, kind.rms)
        qkv = F.linear(normed, qkv_weight, qkv_bias).view(x.shape[0], 3, kind.heads, -1)
        if kind.rotary is not None:
            run.rotate_(qkv, cos, sin, kind.rotary)
        ctx.kind = kind
        ctx.save_for_backward(total, stats, norm_weight, norm_bias, qkv_weight, cos, sin)
        return total, *qkv.unbind(1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_total: Tensor, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _backward(BeforeAttention, ctx, grad_total, *grads)

    @staticmethod
    def columns(ctx: Any) -> list[int]:
        """How wide the sums over tokens are: gradients of the qkv bias and of the norm's weight and bias; the column
        sums of the total's gradient are not used."""
        wide, width = ctx.saved_tensors[4].shape
        return [wide, width, width, width]

    @staticmethod
    def products(ctx: Any, partials: Tensor, offset: int, grad_total: Tensor, *grads: Tensor) -> tuple[Any, ...]:
        """The gradients of total and qkv weight. The sums go into ``partials``, from ``offset`` on."""
        total, stats, norm_weight, norm_bias, qkv_weight, cos, sin = ctx.saved_tensors
        kind, run = ctx.kind, operations(total)
        rotary = None if kind.rotary is None else (cos, sin)
        grad_qkv = run.qkv_backward(grads, rotary, kind.rotary, partials, offset)
        grad, normed = run.norm_backward(
            *(total, stats, grad_qkv @ qkv_weight, grad_total, norm_weight, norm_bias, kind.rms),
            *(partials, offset + len(qkv_weight)),
        )
        return grad, grad_qkv.t() @ normed if ctx.needs_input_grad[5] else None

    @staticmethod
    def gradients(ctx: Any, products: tuple[Any, ...], sums: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        """Of all inputs but the first."""
        (grad, grad_weight), (qkv_bias, scale, shift, _) = products, sums
        needs = ctx.needs_input_grad
        return (
            grad if needs[1] else None,
            grad if needs[2] else None,
            scale if needs[3] else None,
            shift if needs[4] else None,
            grad_weight,
            qkv_bias if needs[6] else None,
            None,
            None,
        )


class AfterAttention(torch.autograd.Function):
    """``total = residual + proj(attended)`` and the MLP of its norm, the next pending sum: two of ``[N, hidden]``."""

    @staticmethod
    def forward(
        ctx,
        kind: BlockSpec,
        residual: Tensor,
        attended: Tensor,
        proj_weight: Tensor,
        proj_bias: Tensor | None,
        norm_weight: Tensor,
        norm_bias: Tensor | None,
        gate_weight: Tensor | None,
        gate_bias: Tensor | None,
        fc1_weight: Tensor,
        fc1_bias: Tensor | None,
        fc2_weight: Tensor,
        fc2_bias: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        run = operations(residual)
        attended = attended.flatten(1)
        # Biases are added by the kernels that follow: products without one are launched faster.
        total, normed, stats = run.add_norm(
            *(residual, F.linear(attended, proj_weight), norm_weight, norm_bias, kind.eps, kind.rms),
            pending_bias=proj_bias,
        )
        inner, inner_bias, factor, factor_bias = F.linear(normed, fc1_weight), fc1_bias, None, None
        if gate_weight is not None:
            inner, inner_bias, factor, factor_bias = F.linear(normed, gate_weight), gate_bias, inner, fc1_bias
        ctx.kind = kind
        ctx.save_for_backward(
            attended, total, stats, inner, inner_bias, factor, factor_bias,
            proj_weight, norm_weight, norm_bias, gate_weight, fc1_weight, fc2_weight,
        )  # fmt: skip
        active = run.act(kind.activation, inner, inner_bias, factor, factor_bias)
        return total, F.linear(active, fc2_weight, fc2_bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_total: Tensor, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        return _backward(AfterAttention, ctx, grad_total, grad_out)

    @staticmethod
    def columns(ctx: Any) -> list[int]:
        """How wide the sums over tokens are: gradients of the biases inside of the MLP, of the norm's weight and bias,
        and of the two outer biases."""
        gate_weight, _, fc2_weight = ctx.saved_tensors[-3:]
        width, wide = fc2_weight.shape
        return [wide * (1 if gate_weight is None else 2), width, width, width, width]

    @staticmethod
    def products(ctx: Any, partials: Tensor, offset: int, grad_total: Tensor, grad_out: Tensor) -> tuple[Any, ...]:
        """The other gradients. The sums go into ``partials``, from ``offset`` on."""
        (
            attended, total, stats, inner, inner_bias, factor, factor_bias,
            proj_weight, norm_weight, norm_bias, gate_weight, fc1_weight, fc2_weight,
        ) = ctx.saved_tensors  # fmt: skip
        kind, needs, run = ctx.kind, ctx.needs_input_grad, operations(total)
        columns = AfterAttention.columns(ctx)
        # The bias of fc2 has the column sums of grad_out, which are those of the gradient that passes the norm by
        # where the two are one.
        passing = _is_one(grad_total, grad_out)
        if not passing:
            run.column_sums(grad_out, partials, offset + sum(columns[:4]))
        # The MLP.
        grad_inner, grad_factor, active = run.act_backward(
            kind.activation, inner, inner_bias, factor, factor_bias, grad_out @ fc2_weight, partials, offset
        )
        grad_fc2 = grad_out.t() @ active if needs[11] else None
        if gate_weight is not None:
            grad_normed = torch.addmm(grad_factor @ fc1_weight, grad_inner, gate_weight)
        else:
            grad_normed = grad_inner @ fc1_weight
        # The norm, with the gradient that passes it by.
        grad, normed = run.norm_backward(
            *(total, stats, grad_normed, grad_total, norm_weight, norm_bias, kind.rms),
            *(partials, offset + columns[0], passing),
        )
        grad_gate = grad_inner.t() @ normed if needs[7] else None
        grad_fc1 = (grad_inner if gate_weight is None else grad_factor).t() @ normed if needs[9] else None
        # The projection.
        grad_attended = (grad @ proj_weight).view(grad.shape[0], kind.heads, -1) if needs[2] else None
        grad_proj = grad.t() @ attended if needs[3] else None
        return grad, grad_attended, grad_proj, grad_gate, grad_fc1, grad_fc2

    @staticmethod
    def gradients(ctx: Any, products: tuple[Any, ...], sums: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        """Of all inputs but the first."""
        grad, grad_attended, grad_proj, grad_gate, grad_fc1, grad_fc2 = products
        inside, scale, shift, proj_bias, fc2_bias = sums
        needs, gated = ctx.needs_input_grad, len(inside) > ctx.saved_tensors[-1].shape[1]
        gate_bias, fc1_bias = inside.chunk(2) if gated else (None, inside)
        return (
            grad if needs[1] else None,
            grad_attended,
            grad_proj,
            proj_bias if needs[4] else None,
            scale if needs[5] else None,
            shift if needs[6] else None,
            grad_gate,
            gate_bias if needs[8] else None,
            grad_fc1,
            fc1_bias if needs[10] else None,
            grad_fc2,
            fc2_bias if needs[12] else None,
        )


class _Part:
    """Stands for the context of one of the functions inside of :class:`Block`."""

    saved_tensors: tuple[Tensor | None, ...] = ()
    needs_input_grad: tuple[bool, ...] = (True, True, True)
    kind: BlockSpec

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors


INPUTS_BEFORE = 8  # of BeforeAttention, without the kind


class Block(torch.autograd.Function):
    """:class:`BeforeAttention`, ``attention`` (an autograd function) and :class:`AfterAttention` as one node: each node
    of the graph costs the host as much as two kernels."""

    @staticmethod
    def forward(
        ctx, kind: BlockSpec, attention: type, segments: VarlenMetadata, scale: float, *tensors: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        before, inner, after = parts = _Part(), _Part(), _Part()
        total, *heads = BeforeAttention.forward(before, kind, *tensors[:INPUTS_BEFORE])
        attended = attention.forward(inner, *heads, segments, scale)
        out = AfterAttention.forward(after, kind, total, attended, *tensors[INPUTS_BEFORE:])
        ctx.attention, ctx.parts = attention, parts
        ctx.counts = [len(part.saved_tensors) for part in parts]
        ctx.save_for_backward(*before.saved_tensors, *inner.saved_tensors, *after.saved_tensors)
        for part in parts:
            part.saved_tensors = ()
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_total: Tensor, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)  # asked for once: a checkpoint allows no more
        before, inner, after = ctx.parts
        for part, count in zip(ctx.parts, ctx.counts):
            part.saved_tensors = tuple(islice(saved, count))
        needs = ctx.needs_input_grad[4:]
        before.needs_input_grad = (False, *needs[:INPUTS_BEFORE])
        after.needs_input_grad = (False, True, True, *needs[INPUTS_BEFORE:])
        # The sums over tokens of both parts are added up by one kernel.
        own, others = AfterAttention.columns(after), BeforeAttention.columns(before)
        partials = operations(grad_out).partials(sum(own) + sum(others), grad_out)
        of_after = AfterAttention.products(after, partials, 0, grad_total, grad_out)
        heads = ctx.attention.backward(inner, of_after[1])[:3]
        of_before = BeforeAttention.products(before, partials, sum(own), of_after[0], *heads)
        sums = _added(partials, [*own, *others], grad_out)
        _, _, *grads_after = AfterAttention.gradients(after, of_after, sums[: len(own)])
        grads_before = BeforeAttention.gradients(before, of_before, sums[len(own) :])
        for part in ctx.parts:
            part.saved_tensors = ()
        return None, None, None, None, *grads_before, *grads_after
