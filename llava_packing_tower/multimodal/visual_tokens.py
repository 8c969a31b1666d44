"""From images and videos to visual tokens: one packed pass through the tower, one through the projector, then each its
own way (pooling, newlines)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from ..data.positions import (
    compute_patch_positions_with_interpolated_temporal,
    grid_positions,
    interpolate_frame_indices,
)
from ..data.segments import Grid
from ..data.smart_resize import merged
from .projectors import MergingProjector
from .visual_inputs import Visual


@dataclass(frozen=True)
class TokenLayout:
    """How features become the tokens of a sequence.

    clips: whether the frames of a video see each other. merge_type, newline_position, pool_stride, pool_mode: LLaVA's
    ``mm_patch_merge_type``, ``mm_newline_position``, ``mm_spatial_pool_stride``, ``mm_spatial_pool_mode``.
    """

    clips: bool
    merge_type: str = "flat"
    newline_position: str = "one_token"
    pool_stride: int = 2
    pool_mode: str = "bilinear"

    @property
    def has_newlines(self) -> bool:
        return "unpad" in self.merge_type


def tower_inputs(
    visuals: Sequence[Visual],
    patch_size: int,
    clips: bool,
    frames_per_patch: int = 1,
    takes_positions: bool = True,
    stretches_clips: bool = True,
) -> tuple[list[torch.Tensor], list[Grid], torch.Tensor | None]:
    """What the tower is called with: images ``[C, H, W]`` and clips ``[C, T, H, W]``, their grids in patches, and the
    positions of all patches ``[N, 3]``, or None where those of the grids are meant.

    frames_per_patch, takes_positions, stretches_clips: of the encoder.

    Raises ``ValueError`` for positions of another number of patches, or for several ``<image>`` that are frames of one
    clip where a patch covers several frames.
    """
    inputs: list[torch.Tensor] = []
    grids: list[Grid] = []
    positions: list[torch.Tensor | None] = []
    previous: Visual | None = None
    for visual in visuals:
        count, rows, columns = len(visual.frames), *(side // patch_size for side in visual.frames.shape[-2:])
        own = visual.patch_positions
        if own is not None and own.shape != (count * rows * columns, 3):
            raise ValueError(
                f"positions of shape {list(own.shape)} for {count} x {rows} x {columns} = {count * rows * columns} "
                f"patches (frames x rows x columns)"
            )
        if not clips or not (visual.is_video or visual.group is not None):
            inputs += visual.frames.unbind()
            grids += [(1, rows, columns)] * count
        elif visual.group is not None and previous is not None and _same_clip(previous, visual):
            if frames_per_patch > 1:
                raise ValueError(
                    f"the frames of a clip have an <image> each, but a patch of this tower covers {frames_per_patch} "
                    f"frames: use mm_packing_video 'frames', or one <image> for the video"
                )
            inputs[-1] = torch.cat([inputs[-1], visual.frames.transpose(0, 1)], dim=1)
            grids[-1] = (grids[-1][0] + count, rows, columns)
        else:
            inputs.append(visual.frames.transpose(0, 1))
            grids.append((-(-count // frames_per_patch), rows, columns))
        if own is None and takes_positions and clips and visual.is_video:
            own = _clip_positions(visual, rows, columns, stretches_clips)
        positions.append(own)
        previous = visual
    if all(own is None for own in positions):
        return inputs, grids, None
    filled = [
        grid_positions((1, *(side // patch_size for side in v.frames.shape[-2:]))).repeat(len(v.frames), 1)
        if own is None
        else own.cpu()
        for v, own in zip(visuals, positions)
    ]
    return inputs, grids, torch.cat([own.float() for own in filled])


def _same_clip(a: Visual, b: Visual) -> bool:
    return a.group == b.group and a.frames.shape[-2:] == b.frames.shape[-2:]


def _clip_positions(visual: Visual, rows: int, columns: int, stretched: bool) -> torch.Tensor:
    """Positions of a clip: its frames stand where they lie in their video, ``stretched`` over the tower's context."""
    indices = visual.frame_indices or tuple(range(len(visual.frames)))
    total = visual.total_frames or max(indices) + 1
    interpolated = torch.tensor([indices])
    if stretched:
        interpolated = interpolate_frame_indices(interpolated, torch.tensor([total]))
    return compute_patch_positions_with_interpolated_temporal(interpolated, rows, columns)


