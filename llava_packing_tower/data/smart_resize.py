"""The size to which an image is resized: its own, rounded to whole patches, within bounds. No torch."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

# Patches (rows, columns) that a projector merges into one token; every other projector keeps them apart.
MERGES: dict[str, tuple[int, int]] = {"spatial_merge": (2, 2), "patch_merger": (1, 4)}
ANY_SQUARE = re.compile(r"spatial_merge_([1-9]\d?)x\1")
MERGE_NAMES = (*MERGES, "spatial_merge_3x3")
"""Names for messages; the last stands for all r x r."""
CHECKPOINT = "checkpoint"
"""The projector that a VLM has behind its tower: how many patches it merges, the tower's config says."""


def known_merge(projector_type: str | None) -> tuple[int, int] | None:
    """Rows and columns of patches that this projector merges into one visual token; None for one of LLaVA's own."""
    if square := ANY_SQUARE.fullmatch(projector_type or ""):
        return int(square[1]), int(square[1])
    return MERGES.get(projector_type or "")


def merge_of(projector_type: str | None) -> tuple[int, int]:
    """Rows and columns of patches that become one visual token behind this projector."""
    return known_merge(projector_type) or (1, 1)


def merged(grid: tuple[int, int], merge: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of tokens for rows and columns of patches; what is left over at an edge makes a token too."""
    return -(-grid[0] // merge[0]), -(-grid[1] // merge[1])


@dataclass(frozen=True)
class SmartResize:
    """The size at which an image reaches the tower.

    Both sides go to the nearest multiples of the unit (patch size times merge), at least one unit. An image whose
    patches would then be more than ``max_patches`` or fewer than ``min_patches`` is scaled first, keeping its aspect
    ratio, and its sides are rounded down or up. ``max_patches`` always holds: where an image is so narrow that one
    unit is more than its share, or where rounding up would pass it, the longer side is cut down to what is left.
    (The scaling is Qwen2-VL's ``smart_resize``, arXiv:2409.12191; the rule for narrow images is not from there.)

    Args:
        patch_size: side of a patch in pixels.
        merge: (rows, columns) of patches that the projector makes one token of.
        min_patches, max_patches: bounds for the number of patches of one image or frame.

    Raises:
        ValueError: bounds that are not positive whole numbers, that cross, or that are too small for one unit.
    """

    patch_size: int
    merge: tuple[int, int]
    min_patches: int
    max_patches: int

    def __post_init__(self) -> None:
        check_bounds(self.min_patches, self.max_patches, self.merge)

    @property
    def unit(self) -> tuple[int, int]:
        """Height and width in pixels of what becomes one visual token."""
        return self.patch_size * self.merge[0], self.patch_size * self.merge[1]

    def size(self, width: int, height: int, max_patches: int | None = None) -> tuple[int, int]:
        """Width and height in pixels at which an image of this width and height is encoded.

        ``max_patches``: a tighter bound than the rule's own, for the frames of a long video.
        Raises ``ValueError`` for an image without pixels.
        """
        if width < 1 or height < 1:
            raise ValueError(f"an image of {width} x {height} pixels (width x height) is empty")
        tall, wide = self.unit
        each = self.merge[0] * self.merge[1]
        most = max(1, min(self.max_patches, max_patches or self.max_patches) // each)
        least = min(-(-self.min_patches // each), most)
        rows, columns = max(1, round(height / tall)), max(1, round(width / wide))
        area = height / tall * width / wide
        if rows * columns > most:
            shrink = math.sqrt(area / most)
            rows, columns = (max(1, math.floor(side / shrink)) for side in (height / tall, width / wide))
        elif rows * columns < least:
            grow = math.sqrt(least / area)
            rows, columns = (max(1, math.ceil(side * grow)) for side in (height / tall, width / wide))
        if rows * columns > most:
            # The longer side gives way; of equal ones that of the shorter side of the image.
            if rows > columns or (rows == columns and width > height):
                rows = max(1, most // columns)
            else:
                columns = max(1, most // rows)
            rows, columns = min(rows, most), min(columns, most)
        return columns * wide, rows * tall

    def grid(self, width: int, height: int, max_patches: int | None = None) -> tuple[int, int]:
        """Rows and columns of patches of an image of this width and height in pixels."""
        width, height = self.size(width, height, max_patches)
        return height // self.patch_size, width // self.patch_size

    def scaling(self, width: int, height: int, max_patches: int | None = None) -> float | None:
        """Pixels of an image over those at which it is encoded, where a bound changes its size: above 1 it is reduced.
        None where its sides are rounded to whole units and nothing else."""
        target = self.size(width, height, max_patches)
        nearest = [max(1, round(side / unit)) * unit for side, unit in zip((width, height), self.unit[::-1])]
        return None if [*target] == nearest else width * height / (target[0] * target[1])

    def tokens(self, width: int, height: int, max_patches: int | None = None) -> tuple[int, int]:
        """Rows and columns of visual tokens of an image of this width and height in pixels."""
        return merged(self.grid(width, height, max_patches), self.merge)


def check_bounds(min_patches: int, max_patches: int, merge: tuple[int, int] = (1, 1)) -> None:
    """Raises ``ValueError`` for bounds that no image can keep."""
    for name, value in (("mm_packing_min_patches", min_patches), ("mm_packing_max_patches", max_patches)):
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 1 << 30:
            raise ValueError(f"{name} must be a whole number of patches, at least 1, got {value!r:.80}")
    if min_patches > max_patches:
        raise ValueError(f"mm_packing_min_patches {min_patches} is larger than mm_packing_max_patches {max_patches}")
    if max_patches < merge[0] * merge[1]:
        raise ValueError(
            f"mm_packing_max_patches {max_patches} is too small for one token of {merge[0]} x {merge[1]} patches"
        )
