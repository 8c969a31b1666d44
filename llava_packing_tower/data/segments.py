"""The segment of each image in a packed batch: made once per batch, on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch

from .cached_metadata import cached, once

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class VarlenMetadata:
    """The borders of the segments of a packed sequence.

    cu_seqlens: int32 ``[segments + 1]``, cumulative lengths, on the device of the tokens; max_seqlen: the longest
    length; lengths: all of them, on the host.
    """

    cu_seqlens: torch.Tensor
    max_seqlen: int
    lengths: tuple[int, ...]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> VarlenMetadata:
        """The same on another device: where blocks lie on several, accelerate's hooks move what a block is given."""
        if self.cu_seqlens.device == torch.device(device):
            return self
        return replace(self, cu_seqlens=self.cu_seqlens.to(device, non_blocking=non_blocking))


@dataclass(frozen=True)
class LayerSegments:
    """Segments that differ between blocks: every kind of them, and the number of the kind of each block."""

    kinds: tuple[VarlenMetadata, ...]
    of_block: tuple[int, ...]


Segments = VarlenMetadata | LayerSegments


def to_device(host: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """Copy a small host tensor (any shape and dtype) to a device without synchronizing: pinned memory, asynchronous."""
    device = torch.device(device)
    if device.type != "cuda" or host.is_cuda:
        return host.to(device)
    return once(_copy_across, host, device)


def _copy_across(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    return host.pin_memory().to(device, non_blocking=True)


def make_segments(lengths: Sequence[int], device: torch.device | str = "cpu") -> VarlenMetadata:
    """Metadata of segments with these lengths. Raises ``ValueError`` for no segment or one without tokens."""
    if not lengths or min(lengths) < 1:
        raise ValueError(f"every segment needs at least one token, got lengths {list(lengths)}")
    return _segments(tuple(lengths), torch.device(device))


@cached(64)
def _segments(lengths: tuple[int, ...], device: torch.device) -> VarlenMetadata:
    cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device="cpu")
    return VarlenMetadata(to_device(cu_seqlens, device), max(lengths), lengths)


def read_grid(grid_thw: torch.Tensor, num_tokens: int | None = None) -> list[Grid]:
    """``grid_thw [B, 3]`` as host tuples (t, h, w); the only synchronization of a forward whose grid lies on a GPU.

    Raises ``ValueError`` if it is not an integer ``[B, 3]``, is empty, has an entry below 1, or if ``sum(t*h*w)``
    differs from ``num_tokens``.
    """
    if grid_thw.dim() != 2 or grid_thw.shape[1] != 3 or grid_thw.shape[0] == 0 or grid_thw.is_floating_point():
        raise ValueError(
            f"grid_thw must be an integer tensor [B, 3] with B >= 1, got {tuple(grid_thw.shape)} {grid_thw.dtype}"
        )
    grids = [tuple(row) for row in grid_thw.tolist()]
    for index, grid in enumerate(grids):
        if min(grid) < 1:
            raise ValueError(f"grid_thw[{index}] = {list(grid)}: frames, rows and columns must be at least 1")
    total = sum(t * h * w for t, h, w in grids)
    if num_tokens is not None and total != num_tokens:
        raise ValueError(f"grid_thw describes {total} patches (sum of t*h*w), but hidden_states has {num_tokens} rows")
    return grids
