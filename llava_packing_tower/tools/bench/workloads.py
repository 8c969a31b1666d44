"""Batches to measure: so many images of one size, or of many. Sizes come from a seed, the same on every machine."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...multimodal.flops import encoder_flops

UNIFORM_SIDE = 448
RAGGED_AREA = (224.0**2, 0.7 * 1120.0**2)
RAGGED_LOG_ASPECT = 0.7
TINY = 0.25
"""What the sides in pixels are multiplied by for the small defaults (CPU)."""

Images = torch.Tensor | list[torch.Tensor]


@dataclass(frozen=True)
class Workload:
    """A batch. grids: (rows, columns) of each image in patches; train: forward and backward, else forward."""

    name: str
    grids: tuple[tuple[int, int], ...]
    train: bool = False

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each image."""
        return tuple(h * w for h, w in self.grids)

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def ragged(self) -> bool:
        return len(set(self.grids)) > 1

    @property
    def label(self) -> str:
        return f"train:{self.name}" if self.train else self.name

    def images(self, patch_size: int, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Images:
        """Normal noise: ``[B, 3, H, W]`` if all sizes are equal, else a list of ``[3, H, W]``."""
        generator = torch.Generator(device).manual_seed(seed)
        images = [
            torch.randn(3, h * patch_size, w * patch_size, generator=generator, device=device).to(dtype)
            for h, w in self.grids
        ]
        return images if self.ragged else torch.stack(images)


def reordered(images: Images, turn: int) -> Images:
    """The images in another order for every turn (those of one size are left alone).

    A batch that is repeated as it is would find everything that depends on its sizes in caches; real ones do not.
    """
    if isinstance(images, torch.Tensor):
        return images
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(turn))
    return [images[i] for i in order.tolist()]


def ragged_grids(
    count: int, patch_size: int, scale: float = 1.0, seed: int = 1, cell: int = 1
) -> tuple[tuple[int, int], ...]:
    """Rows and columns, in patches, of ``count`` images.

    Area log-uniform between 224^2 and 0.7 * 1120^2 pixels, height over width ``exp(U(-0.7, 0.7))``, sides times
    ``scale`` and rounded to cells of ``cell`` patches a side (one at least).
    """
    generator = torch.Generator().manual_seed(seed)
    low, high = (math.log(area) for area in RAGGED_AREA)
    grids = []
    for u, v in torch.rand(count, 2, generator=generator, dtype=torch.float64).tolist():
        side = math.exp((low + u * (high - low)) / 2) * scale
        stretch = math.exp((2 * v - 1) * RAGGED_LOG_ASPECT / 2)
        grids.append(tuple(max(1, round(x / patch_size / cell)) * cell for x in (side * stretch, side / stretch)))
    return tuple(grids)


def parse_workload(
    text: str, patch_size: int, scale: float = 1.0, seed: int = 1, train: bool = False, cell: int = 1
) -> Workload:
    """``uniN`` (N images of 448 x 448), ``uniN@S`` (of S x S pixels), ``raggedN`` (sizes drawn with ``seed``) or
    ``raggedN#K`` (with seed K); ``train:`` in front for training.

    Sides are rounded to whole cells of ``cell`` patches a side. Raises ``ValueError`` for anything else.
    """
    match = re.fullmatch(r"(train:)?(?:uni(\d+)(?:@(\d+))?|ragged(\d+)(?:#(\d+))?)", text.strip())
    count = int((match and (match[2] or match[4])) or 0)
    if not count or (match and match[3] and not int(match[3])):
        raise ValueError(
            f"workload {text!r}: give uniN, uniN@SIDE, raggedN or raggedN#SEED with N >= 1,"
            " e.g. uni32,ragged64,train:uni16"
        )
    if match[4]:
        grids = ragged_grids(count, patch_size, scale, int(match[5] or seed), cell)
    else:
        side = int(match[3]) if match[3] else UNIFORM_SIDE * scale
        grids = ((max(1, round(side / patch_size / cell)) * cell,) * 2,) * count
    return Workload(text.strip().removeprefix("train:"), grids, train or bool(match[1]))


def uniform(count: int, side: int) -> Workload:
    """``count`` images of ``side`` x ``side`` patches."""
    return Workload(f"{count} x {side * side}", ((side, side),) * count)


def useful_flops(
    config: object,
    lengths: Sequence[int],
    layers: int,
    train: bool = False,
    grids: Sequence[tuple[int, int]] | None = None,
) -> float:
    """Floating-point operations that the task asks for, whoever runs it; see :mod:`...multimodal.flops`.

    Over real patches (no padding, no prefix tokens) and ``layers`` layers; with ``train``, those of a training step.
    grids: (rows, columns) of the images, for encoders that attend in windows.
    """
    forward = encoder_flops(config, lengths, layers, None if grids is None else [(1, *grid) for grid in grids])
    return forward.step(trained=True) if train else forward.forward
