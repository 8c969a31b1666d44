"""Reference attention: float32 softmax, one segment at a time. Any device, any dtype, slow."""

from __future__ import annotations

import torch

from ..data.segments import VarlenMetadata

VARLEN = False


def unsupported_reason(device: torch.device, dtype: torch.dtype, head_dim: int, needs_grad: bool = False) -> str | None:
    return None if dtype.is_floating_point else "needs floating-point tensors"


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    segments: VarlenMetadata,
    scale: float,
    causal: bool = False,
) -> torch.Tensor:
    if k.shape[1] != q.shape[1]:  # grouped queries
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    sizes = list(segments.lengths)
    outputs = []
    for query, key, value in zip(q.split(sizes), k.split(sizes), v.split(sizes), strict=True):
        query, key, value = (x.transpose(0, 1).float() for x in (query, key, value))
        scores = query @ key.transpose(1, 2) * scale
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores[0], dtype=torch.bool).triu(1), float("-inf"))
        probabilities = torch.softmax(scores, dim=-1)
        outputs.append((probabilities @ value).transpose(0, 1))
    return torch.cat(outputs).to(q.dtype)
