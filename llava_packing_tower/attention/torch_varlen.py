"""torch.nn.attention.varlen (torch 2.10 and newer): the flash-attention kernel that ships inside PyTorch."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch

from ..data.segments import VarlenMetadata
from .flash_attn_functions import unsupported_tensors

VARLEN = True

try:
    from torch.nn.attention.varlen import varlen_attn

    missing_package = None
    _TAKEN = inspect.signature(varlen_attn).parameters
except ImportError:
    missing_package = f"attention backend 'torch_varlen' needs torch 2.10 or newer, this is {torch.__version__}"


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
    cu_seqlens, max_seqlen = segments.cu_seqlens, segments.max_seqlen
    more: dict[str, Any] = {}
    if causal:  # torch 2.11 and newer have a window in place of is_causal
        more = {"window_size": (-1, 0)} if "window_size" in _TAKEN else {"is_causal": True}
    if k.shape[1] != q.shape[1]:
        if "enable_gqa" in _TAKEN:
            more["enable_gqa"] = True
        else:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    if "scale" in _TAKEN:  # torch 2.11 and newer
        out = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, scale=scale, **more)
        return out[0] if isinstance(out, tuple) else out
    # torch 2.10 always scales by head_dim ** -0.5: put the rest of the wanted factor on q.
    factor = scale * math.sqrt(q.shape[-1])
    q = q if factor == 1.0 else q * factor
    out = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, **more)
    return out[0] if isinstance(out, tuple) else out
