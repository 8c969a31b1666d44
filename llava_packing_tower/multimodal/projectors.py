"""Projectors that merge neighboring patches into one visual token, on grids of any shape.

Weights and their names are those of Qwen2-VL's patch merger (``ln_q``, ``mlp.0``, ``mlp.2``; arXiv:2409.12191), so that
a projector trained with OneVision-Encoder's LLaVA fits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from einops import rearrange
from torch import nn

from ..data.segments import Grid
from ..data.smart_resize import known_merge, merged
from ..models.layers import make_norm
from ..models.merger import Merger


class MergingProjector(nn.Module):
    """Norm of each patch, concatenation of the patches of a cell, linear, GELU, linear.

    A cell is ``merge`` (rows, columns) of neighboring patches. Where the grid does not divide into cells, its last
    row or column is repeated until it does: no patch is dropped and no zero is mixed in.

    Args:
        vision_size: width of a patch feature. text_size: width of the decoder. merge: rows and columns of a cell.
        inner_size: width between the two layers (default: that of a cell). norm, norm_eps: "layer_norm" or "rms_norm".
        input_norm_eps: of one more LayerNorm, in front.
    """

    def __init__(
        self,
        vision_size: int,
        text_size: int,
        merge: tuple[int, int],
        inner_size: int | None = None,
        norm: str = "layer_norm",
        norm_eps: float = 1e-6,
        input_norm_eps: float | None = None,
    ) -> None:
        super().__init__()
        self.merge = merge
        width = vision_size * merge[0] * merge[1]
        inner = inner_size or width
        self.ln_in = None if input_norm_eps is None else nn.LayerNorm(vision_size, eps=input_norm_eps)
        self.ln_q = make_norm(norm, vision_size, norm_eps)
        self.mlp = nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, text_size))

    def forward(self, features: torch.Tensor, grids: Sequence[Grid] | None = None) -> torch.Tensor:
        """Merge.

        Args:
            features: ``[N, vision_size]``, the patches of all grids one after the other; without grids
                ``[..., side * side, vision_size]``, square images as LLaVA passes them.
            grids: (frames, rows, columns) of each image or clip, in patches.

        Returns:
            ``[tokens, text_size]``, grid by grid, frame by frame, row by row; without grids ``[..., tokens, width]``.

        Raises:
            ValueError: grids that do not add up to N; without grids, a number of patches that is not a square.
        """
        if grids is None:
            side = math.isqrt(features.shape[-2])
            if side * side != features.shape[-2]:
                raise ValueError(
                    f"{features.shape[-2]} patches without a grid can only be merged if they form a square"
                )
            leading = features.shape[:-2]
            tokens = self._merge(features.flatten(0, -2), [(1, side, side)] * math.prod(leading))
            return tokens.unflatten(0, (*leading, -1))
        if (total := sum(t * h * w for t, h, w in grids)) != features.shape[0]:
            raise ValueError(f"the grids have {total} patches, the features {features.shape[0]}")
        return self._merge(features, grids)

    def _merge(self, features: torch.Tensor, grids: Sequence[Grid]) -> torch.Tensor:
        features = self.ln_q(features if self.ln_in is None else self.ln_in(features))
        cells, start = [], 0
        for run in _runs(grids):
            (_, h, w), frames = run[0], sum(grid[0] for grid in run)
            cells.append(self._cells(features[start : start + frames * h * w], (frames, h, w)))
            start += frames * h * w
        return self.mlp(cells[0] if len(cells) == 1 else torch.cat(cells))

    def _cells(self, features: torch.Tensor, grid: Grid) -> torch.Tensor:
        """``[t*h*w, C]`` as ``[cells, merge * C]``."""
        (t, h, w), (down, across) = grid, self.merge
        features = features.view(t, h, w, -1)
        rows, columns = merged((h, w), self.merge)
        if (missing := rows * down - h) > 0:
            features = torch.cat([features, features[:, -1:].expand(-1, missing, -1, -1)], dim=1)
        if (missing := columns * across - w) > 0:
            features = torch.cat([features, features[:, :, -1:].expand(-1, -1, missing, -1)], dim=2)
        return rearrange(features, "t (h a) (w b) c -> (t h w) (a b c)", a=down, b=across)


def _runs(grids: Sequence[Grid]) -> list[list[Grid]]:
    """Consecutive grids with equal rows and columns, together: they are merged in one step."""
    runs: list[list[Grid]] = []
    for grid in grids:
        if runs and runs[-1][-1][1:] == grid[1:]:
            runs[-1].append(grid)
        else:
            runs.append([grid])
    return runs


def make_projector(projector_type: str | None, vision_size: int, text_size: int) -> MergingProjector | None:
    """The projector of this name; None for the names that are LLaVA's own."""
    merge = known_merge(projector_type)
    return None if merge is None else MergingProjector(vision_size, text_size, merge)


def merging_projector(merger: Merger) -> MergingProjector:
    """A projector of the kind that a VLM has."""
    m = merger
    return MergingProjector(m.vision_size, m.text_size, m.merge, m.inner_size, m.norm, m.norm_eps, m.input_norm_eps)
