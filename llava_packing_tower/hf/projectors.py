"""LLaVA's projectors that treat every token alone, with the names that its checkpoints use."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import nn

from ..data.smart_resize import CHECKPOINT, known_merge
from ..models.merger import Merger
from ..multimodal.projectors import make_projector, merging_projector

_MLP = re.compile(r"mlp(\d+)x(?:_res(\d+)x)?_gelu")
KNOWN = "linear, identity, mlpNx_gelu, mlpNx_resMx_gelu, spatial_merge, spatial_merge_RxR, patch_merger, checkpoint"


class ResidualBlock(nn.Module):
    """``x + mlp(norm(x))``, of ``mlpNx_resMx_gelu``. (LLaVA adds it to the normed value.)"""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.pre_norm = nn.LayerNorm(size)
        self.proj = nn.Sequential(nn.Linear(size, size), nn.GELU(), nn.Linear(size, size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pre_norm(x)
        return x + self.proj(x)


def unknown_projector(kind: str, merger: Mapping | None = None) -> str | None:
    """Why :func:`build_projector` cannot build a projector of this name, or None."""
    if kind == CHECKPOINT and not merger:
        return "mm_projector_type 'checkpoint', but no mm_packing_projector, which says what it is"
    known = kind in ("linear", "identity", CHECKPOINT) or known_merge(kind) or _MLP.fullmatch(kind)
    return None if known else f"mm_projector_type {kind!r}; these can be exported: {KNOWN}"


def build_projector(kind: str, vision_size: int, text_size: int, merger: Mapping | None = None) -> nn.Module:
    """The projector of this ``mm_projector_type``; ``merger``: what a VLM's own is (``mm_packing_projector``).

    Raises ``ValueError`` for an unknown one.
    """
    if reason := unknown_projector(kind, merger):
        raise ValueError(reason)
    if kind == CHECKPOINT and merger:
        return merging_projector(Merger.from_dict(dict(merger)))
    if (merging := make_projector(kind, vision_size, text_size)) is not None:
        return merging
    if kind == "linear":
        return nn.Linear(vision_size, text_size)
    if kind == "identity":
        return nn.Identity()
    depth, blocks = (int(number or 0) for number in _MLP.fullmatch(kind).groups())
    layers: list[nn.Module] = [nn.Linear(vision_size, text_size)]
    for _ in range(1, depth):
        layers += [nn.GELU(), nn.Linear(text_size, text_size)]
    return nn.Sequential(*layers, *(ResidualBlock(text_size) for _ in range(blocks)))
