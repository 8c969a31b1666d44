"""The flash-attn package, version 2 (Dao 2023, https://github.com/Dao-AILab/flash-attention)."""

from __future__ import annotations

import torch

from ..data.segments import VarlenMetadata
from .flash_attn_functions import functions, make_attention, unsupported_tensors

VARLEN = CHECKED = True
INSTALL = "pip install flash-attn --no-build-isolation"

Attention = missing_package = None
try:
    from flash_attn import flash_attn_interface, flash_attn_varlen_func

    _forward, _backward = functions(flash_attn_interface)
    if _forward is not None and _backward is not None:
        Attention = make_attention(_forward, _backward)
except (ImportError, OSError) as error:  # a broken build must not take the other backends down
    missing_package = (
        f"attention backend 'flash_attention_2' needs the flash-attn package ({error}). Install it: {INSTALL}"
    )


def unsupported_reason(device: torch.device, dtype: torch.dtype, head_dim: int, needs_grad: bool = False) -> str | None:
    return unsupported_tensors(device, dtype, head_dim) or missing_package


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    segments: VarlenMetadata,
    scale: float,
    causal: bool = False,
) -> torch.Tensor:
    if Attention is not None and not torch.compiler.is_compiling():
        return Attention.apply(q, k, v, segments, scale, causal)
    cu_seqlens, max_seqlen = segments.cu_seqlens, segments.max_seqlen
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, softmax_scale=scale, causal=causal
    )
