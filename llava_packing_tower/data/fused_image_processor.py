"""Images for several towers on one grid: each tower's pixels, at the grid times its own patch, on one canvas.

LLaVA carries one tensor per image. The canvas has three channels per tower and ``canvas`` pixels a side for every patch
of the grid, as many as the largest patch of the towers has. A tower's pixels stand in the upper left of its channels.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature

from .image_processor import PackingImageProcessor
from .native_config import NativeSettings
from .native_image_processor import NativeImageProcessor
from .smart_resize import SmartResize

CHANNELS = 3


def canvas_part(canvas: torch.Tensor, index: int, patch_size: int, side: int) -> torch.Tensor:
    """The pixels of one tower ``[..., 3, h * patch_size, w * patch_size]`` from canvases with ``side`` pixels for each
    patch. An image of three channels, LLaVA's blank one, is all towers'."""
    height, width = (edge // side * patch_size for edge in canvas.shape[-2:])
    start = index * CHANNELS if canvas.shape[-3] > CHANNELS else 0
    return canvas[..., start : start + CHANNELS, :height, :width]


def check_canvas(image: object, index: int, towers: int, side: int) -> None:
    """Raises ``ValueError`` for what is no canvas ``[3 * towers, H, W]`` and no image ``[3, H, W]`` for all towers."""
    whole = CHANNELS * towers
    if not isinstance(image, torch.Tensor) or image.dim() != 3:
        found = list(image.shape) if isinstance(image, torch.Tensor) else type(image).__name__
        raise ValueError(f"image {index} must be a tensor [{whole}, H, W] for {towers} towers, got {found}")
    if image.shape[0] not in (CHANNELS, whole):
        raise ValueError(f"image {index} has {image.shape[0]} channels; {towers} towers take {whole}, or 3 for all")
    if not all(edge and edge % side == 0 for edge in image.shape[1:]):
        raise ValueError(
            f"image {index} has height and width {list(image.shape[1:])}, which for these towers must be positive "
            f"multiples of {side}"
        )


@dataclass(frozen=True)
class FixedSize:
    """In place of :class:`SmartResize`: one size in pixels (width, height)."""

    width: int
    height: int
    patch_size: int

    @property
    def unit(self) -> tuple[int, int]:
        """What width and height are multiples of, in pixels."""
        return self.patch_size, self.patch_size

    def size(self, width: int, height: int, max_patches: int | None = None) -> tuple[int, int]:
        """Width and height in pixels, whatever the image has."""
        return self.width, self.height


class CanvasRule(SmartResize):
    """The rule of the first tower, in pixels of the canvas: the same grids and tokens."""

    def __init__(self, first: SmartResize, canvas: int) -> None:
        super().__init__(canvas, first.merge, first.min_patches, first.max_patches)
        object.__setattr__(self, "first", first)

    def size(self, width: int, height: int, max_patches: int | None = None) -> tuple[int, int]:
        first: SmartResize = self.first  # type: ignore[attr-defined]
        rows, columns = first.grid(width, height, max_patches)
        return columns * self.patch_size, rows * self.patch_size


class FusedImageProcessor(PackingImageProcessor):
    """The image processors of several towers. The grid is the first one's; a first one that crops stretches instead, so
    that all towers see the same."""

    def __init__(self, parts: Sequence[PackingImageProcessor], patches: Sequence[int]) -> None:
        first = parts[0]
        if first.do_center_crop:
            first = PackingImageProcessor.from_dict(
                {**first.to_dict(), "size": first.crop_size, "do_center_crop": False}
            )
        self.__dict__.update(copy.deepcopy(first.__dict__))
        self.parts, self.patches, self.canvas = (first, *parts[1:]), tuple(patches), max(patches)
        sides = {name: side // patches[0] * self.canvas for name, side in first.crop_size.items()}
        self.crop_size, self.size, self.do_center_crop = sides, type(first.size)(sides), False

    def to_dict(self) -> dict:
        parts = [part.to_dict() for part in self.parts]
        return {"image_processor_type": "FusedImageProcessor", "parts": parts, "patches": list(self.patches)}

    def output_size(self, width: int, height: int) -> tuple[int, int]:
        found = (side // self.patches[0] * self.canvas for side in self.parts[0].output_size(width, height))
        return next(found), next(found)

    def _one(self, image: Any, max_patches: int | None = None) -> np.ndarray:
        return on_canvas(self.parts[0]._one(image), image, self)

    def preprocess(self, images: Any, return_tensors: str | None = None, **overrides: Any) -> BatchFeature:
        """As :meth:`PackingImageProcessor.preprocess`, ``[3 * towers, H, W]`` for each image; takes no overrides."""
        _no_overrides(overrides)
        return self._batch(images, return_tensors)

    __call__ = preprocess


def on_canvas(first: np.ndarray, image: Any, processor: FusedImageProcessor) -> np.ndarray:
    """The canvas for an image of which the first tower's pixels ``[3, H, W]`` are made."""
    rows, columns = (side // processor.patches[0] for side in first.shape[1:])
    pixels = [first]
    for part, patch in zip(processor.parts[1:], processor.patches[1:], strict=True):
        fixed: Any = FixedSize(columns * patch, rows * patch, patch)
        own = NativeImageProcessor(part, fixed, NativeSettings(1, 1, "frames"))
        own.image_reading = processor.image_reading
        pixels.append(own._one(image))
    side = processor.canvas
    canvas = np.zeros((CHANNELS * len(pixels), rows * side, columns * side), first.dtype)
    for index, values in enumerate(pixels):
        canvas[index * CHANNELS : (index + 1) * CHANNELS, : values.shape[1], : values.shape[2]] = values
    return canvas


class FusedNativeImageProcessor(NativeImageProcessor):
    """:class:`FusedImageProcessor` at native resolution: an image has the grid that the rule gives the first tower."""

    def __init__(self, base: FusedImageProcessor, rule: SmartResize, settings: NativeSettings) -> None:
        super().__init__(base, CanvasRule(rule, base.canvas), settings)
        self.fused, self.first = base, NativeImageProcessor(base.parts[0], rule, settings)

    def placed(self, side: int | None) -> Any:
        """Raises ``ValueError`` for images with positions of their own: there is one grid for several towers."""
        if side is not None:
            raise ValueError("images with positions of their own cannot be used with several towers")
        return super().placed(None)

    def _one(self, image: Any, max_patches: int | None = None) -> np.ndarray:
        self.first.image_reading = self.fused.image_reading = self.image_reading
        return on_canvas(self.first._one(image, max_patches), image, self.fused)

    def preprocess(self, images: Any, return_tensors: str | None = None, **overrides: Any) -> BatchFeature:
        """As :meth:`NativeImageProcessor.preprocess`, ``[3 * towers, H, W]`` for each image; takes no overrides."""
        _no_overrides(overrides)
        return super().preprocess(images, return_tensors)

    __call__ = preprocess


def _no_overrides(overrides: dict) -> None:
    if overrides:
        raise ValueError(f"the image processor of several towers takes no {', '.join(sorted(overrides))} for one call")
