"""Photos and frames to the patch rows that the packed tower reads: the image processor of an exported checkpoint."""

from __future__ import annotations

import base64
import io
import math
import os
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname, urlopen

import numpy as np
import torch
from PIL import Image
from transformers import AutoImageProcessor, BatchFeature
from transformers.image_processing_utils import BaseImageProcessor

from ..data.image_processor import PackingImageProcessor
from ..data.images import KEYS as READING_KEYS
from ..data.images import PREFIX, ImageReading, open_image, reading_of, to_rgb
from ..data.native_image_processor import NativeImageProcessor
from ..data.patches import PatchLayout, batch_images_to_packing_input
from ..data.positions import interpolate_frame_indices
from ..data.video import Clip, read_clip
from .configuration import LlavaPackingConfig
from .visual_settings import FIELDS, Size, VisualSettings

MAX_FRAMES = 32
"""Frames that are read of a video file, evenly spaced, unless the caller says otherwise."""
DOWNLOAD_SECONDS = 60
TOWER = ("tower_patch_size", "tower_image_size", "patch_layout", "tower_frames_per_patch", "tower_stretches_clips")
MAX_NAME = 255
"""The longest name of a file; no image is as short as that in base64."""
ImageLike = Image.Image | np.ndarray | torch.Tensor | str | os.PathLike


