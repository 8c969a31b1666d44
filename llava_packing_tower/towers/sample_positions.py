"""Positions as OneVision-Encoder's LLaVA gives them to its tower: one entry for each sample of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..data.positions import grid_positions

if TYPE_CHECKING:
    from .packing_tower import HEVCViTPackingVisionTower


def encode_samples(
    tower: HEVCViTPackingVisionTower,
    images: torch.Tensor | Sequence[torch.Tensor],
    positions: Sequence[torch.Tensor | None],
    return_spatial_dims: bool = False,
) -> Any:
    """What a tower returns for images with the positions of their samples; see :func:`join_samples`.

    Features ``[B, tokens, hidden_size]`` for a tensor, a list of ``[tokens_i, hidden_size]`` for a list.
    """
    patch, model = tower.config.patch_size, tower.vision_tower
    inputs, rows = join_samples(images, positions, patch, model.image_only)
    features = tower(inputs, patch_positions=rows)
    if rows is not None:  # frames that were joined are images again
        features = torch.cat(list(features)).unflatten(0, (len(images), -1))
        features = features if isinstance(images, torch.Tensor) else list(features)
    return (features, *(side // patch for side in images[0].shape[-2:])) if return_spatial_dims else features


def join_samples(
    images: torch.Tensor | Sequence[torch.Tensor],
    positions: Sequence[torch.Tensor | None],
    patch_size: int,
    image_only: bool,
) -> tuple[torch.Tensor | Sequence[torch.Tensor], torch.Tensor | None]:
    """Images and the positions of their samples, as a tower takes them.

    The frames of a sample whose positions name several times become one clip; they stand where the positions say.

    Args:
        images: ``[B, C, H, W]``, or a list of ``[C, H, W]`` of one size.
        positions: for each sample ``[n, 3]`` or ``[1, n, 3]`` (frame, row, column) of its patches, or None.
        patch_size: side of a patch in pixels.
        image_only: whether the tower knows no time; then only other rows and columns than those of the grid count.

    Returns:
        The images, or a list in which frames are clips ``[C, T, H, W]``; positions ``[N, 3]`` of all patches, or None
        where they are those of the grid.

    Raises:
        ValueError: positions of another number of patches than the images have, or images of several sizes.
    """
    sizes = {tuple(image.shape[-2:]) for image in images}
    if all(entry is None for entry in positions):
        return images, None
    if len(sizes) != 1:
        raise ValueError(f"positions of samples are for images of one size, got {sorted(sizes)}")
    height, width = next(iter(sizes))
    grid = grid_positions((1, height // patch_size, width // patch_size))
    entries = [None if entry is None else _frames(entry, grid, image_only) for entry in positions]
    given = sum(len(entry) for entry in entries if entry is not None)
    free, rest = sum(entry is None for entry in entries), len(images) - given
    if rest < free or (free == 0 and rest) or (free > 1 and given and rest != free):
        raise ValueError(
            f"{len(images)} images of {len(grid)} patches, but the samples have positions of "
            f"{[None if entry is None else entry.numel() // 3 for entry in positions]} patches"
        )
    if given == 0:
        return images, None
    share = rest // free if free else 0
    inputs: list[torch.Tensor] = []
    rows: list[torch.Tensor] = []
    start = 0
    for entry in entries:
        count = share if entry is None else len(entry)
        frames = list(images[start : start + count])
        start += count
        rows += [grid.float()] * count if entry is None else list(entry)
        is_clip = entry is not None and len(entry[..., 0].unique()) > 1 and not image_only
        inputs += [torch.stack(frames, dim=1)] if is_clip else frames
    return inputs, torch.cat(rows)


def _frames(entry: torch.Tensor, grid: torch.Tensor, image_only: bool) -> torch.Tensor | None:
    """The positions of a sample as ``[images, patches, 3]``; None where each image has those of the grid anyway."""
    entry = entry.reshape(-1, 3).float().cpu()
    if entry.shape[0] % len(grid) or entry.shape[0] == 0:
        raise ValueError(f"a sample has {entry.shape[0]} positions, but its images have {len(grid)} patches each")
    entry = entry.unflatten(0, (-1, len(grid)))
    first = 1 if image_only else 0
    plain = grid.float()[..., first:]
    same = all(torch.equal(frame[..., first:], plain) for frame in entry)
    return None if same and (image_only or len(entry) == 1) else entry
