"""FlashAttention-3 for Hopper (Shah et al. 2024): flash-attention's package, or the forward-only ``fa3-fwd``."""

from __future__ import annotations

import torch

from ..data.segments import VarlenMetadata
from . import flash_attention_2
from .flash_varlen import plain_function

VARLEN = CHECKED = True
INSTALL = "pip install fa3-fwd (forward only), or build flash-attention's hopper/ folder"
Attention = None

_forward_only = False
_forward = missing_package = None
try:
    from flash_attn_interface import flash_attn_varlen_func
except (ImportError, OSError):
    try:
        import fa3_fwd_interface
        from fa3_fwd_interface import flash_attn_varlen_func

        _forward_only = True
        _expected = {"cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "softmax_scale"}
        _forward = plain_function(fa3_fwd_interface, "_flash_attn_forward", _expected)
    except (ImportError, OSError) as error:
        missing_package = (
            f"attention backend 'flash_attention_3' needs FlashAttention-3 ({error}). Install it: {INSTALL}"
        )


def unsupported_reason(device: torch.device, dtype: torch.dtype, head_dim: int, needs_grad: bool = False) -> str | None:
    if device.type != "cuda":
        return "needs a CUDA GPU"
    if torch.cuda.get_device_capability()[0] != 9:
        return "needs a Hopper GPU"
    if dtype not in (torch.float16, torch.bfloat16):
        return "takes float16 and bfloat16 only"
    if head_dim % 8 or head_dim > 256:
        return "head width must be a multiple of 8 and at most 256"
    if missing_package:
        return missing_package
    if needs_grad and _forward_only and Attention is None:
        return "the fa3-fwd package has no backward, and flash-attn 2.7 or newer, whose backward would do, is missing"
    return None


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: VarlenMetadata, scale: float) -> torch.Tensor:
    if _forward_only and torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        if torch.compiler.is_compiling():  # which cannot see into that function
            return flash_attention_2.attend(q, k, v, segments, scale)
        return Attention.apply(q, k, v, segments, scale)
    cu_seqlens, max_seqlen = segments.cu_seqlens, segments.max_seqlen
    out = flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, softmax_scale=scale)
    return out[0] if isinstance(out, tuple) else out


class _WithOlderBackward(torch.autograd.Function):
    """The forward of version 3 and the backward of version 2: both keep the same logarithms of the sums."""

    @staticmethod
    def forward(ctx, q, k, v, segments, scale):
        cu_seqlens, max_seqlen = segments.cu_seqlens, segments.max_seqlen
        lengths = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens}
        lengths |= {"max_seqlen_q": max_seqlen, "max_seqlen_k": max_seqlen}
        out, logsumexp, *_ = _forward(q, k, v, **lengths, softmax_scale=scale)
        ctx.save_for_backward(q, k, v, out, logsumexp, cu_seqlens, None)
        ctx.max_seqlen, ctx.scale = max_seqlen, scale
        return out

    @staticmethod
    def backward(ctx, grad):
        return flash_attention_2.Attention.backward(ctx, grad)


if _forward is not None and flash_attention_2.Attention is not None:
    Attention = _WithOlderBackward
