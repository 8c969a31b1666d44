"""Reference attention: float32 softmax, one segment at a time. Any device, any dtype, slow."""

from __future__ import annotations

import torch

from ..data.segments import VarlenMetadata

VARLEN = False


def unsupported_reason(device: torch.device, dtype: torch.dtype, head_dim: int, needs_grad: bool = False) -> str | None:
    return None if dtype.is_floating_point else "needs floating-point tensors"


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: VarlenMetadata, scale: float) -> torch.Tensor:
    sizes = list(segments.lengths)
    outputs = []
    for query, key, value in zip(q.split(sizes), k.split(sizes), v.split(sizes), strict=True):
        query, key, value = (x.transpose(0, 1).float() for x in (query, key, value))
        probabilities = torch.softmax(query @ key.transpose(1, 2) * scale, dim=-1)
        outputs.append((probabilities @ value).transpose(0, 1))
    return torch.cat(outputs).to(q.dtype)
