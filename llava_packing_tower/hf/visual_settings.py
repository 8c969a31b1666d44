"""How a LLaVA turns images into tiles and tiles into visual tokens, and how many there are of each. No torch here.

The rules of LLaVA 1.x and LLaVA-NeXT (``mm_utils.py``, ``model/llava_arch.py``) for ``square``, ``pad`` and ``anyres``,
and this package's own for ``native``.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..data.native_config import KEYS as NATIVE_KEYS
from ..data.native_config import NATIVE, PREFIX, NativeSettings, settings_of
from ..data.smart_resize import CHECKPOINT, MERGES, SmartResize, merge_of, merged

Size = tuple[int, int]
"""(width, height) in pixels."""

PROJECTOR = "mm_packing_projector"
"""What a VLM's own projector is (``mm_projector_type: checkpoint``): see :class:`..models.merger.Merger`."""
FIELDS: dict[str, Any] = {
    "image_aspect_ratio": "square",
    "image_grid_pinpoints": None,
    "mm_projector_type": "linear",
    "mm_patch_merge_type": "flat",
    "mm_newline_position": "one_token",
    "mm_newline_after_image": True,
    "mm_spatial_pool_stride": 2,
    "mm_spatial_pool_mode": "bilinear",
    "mm_reads_videos": False,
    PROJECTOR: None,
    **{PREFIX + name: None for name in NATIVE_KEYS},
}
"""Keys of config.json and preprocessor_config.json, and their defaults. All but three are LLaVA's own, or those of
native resolution: ``mm_newline_after_image`` (whether an image of one tile ends with a newline: LLaVA-NeXT adds one,
LLaVA 1.x does not) and ``mm_reads_videos``."""

_RANGE = re.compile(r"\((\d+)x(\d+)\)")
_MAX_TILES = re.compile(r"anyres_max_(\d+)")
# More than this times the most tokens, an image's are interpolated (LLaVA-NeXT).
_SLACK = 1.1
_HOST_POOL_STRIDE = 2
"""LLaVA-NeXT pools frames by 2, whatever mm_spatial_pool_stride says."""


def is_anyres(ratio: str | None) -> bool:
    return ratio == "anyres" or "anyres_max" in (ratio or "")


