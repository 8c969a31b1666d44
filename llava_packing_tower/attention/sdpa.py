"""torch's scaled_dot_product_attention, segments of equal length together in one call. Any device, any dtype."""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from ..data.segments import VarlenMetadata

VARLEN = False


def unsupported_reason(device: torch.device, dtype: torch.dtype, head_dim: int, needs_grad: bool = False) -> str | None:
    return None if dtype.is_floating_point else "needs floating-point tensors"


def _batched(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool) -> torch.Tensor:
    """``[B, L, heads, head_dim]`` in and out."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, scale=scale, is_causal=causal).transpose(1, 2)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    segments: VarlenMetadata,
    scale: float,
    causal: bool = False,
) -> torch.Tensor:
    lengths = segments.lengths
    if k.shape[1] != q.shape[1]:  # grouped queries
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    members: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        members.setdefault(length, []).append(index)
    if len(members) == 1:
        q, k, v = (x.unflatten(0, (len(lengths), lengths[0])) for x in (q, k, v))
        return _batched(q, k, v, scale, causal).flatten(0, 1)

    parts = [x.split(list(lengths)) for x in (q, k, v)]
    outputs: dict[int, torch.Tensor] = {}
    for indices in members.values():
        stacked_q, stacked_k, stacked_v = (torch.stack([part[i] for i in indices]) for part in parts)
        out = _batched(stacked_q, stacked_k, stacked_v, scale, causal)
        for index, segment in zip(indices, out.unbind(0), strict=True):
            outputs[index] = segment
    return torch.cat([outputs[index] for index in range(len(lengths))])
