"""cuDNN's fused attention through torch's SDPA, for batches whose segments all have one length."""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from ..packing import PackedSegments

VARLEN = True
EQUAL_LENGTHS_ONLY = True

try:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    missing_package = None
except ImportError:
    missing_package = f"attention backend 'cudnn' needs torch 2.5 or newer, this is {torch.__version__}"


def why_not(device: torch.device, dtype: torch.dtype, head_dim: int, needs_grad: bool = False) -> str | None:
    if device.type != "cuda":
        return "needs a CUDA GPU"
    if torch.cuda.get_device_capability()[0] != 9:
        return "measured on Hopper GPUs only"
    if dtype not in (torch.float16, torch.bfloat16):
        return "takes float16 and bfloat16 only"
    if head_dim % 8 or head_dim > 128:
        return "head width must be a multiple of 8 and at most 128"
    return missing_package


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: PackedSegments, scale: float) -> torch.Tensor:
    heads, head_dim = q.shape[1:]
    q, k, v = (x.unflatten(0, (-1, segments.max_seqlen)).transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        out = scaled_dot_product_attention(q, k, v, scale=scale)
    return out.transpose(1, 2).reshape(-1, heads, head_dim)