def encode_visuals(
    tower: nn.Module,
    projector: nn.Module,
    visuals: Sequence[Visual],
    layout: TokenLayout,
    newline: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """Visual tokens ``[tokens_i, text_size]`` of each image or video.

    Args:
        tower: called once, with all images and clips.
        projector: called once, with ``[N, C]``; a :class:`MergingProjector` also with the grids.
        newline: ``[text_size]``, LLaVA's ``image_newline``; needed if the layout has newlines.

    Raises:
        ValueError: sides that are no multiples of the patch size, positions that do not fit.
    """
    patch, frames_per_patch = tower.config.patch_size, tower.vision_tower.frames_per_patch
    takes_positions = tower.vision_tower.takes_positions
    inputs, grids, positions = tower_inputs(
        visuals, patch, layout.clips, frames_per_patch, takes_positions, tower.vision_tower.stretches_clips
    )
    features = torch.cat(tower(inputs) if positions is None else tower(inputs, patch_positions=positions))
    weight = next(projector.parameters(), None)
    if weight is not None and features.dtype != weight.dtype and not torch.is_autocast_enabled(features.device.type):
        features = features.to(weight.dtype)
    if isinstance(projector, MergingProjector):
        tokens, merge = projector(features, grids), projector.merge
    else:
        tokens, merge = projector(features), (1, 1)
    shapes = []
    for visual in visuals:
        steps = -(-len(visual.frames) // frames_per_patch) if layout.clips else len(visual.frames)
        shapes.append((steps, *merged(tuple(side // patch for side in visual.frames.shape[-2:]), merge)))
    parts = tokens.split([t * h * w for t, h, w in shapes])
    return [
        arrange(part, shape, visual.is_video, layout, newline) for part, shape, visual in zip(parts, shapes, visuals)
    ]


def arrange(
    tokens: torch.Tensor, grid: Grid, is_video: bool, layout: TokenLayout, newline: torch.Tensor | None
) -> torch.Tensor:
    """``[t*h*w, D]`` tokens of one image or video, pooled if it is a video, with its newlines, as ``[n, D]``."""
    if is_video and layout.pool_stride > 1:
        tokens, grid = pool(tokens, grid, layout.pool_stride, layout.pool_mode)
    if not layout.has_newlines or (is_video and layout.newline_position == "no_token"):
        return tokens
    t, h, w = grid
    lines = {"grid": (t * h, w), "frame": (t, h * w), "one_token": (1, t * h * w)}
    return _end_lines(tokens.view(*lines[layout.newline_position if is_video else "grid"], -1), newline)


def _end_lines(lines: torch.Tensor, newline: torch.Tensor | None) -> torch.Tensor:
    """``[lines, n, D]`` with a newline behind each line, as ``[lines * (n + 1), D]``."""
    if newline is None:
        raise ValueError("mm_patch_merge_type is spatial_unpad, but the model has no image_newline")
    ends = newline.to(lines).expand(lines.shape[0], 1, -1)
    return torch.cat([lines, ends], dim=1).flatten(0, 1)


def token_count(grid: Grid, is_video: bool, layout: TokenLayout) -> int:
    """Length of what :func:`arrange` makes of tokens on this grid."""
    t, h, w = grid
    if is_video and layout.pool_stride > 1:
        h, w = pooled_sides(h, w, layout.pool_stride, layout.pool_mode)
    lines = {"grid": t * h, "frame": t, "one_token": 1, "no_token": 0}
    newlines = lines[layout.newline_position if is_video else "grid"] if layout.has_newlines else 0
    return t * h * w + newlines


def pooled_sides(h: int, w: int, stride: int, mode: str) -> tuple[int, int]:
    """Rows and columns behind :func:`pool`."""
    if mode == "bilinear":
        return math.ceil(h / stride), math.ceil(w / stride)
    return max(1, h // stride), max(1, w // stride)


def pool(tokens: torch.Tensor, grid: Grid, stride: int, mode: str) -> tuple[torch.Tensor, Grid]:
    """Pool every frame, as LLaVA's ``get_2dPool`` does for square ones.

    Sides are rounded down ("average", "max": what is left over is dropped) or up ("bilinear"). A side shorter than the
    stride becomes 1.

    Args:
        tokens: ``[t*h*w, D]``. grid: (t, h, w).

    Returns:
        the pooled tokens and their grid. Raises ``ValueError`` for an unknown mode.
    """
    t, h, w = grid
    image = tokens.view(t, h, w, -1).permute(0, 3, 1, 2).contiguous()
    if mode == "bilinear":
        image = functional.interpolate(image, size=pooled_sides(h, w, stride, mode), mode="bilinear")
    elif mode in ("average", "max"):
        kernel = (min(stride, h), min(stride, w))
        image = (functional.avg_pool2d if mode == "average" else functional.max_pool2d)(image, kernel)
    else:
        raise ValueError(f"mm_spatial_pool_mode is {mode!r}; it is one of average, max, bilinear")
    return image.permute(0, 2, 3, 1).reshape(-1, tokens.shape[-1]), (t, *image.shape[-2:])
