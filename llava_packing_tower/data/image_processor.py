"""Photos to normalized pixel tensors: the image processor that LLaVA uses.

The same arithmetic as transformers' ``CLIPImageProcessor`` (PIL resize, center crop, rescale, normalize), but without
its differences between transformers versions and without torchvision. Reads and writes ``preprocessor_config.json``.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature

from ..utils.files import CONFIG_NAME, atomic_folder, read_json, write_json
from .images import ImageReading, to_rgb
from .pixel_scale import CLIP_MEAN, CLIP_STD, PixelScale

logger = logging.getLogger(__name__)

PROCESSOR_NAME = "preprocessor_config.json"
WHOLE_PROCESSOR_NAME = "processor_config.json"
"""Where transformers 5 writes the image processor of a model that has a tokenizer too, under ``image_processor``."""
LARGEST_SIDE, LARGEST_NUMBER, SMALLEST_STD = 8192, 1e6, 1e-6
NOT_SAVED = ("image_reading", "tower_patch_size")
LARGEST_ENLARGED = 1 << 24
"""Pixels of a resized image beyond which only the part that is kept is made; 16 times as long as wide at 1024."""
_raw: ContextVar[bool] = ContextVar("raw_pixels", default=False)


@contextlib.contextmanager
def raw_pixels() -> Iterator[None]:
    """Within it, and in this thread, processors return uint8 pixels; the tower normalizes them (:class:`PixelScale`).

    The workers of a data loader then have less to do, and send a quarter of the bytes.
    """
    token = _raw.set(True)
    try:
        yield
    finally:
        _raw.reset(token)


class Size(dict):
    """A size as transformers writes it. LLaVA asks any processor for ``size["shortest_edge"]``: so a stretching one,
    whose size is a height and a width, answers too."""

    def __missing__(self, key: str) -> int:
        if key == "shortest_edge":
            return min(self.values())
        raise KeyError(key)


def _as_size(size: int | dict, square: bool) -> dict[str, int]:
    """transformers' spellings of a size: an int, {"shortest_edge": n} or {"height": h, "width": w}."""
    given = size
    if isinstance(size, int):
        size = {"height": size, "width": size} if square else {"shortest_edge": size}
    size = {key: value for key, value in dict(size).items() if value is not None} if hasattr(size, "keys") else {}
    if set(size) not in ({"shortest_edge"}, {"height", "width"}) or not all(map(_is_side, size.values())):
        raise ValueError(
            f"{'crop_size' if square else 'size'}: a size is {{'shortest_edge': n}} or {{'height': h, 'width': w}} in "
            f"pixels up to {LARGEST_SIDE}, got {given!r:.80}"
        )
    return {"height": size["shortest_edge"], "width": size["shortest_edge"]} if square and len(size) == 1 else size


