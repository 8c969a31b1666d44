"""From projected features to visual tokens: tiles put together, padding cut off, newlines."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional

from ..data.segments import Grid
from ..data.smart_resize import merged
from ..multimodal.visual_tokens import TokenLayout, arrange, token_count
from .visual_settings import Size, VisualSettings


def token_layout(settings: VisualSettings) -> TokenLayout:
    """What :mod:`..multimodal.visual_tokens` is told for native resolution, and for the videos of every mode."""
    return TokenLayout(
        clips=settings.native is not None and settings.native.video == "clip",
        merge_type=settings.mm_patch_merge_type,
        newline_position=settings.mm_newline_position,
        pool_stride=settings.pool_stride,
        pool_mode=settings.mm_spatial_pool_mode,
    )


def video_tokens(grid: Grid, settings: VisualSettings) -> int:
    """Visual tokens of a video with this grid, in patches."""
    return token_count((grid[0], *merged(grid[1:], settings.merge)), True, token_layout(settings))


def arrange_visuals(
    tokens: torch.Tensor,
    grids: Sequence[Grid],
    sizes: Sequence[Size] | None,
    is_video: bool,
    settings: VisualSettings,
    newline: torch.Tensor | None,
) -> list[torch.Tensor]:
    """The visual tokens ``[n, hidden]`` of each image or video.

    Args:
        tokens: ``[N, hidden]``, what the projector made of all of them, one after the other.
        grids: (tiles or frames, rows, columns) of each, in patches.
        sizes: (width, height) of each image as it was opened; needed for ``anyres``.
        newline: ``[hidden]``, LLaVA's ``image_newline``.
    """
    shapes = [(t, *merged((h, w), settings.merge)) for t, h, w in grids]
    parts = tokens.split([t * h * w for t, h, w in shapes])
    layout = token_layout(settings)
    if is_video or settings.is_native:
        return [arrange(part, shape, is_video, layout, newline) for part, shape in zip(parts, shapes)]
    given = sizes if sizes is not None else [None] * len(grids)
    return [_arrange_image(part, shape, size, settings, newline) for part, shape, size in zip(parts, shapes, given)]


def _arrange_image(
    tokens: torch.Tensor, grid: Grid, size: Size | None, settings: VisualSettings, newline: torch.Tensor | None
) -> torch.Tensor:
    """``square``, ``pad`` and ``anyres``: the image as a whole, then the map that its tiles make up."""
    tiles, rows, columns = grid
    if tiles == 1:
        ends = settings.has_newlines and settings.mm_newline_after_image
        return torch.cat([tokens, newline[None].to(tokens)]) if ends else tokens
    if settings.mm_patch_merge_type == "flat":
        return tokens
    whole, rest = tokens[: rows * columns], tokens[rows * columns :]
    if size is None:
        raise ValueError(f"an image of {tiles} tiles needs its size in pixels (image_sizes)")
    across, down = settings.tile_grid(size)
    if across * down != tiles - 1:
        raise ValueError(
            f"an image of {size[0]} x {size[1]} pixels has {across} x {down} tiles and itself, not {tiles}: "
            f"image_sizes and image_grid_thw do not fit"
        )
    table = rest.view(down, across, rows, columns, -1).transpose(1, 2).flatten(0, 1).flatten(1, 2)
    if settings.has_newlines:
        table = table[settings.unpadded(size, *table.shape[:2])]
        shape = settings.shrunk(*table.shape[:2], rows)
        if shape != tuple(table.shape[:2]):
            image = functional.interpolate(table.permute(2, 0, 1)[None], shape, mode="bilinear")
            table = image[0].permute(1, 2, 0)
        table = torch.cat([table, newline.to(table).expand(len(table), 1, -1)], dim=1)
    return torch.cat([whole, table.flatten(0, 1)])
