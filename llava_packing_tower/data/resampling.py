"""Learned tables of positions resampled to the grid of each image: which rows of a table a patch takes, and how much.

A resampling kernel is separable: the taps of a patch are all pairs of its row's taps and its column's. The taps of an
axis depend on its length alone and are kept; a batch only gathers them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .cached_metadata import cached
from .positions import per_token, positions_of_grids
from .segments import Grid, to_device


@dataclass(frozen=True)
class Resampling:
    """kernel: "bilinear" or "bicubic" (a = -0.75); align_corners: as ``torch.nn.functional.interpolate`` has it. There
    is no antialiasing."""

    kernel: str
    align_corners: bool


@cached(256)
def axis_taps(length: int, side: int, how: Resampling) -> tuple[torch.Tensor, torch.Tensor]:
    """Which of ``side`` learned lines each of ``length`` lines takes, int64 ``[length, taps]``, and the weight of each,
    float32, on the host. Taps outside of the table are its border."""
    place = torch.arange(length, dtype=torch.float32, device="cpu")
    corners, centres = place * ((side - 1) / max(length - 1, 1)), (place + 0.5) * (side / length) - 0.5
    source = corners if how.align_corners else centres
    below = source.floor()
    offsets = torch.arange(2, device="cpu") if how.kernel == "bilinear" else torch.arange(-1, 3, device="cpu")
    distance = ((source - below)[:, None] - offsets).abs()
    if how.kernel == "bilinear":
        weights = 1 - distance
    else:  # the cubic convolution of Keys (1981)
        a = -0.75
        near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
        far = a * (((distance - 5) * distance + 8) * distance - 4)
        weights = torch.where(distance <= 1, near, far)
    return (below.long()[:, None] + offsets).clamp(0, side - 1), weights


def table_taps(
    grids: Sequence[Grid],
    sides: tuple[int, int],
    how: Resampling,
    device: torch.device,
    spans: Sequence[tuple[int, int]] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The taps of all patches of a packed batch in a table of ``sides`` (rows, columns), row by row.

    Args:
        spans: lines and columns that the whole table is resampled to, of each grid (default: those of the grid; where
            they are more, the grid takes the first ones).

    Returns:
        rows of the table, int64 ``[N, taps]``, and their weights, float32 ``[N, taps]``, on the device.
    """
    spans = [(h, w) for _, h, w in grids] if spans is None else spans
    starts: dict[tuple[int, int], int] = {}
    axes: list[tuple[torch.Tensor, torch.Tensor]] = []
    for axis in dict.fromkeys(pair for span in spans for pair in zip(span, sides, strict=True)):
        starts[axis] = sum(len(taps) for taps, _ in axes)
        axes.append(axis_taps(*axis, how))
    lines, shares = (to_device(torch.cat(parts), device) for parts in zip(*axes, strict=True))
    first = torch.tensor([[starts[pair] for pair in zip(span, sides, strict=True)] for span in spans], device="cpu")
    places = per_token(first, [t * h * w for t, h, w in grids], device) + positions_of_grids(grids, device)[:, 1:]
    rows, columns = places.unbind(1)
    taps = lines.index_select(0, rows)[:, :, None] * sides[1] + lines.index_select(0, columns)[:, None, :]
    weights = shares.index_select(0, rows)[:, :, None] * shares.index_select(0, columns)[:, None, :]
    return taps.flatten(1), weights.flatten(1)