def _whole_patches(size: dict[str, int], patch_size: int) -> dict[str, int]:
    """The size rounded down to multiples of the patch, but at least one patch."""
    snapped = {key: max(value // patch_size, 1) * patch_size for key, value in size.items()}
    if snapped != size:
        logger.warning("image size %s is not a multiple of the patch size %d: using %s", size, patch_size, snapped)
    return snapped


def processor_content(folder: str | os.PathLike) -> dict | None:
    """The settings of a folder's image processor: its preprocessor_config.json, or the part for images of its
    processor_config.json; None if it has neither.

    Raises ``ValueError`` if the two differ.
    """
    own, whole = Path(folder) / PROCESSOR_NAME, Path(folder) / WHOLE_PROCESSOR_NAME
    content = read_json(own) if own.is_file() else None
    inner = read_json(whole).get("image_processor") if whole.is_file() else None
    if inner is None:
        return content
    if not isinstance(inner, dict):
        raise ValueError(f"{whole}: image_processor must be a JSON object, got {inner!r}")
    if content is not None:
        known = PackingImageProcessor.__init__.__code__.co_varnames
        differing = [key for key in (*known, "max_num_patches") if content.get(key) != inner.get(key)]
        if differing:
            raise ValueError(
                f"{folder} has two image processors, in {own.name} and {whole.name}, which differ in "
                f"{', '.join(differing)}: remove the one that is out of date"
            )
    return inner


def processor_file(folder: str | os.PathLike) -> Path:
    """Which file of a checkpoint folder says how its images are processed, for messages; a weight file is itself."""
    names = (PROCESSOR_NAME, WHOLE_PROCESSOR_NAME, CONFIG_NAME)
    return next((file for name in names if (file := Path(folder) / name).is_file()), Path(folder))


def _is_side(value: object) -> bool:
    return type(value) is int and 1 <= value <= LARGEST_SIDE


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < LARGEST_NUMBER


def _numbers(name: str, values: Any) -> list[float]:
    """Numbers, one per channel or one for all. Raises ``ValueError``."""
    found = list(values) if isinstance(values, (list, tuple, np.ndarray)) else [values]
    if not found or not all(map(_is_number, found)):
        raise ValueError(f"{name} must be numbers, one per channel, got {values!r:.80}")
    return found


class PackingImageProcessor:
    """Resize, crop, rescale and normalize photos.

    Args:
        size: pixels, ``{"shortest_edge": n}`` (aspect kept) or ``{"height": h, "width": w}`` (stretched).
        crop_size: ``{"height": h, "width": w}`` of the center crop; missing borders become 0.
        image_mean, image_std: per channel, for pixels scaled to 0..1.
        resample: PIL's number of the filter (3 is bicubic, 2 bilinear).
        patch_size: if given, every side that comes out is a multiple of it: a fixed size is rounded down (with a
            warning), and without a crop each image is resized to the nearest multiples, also if ``do_resize`` is off.
    """

    model_input_names: ClassVar[list[str]] = ["pixel_values"]

    def __init__(
        self,
        size: int | dict = 448,
        crop_size: int | dict | None = None,
        image_mean: Sequence[float] = CLIP_MEAN,
        image_std: Sequence[float] = CLIP_STD,
        resample: int = Image.Resampling.BICUBIC,
        do_resize: bool = True,
        do_center_crop: bool = True,
        do_rescale: bool = True,
        rescale_factor: float = 1 / 255,
        do_normalize: bool = True,
        do_convert_rgb: bool = True,
        patch_size: int | None = None,
    ) -> None:
        if patch_size is not None and not _is_side(patch_size):
            raise ValueError(
                f"patch_size must be a whole number of pixels up to {LARGEST_SIDE}, got {patch_size!r:.80}"
            )
        if (type(resample) is not int and not isinstance(resample, Image.Resampling)) or resample not in range(6):
            raise ValueError(f"resample must be the number of a filter of PIL, 0 to 5, got {resample!r:.80}")
        if not _is_number(rescale_factor) or rescale_factor <= 0:
            raise ValueError(f"rescale_factor must be a number above 0, got {rescale_factor!r:.80}")
        switches = {"do_resize": do_resize, "do_center_crop": do_center_crop, "do_rescale": do_rescale}
        switches |= {"do_normalize": do_normalize, "do_convert_rgb": do_convert_rgb}
        for name, value in switches.items():
            if not isinstance(value, bool):
                raise ValueError(f"{name} must be true or false, got {value!r:.80}")
        self.size = Size(_as_size(size, square=False))
        self.crop_size = _as_size(self.size if crop_size is None else crop_size, square=True)
        if patch_size is not None:
            self.patch_size = patch_size
            if "height" in self.size:
                self.size = Size(_whole_patches(self.size, patch_size))
            self.crop_size = _whole_patches(self.crop_size, patch_size)
        self.image_mean, self.image_std = _numbers("image_mean", image_mean), _numbers("image_std", image_std)
        if min(self.image_std) < SMALLEST_STD:
            raise ValueError(f"image_std must be at least {SMALLEST_STD}, got {image_std!r:.80}")
        if not {len(self.image_mean), len(self.image_std)} <= {1, 3}:
            raise ValueError(
                f"image_mean and image_std must be three numbers, or one for all channels: {image_mean!r:.80}, "
                f"{image_std!r:.80}"
            )
        self.resample = int(resample)
        self.do_resize, self.do_center_crop = do_resize, do_center_crop
        self.do_rescale, self.rescale_factor, self.do_normalize = do_rescale, rescale_factor, do_normalize
        self.do_convert_rgb = do_convert_rgb
        self.image_reading = ImageReading()
        """How images become RGB. Not in preprocessor_config.json: it belongs to a LLaVA checkpoint."""
        self.tower_patch_size: int | None = None
        """Side of a patch of the tower that has this processor. Not in the file either."""

    def read_images_as(self, reading: ImageReading) -> None:
        """Change how images become RGB."""
        self.image_reading = reading

    # ---------------------------------------------------------------- config files

    @classmethod
    def from_dict(cls, content: Mapping, where: object | None = PROCESSOR_NAME) -> PackingImageProcessor:
        """From a preprocessor_config.json; fields that this processor does not have are ignored, null ones default.

        Raises ``ValueError`` that begins with ``where`` (unless None) and names the field, for an impossible value.
        """
        known = cls.__init__.__code__.co_varnames[1 : cls.__init__.__code__.co_argcount]
        try:
            return cls(**{key: value for key, value in content.items() if key in known and value is not None})
        except ValueError as error:
            if where is None:
                raise
            raise ValueError(f"{where}: {error}") from error

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike) -> PackingImageProcessor:
        """The image processor of a folder. Raises ``ValueError`` if it has none, or two different ones."""
        content = processor_content(folder)
        if content is None:
            raise ValueError(f"{folder} has no {PROCESSOR_NAME} and no image_processor in a {WHOLE_PROCESSOR_NAME}")
        return cls.from_dict(content, Path(folder) / PROCESSOR_NAME)

    def to_dict(self) -> dict:
        fields = {name: value for name, value in self.__dict__.items() if name not in NOT_SAVED}
        return {"image_processor_type": "CLIPImageProcessor", **fields}

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write its preprocessor_config.json into a folder, complete or not at all."""
        with atomic_folder(folder) as aside:
            write_json(self.to_dict(), aside / PROCESSOR_NAME)

    # ---------------------------------------------------------------- pixels

    @property
    def pixel_scale(self) -> PixelScale:
        """What is left to do with the pixels that it gives inside :func:`raw_pixels`."""
        factor = self.rescale_factor if self.do_rescale else 1.0
        if not self.do_normalize:
            return PixelScale(factor)
        return PixelScale(factor, tuple(self.image_mean), tuple(self.image_std))

    def _target(self, width: int, height: int) -> tuple[int, int]:
        if "height" in self.size:
            return self.size["width"], self.size["height"]
        edge, short, long = self.size["shortest_edge"], min(width, height), max(width, height)
        other = int(edge * long / short)
        return (edge, other) if width <= height else (other, edge)

    def _resize_target(self, width: int, height: int) -> tuple[int, int]:
        target = self._target(width, height) if self.do_resize else (width, height)
        if (patch := getattr(self, "patch_size", None)) and not self.do_center_crop:
            return max(round(target[0] / patch), 1) * patch, max(round(target[1] / patch), 1) * patch
        return target

    def output_size(self, width: int, height: int) -> tuple[int, int]:
        """Width and height in pixels at which an image of this width and height comes out."""
        if self.do_center_crop:
            return self.crop_size["width"], self.crop_size["height"]
        return self._resize_target(width, height)

    def _resized(self, image: Image.Image, max_patches: int | None = None) -> Image.Image:
        target = self._resize_target(*image.size)
        if self.do_center_crop and target[0] * target[1] > LARGEST_ENLARGED:
            return self._resized_inside(image, target)
        return image.resize(target, resample=self.resample, reducing_gap=None) if target != image.size else image

    def _resized_inside(self, image: Image.Image, target: tuple[int, int]) -> Image.Image:
        """Only the part of the resized image that the crop keeps: a strip would be enlarged to gigabytes."""
        kept = [min(side, self.crop_size[name]) for side, name in zip(target, ("width", "height"))]
        starts = [(side - part) // 2 for side, part in zip(target, kept)]
        scales = [old / new for old, new in zip(image.size, target)]
        ends = (start + part for start, part in zip(starts, kept))
        box = [edge * scale for edges in (starts, ends) for edge, scale in zip(edges, scales)]
        return image.resize((kept[0], kept[1]), resample=self.resample, box=(box[0], box[1], box[2], box[3]))

    def _crop(self, pixels: np.ndarray) -> np.ndarray:
        """Center crop of ``[H, W, C]``; an image smaller than the crop is centered on zeros."""
        height, width = pixels.shape[:2]
        rows, columns = self.crop_size["height"], self.crop_size["width"]
        if height < rows or width < columns:
            canvas = np.zeros((max(height, rows), max(width, columns), pixels.shape[2]), pixels.dtype)
            top, left = -(-(canvas.shape[0] - height) // 2), -(-(canvas.shape[1] - width) // 2)
            canvas[top : top + height, left : left + width] = pixels
            pixels, (height, width) = canvas, canvas.shape[:2]
        top, left = (height - rows) // 2, (width - columns) // 2
        return pixels[top : top + rows, left : left + columns]

    def _one(self, image: Image.Image | np.ndarray | torch.Tensor, max_patches: int | None = None) -> np.ndarray:
        """One photo as float32 ``[C, H, W]``; ``max_patches``: a bound for a processor at native resolution."""
        if not isinstance(image, Image.Image):
            array = np.asarray(image)
            if array.ndim == 3 and array.shape[0] in (1, 3) and array.shape[2] not in (1, 3):
                array = array.transpose(1, 2, 0)
            if array.dtype != np.uint8:
                raise ValueError(f"arrays must be uint8 pixels (0..255), got {array.dtype} {list(array.shape)}")
            image = Image.fromarray(array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array)
        if self.do_convert_rgb:
            image = to_rgb(image, self.image_reading)
        image = self._resized(image, max_patches)
        pixels = np.asarray(image)
        pixels = pixels[..., None] if pixels.ndim == 2 else pixels
        if self.do_center_crop:
            pixels = self._crop(pixels)
        if _raw.get() and pixels.dtype == np.uint8:
            return np.ascontiguousarray(pixels.transpose(2, 0, 1))
        values = pixels.astype(np.float32)
        if self.do_rescale:
            values = values * np.float32(self.rescale_factor)
        if self.do_normalize:
            values = (values - np.asarray(self.image_mean, np.float32)) / np.asarray(self.image_std, np.float32)
        return np.ascontiguousarray(values.transpose(2, 0, 1))

    def preprocess(self, images: Any, return_tensors: str | None = None, **overrides: Any) -> BatchFeature:
        """Process photos.

        Args:
            images: a PIL image, a uint8 array ``[H, W, C]`` or ``[T, H, W, C]``, or a list of images.
            return_tensors: "pt" for torch, "np" for numpy, None for a list of numpy arrays.
            overrides: constructor arguments in place of this processor's own, for this call.

        Returns:
            ``BatchFeature`` with ``pixel_values``: float32 ``[B, C, H, W]``, or a list of ``[C, H, W]`` where the sizes
            differ; inside :func:`raw_pixels` uint8, not yet scaled.

        Raises:
            ValueError: arrays that are not uint8, an unknown ``return_tensors``.
        """
        if return_tensors not in (None, "pt", "np"):
            raise ValueError(f"return_tensors must be 'pt', 'np' or None, got {return_tensors!r}")
        if overrides:
            other = type(self).from_dict({**self.to_dict(), **overrides})
            other.image_reading = self.image_reading
            return other.preprocess(images, return_tensors)
        return self._batch(images, return_tensors)

    def _batch(self, images: Any, return_tensors: str | None, max_patches: int | None = None) -> BatchFeature:
        if isinstance(images, Image.Image) or (isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim <= 3):
            images = [images]
        arrays = [self._one(image, max_patches) for image in images]
        same = len({array.shape for array in arrays}) == 1
        if return_tensors == "pt":
            values: Any = torch.from_numpy(np.stack(arrays)) if same else [torch.from_numpy(array) for array in arrays]
        else:
            values = np.stack(arrays) if same and return_tensors == "np" else arrays
        return BatchFeature({"pixel_values": values})

    __call__ = preprocess

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self.__dict__.items())})"
