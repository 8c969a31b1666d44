"""cuDNN's fused attention, through ``scaled_dot_product_attention``, for segments that all have one length.

Beside FA3 and FA2 on an H100 it saves 5 % of a forward of 32 images of 448 x 448, and 9 % of a training step of 16.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from ..data.segments import VarlenMetadata

VARLEN = True
EQUAL_LENGTHS_ONLY = True
CAUSAL = False

missing_package = None
try:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    CUDNN = SDPBackend.CUDNN_ATTENTION
except (ImportError, AttributeError):
    missing_package = f"attention backend 'cudnn' needs torch 2.5 or newer, this is {torch.__version__}"


def unsupported_reason(device: torch.device, dtype: torch.dtype, head_dim: int, needs_grad: bool = False) -> str | None:
    if device.type != "cuda":
        return "needs a CUDA GPU"
    if torch.cuda.get_device_capability()[0] != 9:
        return "measured on Hopper GPUs only"
    if dtype not in (torch.float16, torch.bfloat16):
        return "needs float16 or bfloat16"
    if head_dim % 8 or head_dim > 128:
        return "head width must be a multiple of 8 and at most 128"
    return missing_package


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: VarlenMetadata, scale: float) -> torch.Tensor:
    length = segments.max_seqlen
    # [N, heads, head_dim] to [segments, heads, length, head_dim], and back
    q, k, v = (x.unflatten(0, (-1, length)).transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(CUDNN):
        out = F.scaled_dot_product_attention(q, k, v, scale=scale)
    return out.transpose(1, 2).flatten(0, 1)
