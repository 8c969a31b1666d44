"""The flash-attn package, version 2 (Dao 2023, https://github.com/Dao-AILab/flash-attention)."""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from ..data.segments import VarlenMetadata
from .flash_varlen import plain_function

VARLEN = CHECKED = True
INSTALL = "pip install flash-attn --no-build-isolation"

_forward = _backward = None
try:
    from flash_attn import flash_attn_interface, flash_attn_varlen_func

    missing_package = None
    _expected = {"cu_seqlens_q", "max_seqlen_q", "window_size_left", "softcap"}
    _forward = plain_function(flash_attn_interface, "_flash_attn_varlen_forward", _expected)
    _backward = plain_function(flash_attn_interface, "_flash_attn_varlen_backward", _expected)
except (ImportError, OSError) as error:  # a broken build must not take the other backends down
    missing_package = (
        f"attention backend 'flash_attention_2' needs the flash-attn package ({error}). Install it: {INSTALL}"
    )


def unsupported_reason(device: torch.device, dtype: torch.dtype, head_dim: int, needs_grad: bool = False) -> str | None:
    if device.type != "cuda":
        return "needs a CUDA GPU"
    if dtype not in (torch.float16, torch.bfloat16):
        return "takes float16 and bfloat16 only"
    if head_dim % 8 or head_dim > 256:
        return "head width must be a multiple of 8 and at most 256"
    if torch.cuda.get_device_capability() < (8, 0):
        return "needs an Ampere GPU or newer"
    return missing_package


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: VarlenMetadata, scale: float) -> torch.Tensor:
    cu_seqlens, max_seqlen = segments.cu_seqlens, segments.max_seqlen
    if Attention is None or torch.compiler.is_compiling():
        return flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, softmax_scale=scale)
    return Attention.apply(q, k, v, segments, scale)


class _Attention(torch.autograd.Function):
    """flash-attn's kernels, without dropout, window, or anything else that we do not use."""

    @staticmethod
    def forward(ctx, q, k, v, segments, scale):
        cu_seqlens, max_seqlen = segments.cu_seqlens, segments.max_seqlen
        out, logsumexp, _, state = _forward(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, 0.0, scale, False)
        ctx.save_for_backward(q, k, v, out, logsumexp, cu_seqlens, state)
        ctx.max_seqlen, ctx.scale = max_seqlen, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        q, k, v, out, logsumexp, cu_seqlens, state = ctx.saved_tensors
        grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)]
        _backward(
            *(grad, q, k, v, out, logsumexp, *grads, cu_seqlens, cu_seqlens, ctx.max_seqlen, ctx.max_seqlen),
            *(0.0, ctx.scale, False, -1, -1, 0.0, None, torch.are_deterministic_algorithms_enabled(), state),
        )
        return *grads, None, None


Attention = None if _forward is None or _backward is None else _Attention
