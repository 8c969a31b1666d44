"""FlashAttention-4 (Dao et al. 2026; the package ``flash-attn-4``): forward and backward for Hopper and Blackwell, built
by CuTe's compiler when first called, so that there is nothing to build when it is installed.

Compiled, it goes in as an operator of its own: torch.compile cannot look into it.
"""

from __future__ import annotations

import inspect

import torch
from torch.autograd.function import once_differentiable

from ..packing import PackedSegments

VARLEN = True
INSTALL = 'pip install --pre "flash-attn-4[cu13]" (without [cu13] for CUDA 12)'
_NEEDED = {"cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "softmax_scale"}

missing_package = None
try:
    from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd

    if not _NEEDED <= inspect.signature(_flash_attn_bwd).parameters.keys():
        missing_package = (  # flash-attn 2 comes with an early copy of it
            "attention backend 'flash_attention_4' needs a flash-attn-4 whose backward takes segments, this one does "
            f"not. Install it: {INSTALL}"
        )
except (ImportError, OSError) as error:  # a broken build must not take the other backends down
    missing_package = f"attention backend 'flash_attention_4' needs the flash-attn-4 package ({error}): {INSTALL}"


def why_not(device: torch.device, dtype: torch.dtype, head_dim: int, needs_grad: bool = False) -> str | None:
    if device.type != "cuda":
        return "needs a CUDA GPU"
    if torch.cuda.get_device_capability()[0] < 9:
        return "needs a Hopper or Blackwell GPU"
    if dtype not in (torch.float16, torch.bfloat16):
        return "takes float16 and bfloat16 only"
    if head_dim % 8 or head_dim > 128:
        return "head width must be a multiple of 8 and at most 128"
    return missing_package


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: PackedSegments, scale: float) -> torch.Tensor:
    if torch.compiler.is_compiling():
        return _operator(q, k, v, segments.cu_seqlens, segments.max_seqlen, scale)[0]
    return Attention.apply(q, k, v, segments, scale)


def _forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output ``[N, heads, head_dim]``, and the logarithms of the sums, float32 ``[heads, N]``."""
    out, logsumexp, *_ = _flash_attn_fwd(
        *(q, k, v),
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=cu_seqlens,
        max_seqlen_q=max_seqlen,
        max_seqlen_k=max_seqlen,
        softmax_scale=scale,
        return_lse=True,
    )
    return out, logsumexp


def _backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v, each ``[N, heads, head_dim]`` in memory of its own."""
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    _flash_attn_bwd(
        *(q, k, v, out, grad, logsumexp),
        softmax_scale=scale,
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=cu_seqlens,
        max_seqlen_q=max_seqlen,
        max_seqlen_k=max_seqlen,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        dq=dq,
        dk=dk,
        dv=dv,
    )
    return dq, dk, dv


class Attention(torch.autograd.Function):
    """Forward and backward without the package's own function around them."""

    @staticmethod
    def forward(ctx, q, k, v, segments, scale):
        out, logsumexp = _forward(q, k, v, segments.cu_seqlens, segments.max_seqlen, scale)
        ctx.save_for_backward(q, k, v, out, logsumexp, segments.cu_seqlens)
        ctx.max_seqlen, ctx.scale = segments.max_seqlen, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return *_backward(grad.contiguous(), *ctx.saved_tensors, ctx.max_seqlen, ctx.scale), None, None


if hasattr(torch.library, "custom_op"):

    @torch.library.custom_op("llava_packing::flash_attention_4", mutates_args=(), device_types="cuda")
    def _operator(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return _forward(q, k, v, cu_seqlens, max_seqlen, scale)

    @_operator.register_fake
    def _(q, k, v, cu_seqlens, max_seqlen, scale):
        tokens, heads, _ = q.shape
        return q.new_empty(q.shape), q.new_empty((heads, tokens), dtype=torch.float32)

    @torch.library.custom_op("llava_packing::flash_attention_4_backward", mutates_args=(), device_types="cuda")
    def _operator_backward(
        grad: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        logsumexp: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return _backward(grad.contiguous(), q, k, v, out, logsumexp, cu_seqlens, max_seqlen, scale)

    @_operator_backward.register_fake
    def _(grad, q, k, v, out, logsumexp, cu_seqlens, max_seqlen, scale):
        return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)

    def _setup(ctx, inputs, output) -> None:
        q, k, v, cu_seqlens, ctx.max_seqlen, ctx.scale = inputs
        ctx.save_for_backward(q, k, v, *output, cu_seqlens)

    def _differentiate(ctx, grad, *_unused):
        return *_operator_backward(grad, *ctx.saved_tensors, ctx.max_seqlen, ctx.scale), None, None, None

    _operator.register_autograd(_differentiate, setup_context=_setup)
elif missing_package is None:
    missing_package = f"attention backend 'flash_attention_4' needs torch 2.4 or newer, this is {torch.__version__}"
