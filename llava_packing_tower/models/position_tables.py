"""Learned tensors that several families add to their patches: resampled tables of positions, tokens in front."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from ..data.resampling import Resampling, table_taps
from ..data.segments import Grid
from ..kernels.rotary import wide


class LearnedTable(nn.Module):
    """A learned tensor ``[rows, hidden_size]``, which :class:`PackedVisionModel` initializes as it does weights."""

    def __init__(self, rows: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(rows, hidden_size))


class PrefixTokens(LearnedTable):
    """The learned tokens in front of every image: CLS, then the registers."""

    def forward(self, tokens: torch.Tensor, insert: torch.Tensor) -> torch.Tensor:
        """``[N, hidden]`` patches to the packed sequence with prefixes; ``insert`` is from ``prefix_indices``."""
        return torch.cat([self.weight, tokens]).index_select(0, insert)


class PrefixPosition(LearnedTable):
    """The learned position of the one token in front of every image."""

    def forward(self, tokens: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
        """``[N, hidden]`` of the packed sequence with prefixes, added to the rows ``starts [images]``."""
        return tokens.index_add(0, starts, self.weight.expand(len(starts), -1))


class ResampledPositions(LearnedTable):
    """A table of learned positions, resampled to the grid of each image without antialiasing.

    sides: rows and columns of the table, which holds them row by row.
    """

    def __init__(self, sides: tuple[int, int], hidden_size: int, how: Resampling) -> None:
        super().__init__(sides[0] * sides[1], hidden_size)
        self.sides, self.how = sides, how

    def forward(
        self, tokens: torch.Tensor, grids: Sequence[Grid], spans: Sequence[tuple[int, int]] | None = None
    ) -> torch.Tensor:
        """Tokens ``[N, hidden]`` plus the position of each, summed in float32 (spans: see :func:`table_taps`)."""
        taps, shares = table_taps(grids, self.sides, self.how, tokens.device, spans)
        table = wide(self.weight)
        added = F.embedding_bag(taps, table, per_sample_weights=shares.to(table.dtype), mode="sum")
        return (tokens + added).to(tokens.dtype)
