"""cuDNN's fused attention, for batches whose segments all have one length.

Compiled, it goes in as an operator of its own: traced through, the reshape to ``[segments, length]`` with symbolic
sizes takes the compiler about a minute.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from ..data.segments import VarlenMetadata

VARLEN = True
EQUAL_LENGTHS_ONLY = True

missing_package = None
if not hasattr(torch.ops.aten, "_scaled_dot_product_cudnn_attention") or not hasattr(torch.library, "custom_op"):
    missing_package = f"attention backend 'cudnn' needs torch 2.5 or newer, this is {torch.__version__}"


def unsupported_reason(device: torch.device, dtype: torch.dtype, head_dim: int, needs_grad: bool = False) -> str | None:
    if device.type != "cuda":
        return "needs a CUDA GPU"
    if torch.cuda.get_device_capability()[0] != 9:
        return "measured on Hopper GPUs only"
    if dtype not in (torch.float16, torch.bfloat16):
        return "takes float16 and bfloat16 only"
    if head_dim % 8 or head_dim > 128:
        return "head width must be a multiple of 8 and at most 128"
    return missing_package


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: VarlenMetadata, scale: float) -> torch.Tensor:
    length = segments.max_seqlen
    if torch.compiler.is_compiling():
        return _attention(q, k, v, length, scale)[0] if torch.is_grad_enabled() else _inference(q, k, v, length, scale)
    return Attention.apply(q, k, v, segments, scale)


class Attention(torch.autograd.Function):
    """cuDNN's kernels through torch's operators."""

    @staticmethod
    def forward(ctx, q, k, v, segments, scale):
        length, grad = segments.max_seqlen, any(ctx.needs_input_grad)
        out, logsumexp, seed, offset = _forward(q, k, v, length, scale, grad)
        if grad:
            ctx.save_for_backward(q, k, v, out, logsumexp, seed, offset)
            ctx.length, ctx.scale = length, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return *map(_packed, _backward(grad, *ctx.saved_tensors, ctx.length, ctx.scale)), None, None


def _batched(x: torch.Tensor, length: int) -> torch.Tensor:
    """``[N, heads, head_dim]`` to ``[segments, heads, length, head_dim]``."""
    return x.unflatten(0, (-1, length)).transpose(1, 2)


def _packed(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2).flatten(0, 1)


def _forward(q, k, v, length: int, scale: float, grad: bool) -> tuple[torch.Tensor, ...]:
    """Packed output; log-sum-exp and random state for the backward, where ``grad`` says that there is one."""
    out, logsumexp, *_, seed, offset, _ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        *(_batched(x, length) for x in (q, k, v)), None, grad, 0.0, False, False, scale=scale
    )
    return _packed(out).contiguous(), logsumexp, seed, offset


def _backward(grad, q, k, v, out, logsumexp, seed, offset, length: int, scale: float) -> tuple[torch.Tensor, ...]:
    """Gradients of q, k and v, ``[segments, heads, length, head_dim]``."""
    return torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        *(_batched(x, length) for x in (grad, q, k, v, out)),
        *(logsumexp, seed, offset, None, None, None, length, length, 0.0, False),
        scale=scale,
    )


if missing_package is None:

    @torch.library.custom_op("llava_packing::cudnn_inference", mutates_args=(), device_types="cuda")
    def _inference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, length: int, scale: float) -> torch.Tensor:
        """The output alone: what only a backward needs would cost three more kernels per layer."""
        return _forward(q, k, v, length, scale, False)[0]

    @_inference.register_fake
    def _(q, k, v, length, scale):
        return q.new_empty(q.shape)

    @torch.library.custom_op("llava_packing::cudnn_attention", mutates_args=(), device_types="cuda")
    def _attention(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, length: int, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Output, log-sum-exp, and the random state that the backward wants (unused: there is no dropout).

        The log-sum-exp is flat: a symbolic ``tokens // length`` among its sizes would be compiled several times over.
        """
        out, logsumexp, seed, offset = _forward(q, k, v, length, scale, True)
        return out, logsumexp.flatten().clone(), seed.clone(), offset.clone()

    @_attention.register_fake
    def _(q, k, v, length, scale):
        tokens, heads, _ = q.shape
        logsumexp = q.new_empty(tokens * heads, dtype=torch.float32)
        state = q.new_empty((), dtype=torch.int64)
        return q.new_empty(q.shape), logsumexp, state, torch.empty_like(state)

    @torch.library.custom_op("llava_packing::cudnn_attention_backward", mutates_args=(), device_types="cuda")
    def _attention_backward(
        grad: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        logsumexp: torch.Tensor,
        seed: torch.Tensor,
        offset: torch.Tensor,
        length: int,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logsumexp = logsumexp.view(-1, q.shape[1], length, 1)
        grads = _backward(grad, q, k, v, out, logsumexp, seed, offset, length, scale)
        return tuple(_packed(x).contiguous() for x in grads)

    @_attention_backward.register_fake
    def _(grad, q, k, v, out, logsumexp, seed, offset, length, scale):
        return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)

    def _setup(ctx, inputs, output) -> None:
        q, k, v, ctx.length, ctx.scale = inputs
        ctx.save_for_backward(q, k, v, *output)

    def _differentiate(ctx, grad, *_unused):
        grads = _attention_backward(grad, *ctx.saved_tensors, ctx.length, ctx.scale)
        return (*grads, None, None)

    _attention.register_autograd(_differentiate, setup_context=_setup)
