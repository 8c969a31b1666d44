"""Photos and frames to pixels at their own size: the image processor of a tower at native resolution."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature

from .image_processor import PackingImageProcessor
from .images import ImageReading, check_header
from .native_config import NativeSettings
from .smart_resize import SmartResize

_lists_are_videos: ContextVar[bool] = ContextVar("lists_are_videos", default=False)
_side: ContextVar[int | None] = ContextVar("side", default=None)
KEPT = 0
"""In place of a side: images keep the size that they have."""


class NativeImageProcessor(PackingImageProcessor):
    """``base`` (its mean, deviation, filter and scale), but every image at the size that the rule gives it, uncropped.

    ``frames_per_patch``: of the tower, where a video is a clip. ``crop_size`` is one unit: LLaVA makes a blank image of
    this size for every sample without one.
    """

    def __init__(
        self, base: PackingImageProcessor, rule: SmartResize, settings: NativeSettings, frames_per_patch: int = 1
    ) -> None:
        self.__dict__.update(base.__dict__)
        self.base, self.rule, self.settings, self.frames_per_patch = base, rule, settings, frames_per_patch
        self.do_center_crop = False
        self.crop_size = {"height": rule.unit[0], "width": rule.unit[1]}

    @contextlib.contextmanager
    def reading(self, video: bool) -> Iterator[None]:
        """Within it, and in this thread, a list of images is one video (a folder of frames), if ``video``."""
        token = _lists_are_videos.set(video)
        try:
            yield
        finally:
            _lists_are_videos.reset(token)

    def read_images_as(self, reading: ImageReading) -> None:
        """How image files are opened from now on."""
        self.image_reading = self.base.image_reading = reading

    @contextlib.contextmanager
    def placed(self, side: int | None) -> Iterator[None]:
        """Within it, and in this thread, square images get ``side`` patches along a side, whatever the bounds are: each
        patch has its own position. ``KEPT`` for images that are made of patches, None for images without positions.

        Raises ``ValueError`` for a side that the projector cannot merge.
        """
        if side and any(side * self.rule.patch_size % unit for unit in self.rule.unit):
            raise ValueError(
                f"positions of {side} x {side} patches, which a projector that merges "
                f"{' x '.join(map(str, self.rule.merge))} cannot take"
            )
        token = _side.set(None if side is None else side * self.rule.patch_size)
        try:
            yield
        finally:
            _side.reset(token)

    def to_dict(self) -> dict:
        """That of ``base``: the rule belongs to the model's config, where the settings are."""
        return self.base.to_dict()

    def _resized(self, image: Image.Image, max_patches: int | None = None) -> Image.Image:
        check_header(image.size, self.image_reading, native=True)
        side = _side.get()
        if side == KEPT:
            return image
        if side is not None and image.width == image.height:
            target = (side, side)
        else:
            target = self.rule.size(*image.size, max_patches=max_patches)
        return image.resize(target, resample=self.resample, reducing_gap=None) if target != image.size else image

    def preprocess(self, images: Any, return_tensors: str | None = None, **overrides: Any) -> BatchFeature:
        """As :meth:`PackingImageProcessor.preprocess`, at native resolution.

        An array ``[T, H, W, C]`` is a video, and a list inside :meth:`reading`: all its frames get one size, within the
        bound for the whole video.
        """
        if overrides:
            base = PackingImageProcessor.from_dict({**self.base.to_dict(), **overrides})
            base.image_reading = self.image_reading
            return NativeImageProcessor(base, self.rule, self.settings, self.frames_per_patch).preprocess(
                images, return_tensors
            )
        video = isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4
        video = video or (_lists_are_videos.get() and isinstance(images, list) and len(images) > 0)
        limit = self.settings.frame_patches(len(images)) if video else None
        return self._batch(images, return_tensors, limit)

    __call__ = preprocess

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.base!r}, {self.rule!r})"
