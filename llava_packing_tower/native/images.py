"""Photos and frames to pixels at their own size: the image processor of a tower at native resolution."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature

from ..image_processor import PackingImageProcessor
from .resolution import ResolutionRule
from .settings import NativeSettings


class NativeImageProcessor(PackingImageProcessor):
    """``base`` (its mean, deviation, filter and scale), but every image at the size that the rule gives it, uncropped.

    ``crop_size`` is one unit: LLaVA makes a blank image of this size for every sample without one.
    """

    def __init__(self, base: PackingImageProcessor, rule: ResolutionRule, settings: NativeSettings) -> None:
        self.__dict__.update(base.__dict__)
        self.base, self.rule, self.settings = base, rule, settings
        self.do_center_crop = False
        self.crop_size = {"height": rule.unit[0], "width": rule.unit[1]}
        self._limit: int | None = None
        self._lists_are_videos = False

    @contextlib.contextmanager
    def reading(self, video: bool) -> Iterator[None]:
        """In here a list of images is one video (a folder of frames), if ``video``."""
        before, self._lists_are_videos = self._lists_are_videos, video
        try:
            yield
        finally:
            self._lists_are_videos = before

    def to_dict(self) -> dict:
        """That of ``base``: the rule belongs to the model's config, where the settings are."""
        return self.base.to_dict()

    def _resized(self, image: Image.Image) -> Image.Image:
        target = self.rule.size(*image.size, max_patches=self._limit)
        return image.resize(target, resample=self.resample, reducing_gap=None) if target != image.size else image

    def preprocess(self, images, return_tensors: str | None = None, **overrides) -> BatchFeature:
        """As :meth:`PackingImageProcessor.preprocess`, at native resolution.

        An array ``[T, H, W, C]`` is a video, and a list inside :meth:`reading`: all its frames get one size, within the
        bound for the whole video.
        """
        if overrides:
            base = PackingImageProcessor.from_dict({**self.base.to_dict(), **overrides})
            return NativeImageProcessor(base, self.rule, self.settings).preprocess(images, return_tensors)
        video = isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4
        video = video or (self._lists_are_videos and isinstance(images, list) and len(images) > 0)
        self._limit = self.settings.frame_patches(len(images)) if video else None
        try:
            return super().preprocess(images, return_tensors)
        finally:
            self._limit = None

    __call__ = preprocess

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.base!r}, {self.rule!r})"
