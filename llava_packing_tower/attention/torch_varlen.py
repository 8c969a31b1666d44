"""torch.nn.attention.varlen (torch 2.10 and newer): the flash-attention kernel that ships inside PyTorch."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable

import torch

from ..packing import PackedSegments


@functools.cache
def _kernel() -> tuple[Callable, bool] | str:
    """The varlen function and whether it takes ``scale`` (torch 2.11 and newer), or why it cannot be had."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return f"attention backend 'torch_varlen' needs torch 2.10 or newer, this is {torch.__version__}"
    return varlen_attn, "scale" in inspect.signature(varlen_attn).parameters


def missing_package() -> str | None:
    kernel = _kernel()
    return kernel if isinstance(kernel, str) else None


def why_not(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    if device.type != "cuda":
        return "needs a CUDA GPU"
    if dtype not in (torch.float16, torch.bfloat16):
        return "takes float16 and bfloat16 only"
    if head_dim % 8 or head_dim > 256:
        return "head width must be a multiple of 8 and at most 256"
    if torch.cuda.get_device_capability() < (8, 0):
        return "needs an Ampere GPU or newer"
    return missing_package()


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: PackedSegments, scale: float) -> torch.Tensor:
    kernel, takes_scale = _kernel()
    cu_seqlens, max_seqlen = segments.cu_seqlens, segments.max_seqlen
    if takes_scale:
        return kernel(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, scale=scale)
    # torch 2.10 always scales by head_dim ** -0.5: put the rest of the wanted factor on q.
    factor = scale * math.sqrt(q.shape[-1])
    return kernel(q if factor == 1.0 else q * factor, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
