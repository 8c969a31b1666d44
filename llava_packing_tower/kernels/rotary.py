"""Rotary positions applied to a fused qkv product."""

from __future__ import annotations

from collections.abc import Callable

import torch


def wide(x: torch.Tensor) -> torch.Tensor:
    """float32 of what is less precise than that."""
    return x if x.dtype == torch.float64 else x.float()


Rotate = Callable[[torch.Tensor], torch.Tensor]


def rotate_interleaved(x: torch.Tensor) -> torch.Tensor:
    """(x0, x1, x2, x3, ...) to (-x1, x0, -x3, x2, ...)."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([-odd, even], dim=-1).flatten(-2)


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    """(first half, second half) to (-second half, first half)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


ROTATE = {"interleaved": rotate_interleaved, "half": rotate_half}


def apply_rotary(
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, rotate: Rotate
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q and k times the rotation, and v.

    Args:
        qkv: ``[N, 3, heads, head_dim]``.
        cos, sin: float32 ``[N, 1, head_dim]``; the rotation of x is ``x * cos + rotate(x) * sin``, in float32.
        rotate: a value of :data:`ROTATE`.

    Returns:
        three ``[N, heads, head_dim]`` in the dtype of ``qkv``.
    """
    q, k, v = qkv.unbind(1)
    if v.requires_grad:
        v = v.contiguous()  # else the whole qkv product would be kept for the backward, beside rotated q and k
    return _turn(q, cos, sin, rotate), _turn(k, cos, sin, rotate), v


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, rotate: Rotate) -> torch.Tensor:
    return (wide(x) * cos + rotate(wide(x)) * sin).to(x.dtype)


def rotary_backward(grad: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, rotate: Rotate) -> torch.Tensor:
    """Gradient of ``x * cos + rotate(x) * sin``: a rotation by right angles has minus itself as its transpose."""
    grad = wide(grad)
    return grad * cos - rotate(grad * sin)
