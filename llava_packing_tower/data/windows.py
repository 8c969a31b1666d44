"""Attention in windows: the order in which the patches of a window stand together, and the lengths of the windows."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .positions import positions_and_sizes
from .segments import Grid


def window_lengths(grids: Sequence[Grid], side: int) -> list[int]:
    """Patches of each window of ``side`` x ``side`` patches (fewer at the right and lower edges): sample by sample,
    frame by frame, row by row."""
    lengths: list[int] = []
    for t, h, w in grids:
        heights = [min(side, h - top) for top in range(0, h, side)]
        widths = [min(side, w - left) for left in range(0, w, side)]
        lengths += [height * width for height in heights for width in widths] * t
    return lengths


def window_places(grids: Sequence[Grid], side: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each patch of a packed batch stands when those of a window stand together, int64 ``[N]``, and its (frame,
    row, column), int64 ``[N, 3]``; both in raster order, made on the device.

    The patches of a frame stay together: its segment is the same in either order.
    """
    positions, sizes = positions_and_sizes(grids, device)
    _, row, column = positions.unbind(1)
    _, h, w = sizes.unbind(1)
    top, left = row // side * side, column // side * side
    height, width = (h - top).clamp(max=side), (w - left).clamp(max=side)
    inside = (row - top) * width + column - left
    # In front of a patch are its frame's rows above the window, and the windows to the left of it.
    frame = torch.arange(len(row), device=device) - (row * w + column)
    return frame + top * w + left * height + inside, positions