@dataclass(frozen=True)
class VisualSettings:
    """The keys of :data:`FIELDS`, with the tower's ``patch_size`` and nominal ``image_size`` in pixels."""

    patch_size: int
    image_size: int
    image_aspect_ratio: str = "square"
    image_grid_pinpoints: str | Sequence[Sequence[int]] | None = None
    mm_projector_type: str = "linear"
    mm_patch_merge_type: str = "flat"
    mm_newline_position: str = "one_token"
    mm_newline_after_image: bool = True
    mm_spatial_pool_stride: int = 2
    mm_spatial_pool_mode: str = "bilinear"
    mm_reads_videos: bool = False
    native: NativeSettings | None = None
    checkpoint_merge: tuple[int, int] = (1, 1)

    @classmethod
    def read(cls, source: object, patch_size: int, image_size: int) -> VisualSettings:
        """From the attributes of a config or an image processor. Raises ``ValueError`` for values that do not fit."""
        values = {name: getattr(source, name, default) for name, default in FIELDS.items() if not _is_native(name)}
        values = {name: FIELDS[name] if value is None else value for name, value in values.items()}
        own = getattr(source, PROJECTOR, None) or {}
        merge = tuple(own.get("merge", (1, 1)))
        return cls(patch_size, image_size, **values, native=settings_of(source), checkpoint_merge=merge)

    # ---------------------------------------------------------------- what the keys say

    @property
    def is_native(self) -> bool:
        return self.native is not None

    @property
    def is_anyres(self) -> bool:
        return is_anyres(self.image_aspect_ratio)

    @property
    def has_newlines(self) -> bool:
        return "unpad" in self.mm_patch_merge_type

    @property
    def merge(self) -> tuple[int, int]:
        """Rows and columns of patches that become one token."""
        return self.checkpoint_merge if self.mm_projector_type == CHECKPOINT else merge_of(self.mm_projector_type)

    @property
    def rule(self) -> SmartResize:
        """The rule of native resolution. Raises ``ValueError`` for other settings."""
        if self.native is None:
            raise ValueError(f"image_aspect_ratio is {self.image_aspect_ratio!r}, not {NATIVE!r}")
        return SmartResize(self.patch_size, self.merge, self.native.min_patches, self.native.max_patches)

    @property
    def pool_stride(self) -> int:
        return self.mm_spatial_pool_stride if self.is_native else _HOST_POOL_STRIDE

    @property
    def max_tiles(self) -> int | None:
        """The number in ``anyres_max_9``: an image has the tokens of at most so many tiles (about)."""
        found = _MAX_TILES.match(self.image_aspect_ratio)
        return int(found[1]) if found else None

    # ---------------------------------------------------------------- anyres

    def resolutions(self, side: int) -> list[Size]:
        """The sizes to which ``anyres`` fits an image, in the order of ``image_grid_pinpoints``.

        side: of a tile, in pixels, for pinpoints that count tiles: ``"(1x1),...,(6x6)"``.
        """
        points = self.image_grid_pinpoints
        if isinstance(points, str) and "x" in points:
            tiles = [(int(a), int(b)) for a, b in _RANGE.findall(points)]
            (left, top), (right, bottom) = tiles[0], tiles[-1]
            return [(a * side, b * side) for a in range(left, right + 1) for b in range(top, bottom + 1)]
        return [(int(w), int(h)) for w, h in (ast.literal_eval(points) if isinstance(points, str) else points or ())]

    def best_resolution(self, size: Size, side: int) -> Size:
        """Of :meth:`resolutions` the one in which the scaled image has most pixels, and of those the smallest one."""

        def merit(candidate: Size) -> tuple[int, int]:
            scale = min(candidate[0] / size[0], candidate[1] / size[1])
            kept = min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])
            return kept, kept - candidate[0] * candidate[1]

        return max(self.resolutions(side), key=merit)  # of equals the first, as LLaVA does

    def tile_grid(self, size: Size) -> tuple[int, int]:
        """Columns and rows of the tiles of an image of this size."""
        width, height = self.best_resolution(size, self.image_size)
        return width // self.image_size, height // self.image_size

    # ---------------------------------------------------------------- tokens

    def unpadded(self, size: Size, rows: int, columns: int) -> tuple[slice, slice]:
        """The rows and columns of a token map that show the image, and not its padding."""
        width, height = size
        if width / height > columns / rows:
            pad = (rows - int(height * (columns / width))) // 2
            return slice(pad, rows - pad), slice(0, columns)
        pad = (columns - int(width * (rows / height))) // 2
        return slice(0, rows), slice(pad, columns - pad)

    def shrunk(self, rows: int, columns: int, side: int) -> tuple[int, int]:
        """Rows and columns to which ``anyres_max_N`` interpolates a token map; side: tokens per side of a tile."""
        if self.max_tiles is None:
            return rows, columns
        times = math.sqrt(rows * columns / (self.max_tiles * side**2))
        return (int(rows // times), int(columns // times)) if times > _SLACK else (rows, columns)

    def image_tokens(self, grid: tuple[int, int, int], size: Size | None = None) -> int:
        """Visual tokens of an image with this grid (tiles, rows and columns of patches).

        size: of the image as it was opened; needed for ``anyres``.
        """
        tiles, (rows, columns) = grid[0], merged(grid[1:], self.merge)
        if self.is_native:
            return rows * (columns + self.has_newlines)
        if tiles == 1:
            return rows * columns + (self.has_newlines and self.mm_newline_after_image)
        if not self.has_newlines:
            return tiles * rows * columns
        across, down = self.tile_grid(size)
        lines, places = self.unpadded(size, down * rows, across * columns)
        shape = (lines.stop - lines.start, places.stop - places.start)
        lines, places = self.shrunk(*shape, rows)
        return rows * columns + lines * (places + 1)


def _is_native(name: str) -> bool:
    return name.startswith(PREFIX)


def fields_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of :data:`FIELDS` in a mapping; what it leaves out, or has as None, has its default."""
    return {name: default if values.get(name) is None else values[name] for name, default in FIELDS.items()}


def unsupported_reason(values: Mapping[str, Any]) -> str | None:
    """Why images cannot be prepared as these keys say, or None."""
    ratio = values.get("image_aspect_ratio") or "square"
    if ratio not in ("square", "pad", NATIVE) and not is_anyres(ratio):
        return f"image_aspect_ratio {ratio!r}; these can be exported: square, pad, anyres, anyres_max_N, {NATIVE}"
    merge_type = values.get("mm_patch_merge_type") or "flat"
    if merge_type not in ("flat", "spatial", "spatial_unpad"):
        return f"mm_patch_merge_type {merge_type!r}; these can be exported: flat, spatial, spatial_unpad"
    if is_anyres(ratio) and not values.get("image_grid_pinpoints"):
        return f"image_aspect_ratio {ratio!r} without image_grid_pinpoints"
    if is_anyres(ratio) and merge_type != "flat" and values.get("mm_projector_type") == "patch_merger":
        return "anyres tiles of a patch_merger, whose tokens are no square, which LLaVA itself cannot arrange"
    return None


__all__ = ["FIELDS", "MERGES", "VisualSettings", "fields_of", "is_anyres", "unsupported_reason"]
