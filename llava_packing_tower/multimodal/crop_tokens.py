"""How many tokens LLaVA makes of an image that is cut into crops of one size, from the image's size alone.

The rules of ``prepare_inputs_labels_for_multimodal`` for ``anyres``, ``anyres_max_N`` and a single crop.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass


@dataclass(frozen=True)
class CropLayout:
    """How crops become tokens.

    side: tokens along a side of a crop; merge_type: LLaVA's ``mm_patch_merge_type``, "flat" for LLaVA 1.x.
    aspect_ratio: its ``image_aspect_ratio``.
    """

    side: int
    merge_type: str = "flat"
    aspect_ratio: str = "square"

    def tokens(self, size: tuple[int, int], grid: tuple[int, int] | None) -> int:
        """Tokens of an image of ``size`` (width, height): one crop, or one and ``grid`` (columns, rows) more."""
        each = self.side**2
        if grid is None:
            return each + ("unpad" in self.merge_type)
        columns, rows = grid
        if not self.merge_type.startswith("spatial"):
            return each * (1 + columns * rows)
        return each * ("nobase" not in self.merge_type) + self._tiles(size, columns * self.side, rows * self.side)

    def _tiles(self, size: tuple[int, int], width: int, height: int) -> int:
        if "maxpool2x2" in self.merge_type:
            return (height // 2) * (width // 2)
        if "unpad" not in self.merge_type:
            return height * width
        width, height = unpadded(size, width, height)
        most = re.match(r"anyres_max_(\d+)", self.aspect_ratio)
        if most and (times := math.sqrt(height * width / (int(most[1]) * self.side**2))) > 1.1:
            width, height = int(width // times), int(height // times)
        return height * (width + 1)


def unpadded(size: tuple[int, int], width: int, height: int) -> tuple[int, int]:
    """Columns and rows that are left of ``width x height`` without the padding of an image of ``size``, as LLaVA's
    ``unpad_image``."""
    if size[0] / size[1] > width / height:
        inner = int(size[1] * (width / size[0]))
        return width, height - 2 * ((height - inner) // 2)
    inner = int(size[0] * (height / size[1]))
    return width - 2 * ((width - inner) // 2), height
