"""FlashAttention-3 for Hopper (Shah et al. 2024): flash-attention's package, or the forward-only ``fa3-fwd``."""

from __future__ import annotations

import torch

from ..data.segments import VarlenMetadata

VARLEN = CHECKED = True
INSTALL = "pip install fa3-fwd (forward only), or build flash-attention's hopper/ folder"

_forward_only = False
missing_package = None
try:
    from flash_attn_interface import flash_attn_varlen_func
except (ImportError, OSError):
    try:
        from fa3_fwd_interface import flash_attn_varlen_func

        _forward_only = True
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
        return "needs float16 or bfloat16"
    if head_dim % 8 or head_dim > 256:
        return "head width must be a multiple of 8 and at most 256"
    if missing_package:
        return missing_package
    return "the fa3-fwd package has no backward" if needs_grad and _forward_only else None


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    segments: VarlenMetadata,
    scale: float,
    causal: bool = False,
) -> torch.Tensor:
    cu_seqlens, max_seqlen = segments.cu_seqlens, segments.max_seqlen
    out = flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, softmax_scale=scale, causal=causal
    )
    return out[0] if isinstance(out, tuple) else out