class LlavaPackingImageProcessor(BaseImageProcessor):
    """What LLaVA's ``process_images`` does with an image, and the rows of patches that follow from it.

    Args:
        tower_patch_size, tower_image_size: of the tower, in pixels.
        patch_layout: "channel_first" or "channel_last": the order of the numbers in a row.
        tower_frames_per_patch, tower_stretches_clips: of the tower (see :class:`..models.base.PackedVisionModel`).
        fields: those of :class:`..data.image_processor.PackingImageProcessor` (``size``, ``crop_size``, ``image_mean``
            ...), of :data:`.visual_settings.FIELDS` and of :class:`..data.images.ImageReading`.
    """

    model_input_names = ["pixel_values", "image_grid_thw", "image_sizes"]  # noqa: RUF012 (as in transformers)

    def __init__(
        self,
        tower_patch_size: int = 14,
        tower_image_size: int = 448,
        patch_layout: str = "channel_first",
        tower_frames_per_patch: int = 1,
        tower_stretches_clips: bool = True,
        **fields: Any,
    ) -> None:
        super().__init__()
        self.tower_patch_size, self.tower_image_size = tower_patch_size, tower_image_size
        self.patch_layout, self.tower_frames_per_patch = patch_layout, tower_frames_per_patch
        self.tower_stretches_clips = tower_stretches_clips
        for name, default in FIELDS.items():
            setattr(self, name, default if fields.get(name) is None else fields[name])
        reading = reading_of(_Fields(fields), is_checkpoint=False)
        for name, value in reading.items().items():
            setattr(self, name, value)
        base = PackingImageProcessor.from_dict({**fields, "patch_size": tower_patch_size})
        for name, value in base.to_dict().items():
            if name not in ("image_processor_type", "patch_size"):
                setattr(self, name, value)

    def to_dict(self) -> dict[str, Any]:
        names = (*TOWER, *FIELDS, *(PREFIX + k for k in READING_KEYS))
        base = {name: value for name, value in self._base().to_dict().items() if name != "patch_size"}
        content = {**base, **{name: getattr(self, name) for name in names}}
        return {**content, "size": dict(self.size), "image_processor_type": type(self).__name__}

    # ---------------------------------------------------------------- settings

    @property
    def settings(self) -> VisualSettings:
        return VisualSettings.read(self, self.tower_patch_size, self.tower_image_size)

    @property
    def reading(self) -> ImageReading:
        return reading_of(self, is_checkpoint=False)

    def _base(self) -> PackingImageProcessor:
        base = PackingImageProcessor.from_dict({**vars(self), "patch_size": self.tower_patch_size})
        base.image_reading = self.reading
        return base

    def _native(self) -> NativeImageProcessor:
        settings = self.settings
        return NativeImageProcessor(self._base(), settings.rule, settings.native)

    # ---------------------------------------------------------------- images

    def fetch(self, image: ImageLike) -> Image.Image:
        """An image as 8-bit RGB: of a PIL image, a uint8 array, a path, a ``data:``, ``file:`` or ``http`` address.

        Raises ``ValueError`` for what cannot be read.
        """
        if isinstance(image, (str, os.PathLike)):
            return open_image(_content(os.fspath(image)), self.reading)
        return to_rgb(image if isinstance(image, Image.Image) else _from_array(image), self.reading)

    def tiles(self, image: Image.Image, alone: bool) -> list[np.ndarray]:
        """The float32 ``[C, H, W]`` tiles of an RGB image: one, or with ``anyres`` the whole image and its parts.

        alone: whether the sample has no other image; LLaVA cuts no tiles where there are several, but pads them.
        """
        settings = self.settings
        if settings.is_native:
            return [np.asarray(self._native().preprocess(image)["pixel_values"][0])]
        base = self._base()
        if not alone or settings.image_aspect_ratio == "pad":
            pieces = [padded(image, tuple(int(x * 255) for x in base.image_mean))]
        elif settings.is_anyres:
            edge, side = base.size["shortest_edge"], base.crop_size["height"]
            canvas = fitted(image, settings.best_resolution(image.size, side))
            corners = [(x, y) for y in range(0, canvas.height, side) for x in range(0, canvas.width, side)]
            pieces = [image.resize((edge, edge)), *(canvas.crop((x, y, x + side, y + side)) for x, y in corners)]
        else:
            pieces = [image]
        return [np.asarray(base.preprocess(piece)["pixel_values"][0]) for piece in pieces]

    def preprocess(
        self,
        images: ImageLike | Sequence[ImageLike],
        alone: bool | Sequence[bool] = True,
        return_tensors: str | None = None,
        **options: Any,
    ) -> BatchFeature:
        """Rows of images.

        Args:
            images: see :meth:`fetch`.
            alone: for all or each of them, see :meth:`tiles`.

        Returns:
            ``pixel_values [N, channels * patch ** 2]``, the rows of all images; ``image_grid_thw [images, 3]`` (tiles,
            rows and columns of patches); with ``anyres`` also ``image_sizes``, a list of ``[2]`` (width, height) as
            opened. Always torch tensors: the model takes no others.

        Raises:
            ValueError: images that cannot be read, or that do not fit the settings.
            TypeError: options that this processor does not have.
        """
        if options:
            raise TypeError(f"{type(self).__name__} got unexpected arguments {', '.join(sorted(options))}")
        images = list(images) if isinstance(images, (list, tuple)) else [images]
        flags = [alone] * len(images) if isinstance(alone, bool) else list(alone)
        opened = [self.fetch(image) for image in images]
        tiles = [self.tiles(image, flag) for image, flag in zip(opened, flags, strict=True)]
        content: dict[str, Any] = dict(zip(("pixel_values", "image_grid_thw"), self._rows(tiles)))
        if self.settings.is_anyres:
            content["image_sizes"] = [torch.tensor(image.size) for image in opened]
        return BatchFeature(content)

    __call__ = preprocess

    @property
    def _has_clips(self) -> bool:
        """Whether the frames of a video see each other."""
        return self.settings.native is not None and self.settings.native.video == "clip"

    def _rows(self, samples: Sequence[Sequence[np.ndarray]], clips: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows and grids of samples of several tiles or frames of one size each; ``clips``: each is a clip."""
        layout, frames_per_patch = PatchLayout[self.patch_layout.upper()], self.tower_frames_per_patch
        if clips and frames_per_patch > 1:
            made = [torch.from_numpy(np.stack(list(frames), axis=1)) for frames in samples]
            return batch_images_to_packing_input(made, self.tower_patch_size, layout, frames_per_patch=frames_per_patch)
        flat = [torch.from_numpy(tile) for tiles in samples for tile in tiles]
        rows, grids = batch_images_to_packing_input(
            flat, self.tower_patch_size, layout, frames_per_patch=frames_per_patch
        )
        starts = np.cumsum([0, *(len(tiles) for tiles in samples)])[:-1]
        grids = grids[starts.tolist()].clone()
        grids[:, 0] = torch.tensor([len(tiles) for tiles in samples])
        return rows, grids

    def image_grid(self, size: Size, alone: bool = True) -> tuple[int, int, int]:
        """(tiles, rows, columns of patches) of an image of this size, without looking at it."""
        settings, patch = self.settings, self.tower_patch_size
        if settings.is_native:
            return (1, *settings.rule.grid(*size))
        tiles = 1 + math.prod(settings.tile_grid(size)) if settings.is_anyres and alone else 1
        width, height = self._base().output_size(*size)
        return tiles, height // patch, width // patch

    # ---------------------------------------------------------------- videos

    def clip(self, video: object, num_frames: int | None = None, metadata: object = None) -> Clip:
        """The frames of a video: of a file (``num_frames`` evenly spaced ones, by default :data:`MAX_FRAMES`), or
        those given, as a list of images or an array ``[T, H, W, 3]``.

        metadata: where given frames lie in their video: ``frames_indices`` and ``total_num_frames``.
        """
        if not self.mm_reads_videos:
            raise ValueError("this model takes no videos: it was trained with LLaVA 1.x, without native resolution")
        if isinstance(video, (str, os.PathLike)):
            return read_clip(_local(video), upbound=num_frames or MAX_FRAMES, force=True)
        if isinstance(video, tuple) and len(video) == 2 and not isinstance(video[0], Image.Image):
            video, metadata = video
        frames = [np.asarray(self.fetch(frame)) for frame in video]
        if not frames:
            raise ValueError("a video without frames")
        if len({frame.shape for frame in frames}) != 1:
            raise ValueError(f"all frames of a video must have one size, got {sorted({f.shape for f in frames})}")
        indices = _field(metadata, "frames_indices")
        total = _field(metadata, "total_num_frames")
        indices = list(range(len(frames))) if indices is None else [int(index) for index in indices]
        return Clip(np.stack(frames), indices, len(frames) if total is None else int(total), 1.0)

    def preprocess_videos(
        self, videos: Sequence[object], num_frames: int | None = None, metadata: Sequence[object] | None = None
    ) -> BatchFeature:
        """Rows of videos: ``pixel_values_videos``, ``video_grid_thw`` (frames, rows, columns; of clips in a tower whose
        patches cover several frames, temporal patches), and where the frames of a clip see each other
        ``video_frame_positions``, a list of ``[frames]``."""
        given = metadata or [None] * len(videos)
        clips = [self.clip(video, num_frames, more) for video, more in zip(videos, given, strict=True)]
        processor = self._native() if self.settings.is_native else self._base()
        samples = [[np.asarray(f) for f in processor.preprocess(clip.frames)["pixel_values"]] for clip in clips]
        content: dict[str, Any] = dict(
            zip(("pixel_values_videos", "video_grid_thw"), self._rows(samples, self._has_clips))
        )
        if self._has_clips:
            content["video_frame_positions"] = [self._places(clip) for clip in clips]
        return BatchFeature(content)

    def _places(self, clip: Clip) -> torch.Tensor:
        """Where the frames of a clip stand in time, ``[frames]``."""
        indices = torch.tensor([clip.indices])
        if self.tower_stretches_clips:
            indices = interpolate_frame_indices(indices, torch.tensor([clip.total]))
        return indices[0]

    def video_grid(self, frames: int, size: Size) -> tuple[int, int, int]:
        """(frames or temporal patches, rows, columns of patches) of a video, without looking at it."""
        settings = self.settings
        if settings.is_native:
            count = -(-frames // self.tower_frames_per_patch) if self._has_clips else frames
            return (count, *settings.rule.grid(*size, max_patches=settings.native.frame_patches(frames)))
        width, height = self._base().output_size(*size)
        return frames, height // self.tower_patch_size, width // self.tower_patch_size


class _Fields:
    """A mapping by its attributes."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.__dict__.update(values)


def _local(address: str | os.PathLike) -> str:
    """The path that a ``file:`` address stands for; of any other text itself."""
    text = os.fspath(address)
    return url2pathname(urlsplit(text).path) if text.startswith("file://") else text


def _content(address: str) -> str | io.BytesIO:
    """The path of an image, or what is behind its address. Raises ``ValueError`` where nothing is."""
    shown = f"{address[:60]}..." if len(address) > 60 else address
    try:
        if address.startswith("data:"):
            return io.BytesIO(base64.b64decode(address.partition(",")[2], validate=True))
        if address.startswith(("http://", "https://")):
            with urlopen(address, timeout=DOWNLOAD_SECONDS) as answer:
                return io.BytesIO(answer.read())
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read the image {shown}: {error}") from error
    path = _local(address)
    return path if os.path.exists(path) else _decoded(path) or path


def _decoded(text: str) -> io.BytesIO | None:
    """The image in a text that is no path but base64, as in ``{"type": "image", "base64": ...}``; None for others."""
    try:
        return io.BytesIO(base64.b64decode(text, validate=True)) if len(text) > MAX_NAME else None
    except ValueError:
        return None


def _field(metadata: object, name: str) -> Any:
    return metadata.get(name) if isinstance(metadata, dict) else getattr(metadata, name, None)


def _from_array(image: np.ndarray | torch.Tensor) -> Image.Image:
    array = np.asarray(image)
    array = array[..., None] if array.ndim == 2 else array
    if array.dtype != np.uint8 or array.ndim != 3:
        given = f"{array.dtype} {list(np.shape(image))}"
        raise ValueError(f"images are PIL images or uint8 arrays [H, W] or [H, W, C], got {given}")
    if array.shape[2] not in (1, 3) and array.shape[0] in (1, 3):
        array = array.transpose(1, 2, 0)
    return Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)


def padded(image: Image.Image, color: tuple[int, ...]) -> Image.Image:
    """The image in the middle of a square of this color (LLaVA's ``pad``)."""
    side = max(image.size)
    if image.width == image.height:
        return image
    canvas = Image.new(image.mode, (side, side), color)
    canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return canvas


def fitted(image: Image.Image, size: Size) -> Image.Image:
    """The image as large as it fits into this size, in the middle of black (LLaVA's ``anyres``)."""
    across, down = size[0] / image.width, size[1] / image.height
    if across < down:
        target = size[0], min(math.ceil(image.height * across), size[1])
    else:
        target = min(math.ceil(image.width * down), size[0]), size[1]
    canvas = Image.new("RGB", size, (0, 0, 0))
    canvas.paste(image.resize(target), ((size[0] - target[0]) // 2, (size[1] - target[1]) // 2))
    return canvas


AutoImageProcessor.register(LlavaPackingConfig, slow_image_processor_class=LlavaPackingImageProcessor, exist_ok=True)
