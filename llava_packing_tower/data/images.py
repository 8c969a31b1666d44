"""From an image file to pixels, for training, evaluation, conversion and probing alike. No torch here.

The pixels of an image do not depend on who opens it: orientation (EXIF), palettes, transparency, CMYK, gray values of
16 and 32 bits and floating point values all become 8-bit RGB as :func:`to_rgb` says, or are refused by name.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import math
import os
import stat
import time
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
from PIL import ExifTags, Image, ImageColor, ImageFile, ImageOps, TiffImagePlugin

from .jpeg_length import check_jpeg_end, check_jpeg_length
from .png_chunks import check_pixel_data, has_late_exif

logger = logging.getLogger(__name__)

T = TypeVar("T")
Box = tuple[int, int, int, int]

PREFIX = "mm_packing_"
MAX_PIXELS, MAX_ASPECT = 178_000_000, 200
REDUCED_SIDE = 4096
STRIP = 16
"""Longest side over the shortest of an image beyond which a host that pads or crops would make it many times larger."""
NATIVE, SQUARE, MIDDLE = "native", "square", "middle"
"""What becomes of an image: it keeps its shape, is padded to a square, or its middle is cut out once it is enlarged."""
_FITS = {"native": NATIVE, "pad": SQUARE, "highres": SQUARE, "crop_split": MIDDLE}
TRIES, PAUSE = 3, 1.0
"""How often a file is read where its disk fails, and the seconds in between."""
DISK_ERRORS = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.ECONNRESET)
EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""Errors of this process, not of a file."""
BACKGROUND = "white"
DROP_ALPHA = "none"
"""The background that leaves the colors under transparent pixels as they are, as LLaVA itself does."""
_PNG_EXIF = ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp")
_WIDE_GRAY = ("I;16", "I;16B", "I;16L", "I;16N", "I", "F")
_BAND_PIXELS = 1 << 20
"""Images above this are converted band by band: whole copies of an image near ``max_pixels`` are 0.7 GB each."""


class UnreadableImage(ValueError):
    """An image or video that cannot be read, or must not be; the message names it, and ``file`` is its path."""

    def __init__(self, message: str, file: object = None) -> None:
        super().__init__(message)
        self.file = None if file is None else str(file)


@dataclass(frozen=True)
class ImageReading:
    """How images are read; in a checkpoint's config under ``mm_packing_<name>``.

    exif: apply the EXIF orientation. background: the color behind transparent pixels, by a name or as #rrggbb;
    "none" drops the transparency. max_pixels: width x height of the largest image that is decoded. max_aspect: the
    longest side over the shortest, at native resolution.
    """

    exif: bool = True
    background: str = BACKGROUND
    max_pixels: int = MAX_PIXELS
    max_aspect: int = MAX_ASPECT

    def __post_init__(self) -> None:
        for name, kind in (("exif", bool), ("background", str), ("max_pixels", int), ("max_aspect", int)):
            if type(value := getattr(self, name)) is not kind:
                raise ValueError(f"{PREFIX}{name} must be of type {kind.__name__}, got {value!r:.80}")
        if self.background != DROP_ALPHA:
            try:
                ImageColor.getrgb(self.background)
            except ValueError as error:
                raise ValueError(f"{PREFIX}background: {error}; write a name, #rrggbb or {DROP_ALPHA!r}") from error
        for name in ("max_pixels", "max_aspect"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{PREFIX}{name} must be at least 1, got {value}")
        if Image.MAX_IMAGE_PIXELS is not None and self.max_pixels > 2 * Image.MAX_IMAGE_PIXELS:
            raise ValueError(
                f"{PREFIX}max_pixels is {self.max_pixels}, and Pillow decodes at most {2 * Image.MAX_IMAGE_PIXELS}: "
                "raise PIL.Image.MAX_IMAGE_PIXELS to half of it first"
            )

    def items(self) -> dict[str, object]:
        """The values under their names in a checkpoint's config."""
        return {PREFIX + name: getattr(self, name) for name in KEYS}


KEYS = ("exif", "background", "max_pixels", "max_aspect")
AS_BEFORE = ImageReading(exif=False, background=DROP_ALPHA)
"""For checkpoints that were trained before these keys existed."""


def reading_of(args: object, is_checkpoint: bool) -> ImageReading:
    """The keys in LLaVA's arguments or config; what they leave out is the default of a new run or of a checkpoint.

    Raises ``ValueError`` for a value that cannot be carried out.
    """
    return with_keys(AS_BEFORE if is_checkpoint else ImageReading(), args)


def with_keys(reading: ImageReading, args: object) -> ImageReading:
    """``reading`` with the keys that LLaVA's arguments or config have. Raises ``ValueError`` as :func:`reading_of`."""
    given = {name: getattr(args, PREFIX + name, None) for name in KEYS}
    return replace(reading, **{name: value for name, value in given.items() if value is not None})


# ---------------------------------------------------------------- pixels


def to_rgb(image: Image.Image, reading: ImageReading = ImageReading()) -> Image.Image:  # noqa: B008 (it is frozen)
    """An image as 8-bit RGB.

    16-bit gray is divided by 257, 32-bit whole numbers too unless one is above 65535 (then the range is that of int32),
    floating point values are taken from 0..1, or from 0..255 where one is above 1. Of an animation, the first
    frame is taken.

    Raises ``ValueError`` for values outside of these ranges, and for more pixels than ``max_pixels``.
    """
    check_header(image.size, reading, native=False)
    # The layers of a PSD count from 1, and what is loaded are all of them together.
    if getattr(image, "n_frames", 1) > 1 and image.tell() != 0 and image.format != "PSD":
        image.seek(0)
    image.load()
    is_inverted = getattr(image, "tag_v2", {}).get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0
    if reading.exif and _orientation(image) in range(2, 9):  # (else Pillow makes a copy)
        image = ImageOps.exif_transpose(image)
    if image.mode in _WIDE_GRAY:
        scale = _gray_scale(image)
        return _in_bands(image, lambda band: _flat(_gray(band, scale, is_inverted), reading))
    has_alpha = "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info
    if has_alpha and reading.background != DROP_ALPHA:
        return _in_bands(image, lambda band: _flat(band, reading))
    return image if image.mode == "RGB" else image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    return image.getexif().get(ExifTags.Base.Orientation, 1)


def _bands(image: Image.Image) -> Iterator[tuple[Box, Image.Image]]:
    rows = max(1, _BAND_PIXELS // image.width)
    for top in range(0, image.height, rows):
        box = (0, top, image.width, min(top + rows, image.height))
        yield box, image.crop(box)


def _in_bands(image: Image.Image, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """The RGB image that ``convert`` makes of an image, rows of it at a time."""
    if image.width * image.height <= _BAND_PIXELS:
        return convert(image)
    result = Image.new("RGB", image.size)
    for box, band in _bands(image):
        result.paste(convert(band), box)
    return result


def _flat(image: Image.Image, reading: ImageReading) -> Image.Image:
    """An image as RGB, on the background where it is transparent."""
    if reading.background == DROP_ALPHA or (image.mode == "L" and "transparency" not in image.info):
        return image.convert("RGB")
    image = image.convert("RGBA")
    canvas = Image.new("RGBA", image.size, ImageColor.getrgb(reading.background))
    return Image.alpha_composite(canvas, image).convert("RGB")


def _gray_scale(image: Image.Image) -> float:
    """What the values of a gray image are multiplied with to end at 255. Raises ``ValueError`` as :func:`to_rgb`."""
    ends = np.array([[values.min(), values.max()] for _, band in _bands(image) for values in [np.asarray(band)]], float)
    low, high = float(ends[:, 0].min()), float(ends[:, 1].max())
    if not np.isfinite([low, high]).all() or low < 0:
        raise ValueError(f"its values reach from {low} to {high}, but gray values must begin at 0")
    if image.mode != "F":
        return 1 / 257 if high <= 65535 else 255 / (2**31 - 1)
    if high > 255:
        raise ValueError(f"its values reach {high}: floating point gray values must end at 1 or at 255")
    return 255 if high <= 1 else 1


def _gray(image: Image.Image, scale: float, is_inverted: bool) -> Image.Image:
    """8-bit gray, with alpha where one of the values is transparent; ``is_inverted``: 0 is white (Pillow leaves it)."""
    values = np.asarray(image)
    scaled = np.rint(values.astype(np.float64) * scale).astype(np.uint8)
    gray = Image.fromarray(255 - scaled if is_inverted else scaled)
    if (clear := image.info.get("transparency")) is not None:
        gray.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return gray


# ---------------------------------------------------------------- files


def check_file(file: str | os.PathLike) -> None:
    """Raises :class:`UnreadableImage` for anything but a regular file: a pipe would block, a device never ends."""
    try:
        mode = os.stat(file).st_mode
    except OSError as error:
        raise UnreadableImage(f"{file}: {error.strerror}", file) from error
    except ValueError as error:  # a null byte
        raise UnreadableImage(f"{file!r}: {error}", file) from error
    if not stat.S_ISREG(mode):
        raise UnreadableImage(f"{file} is not a regular file", file)


def read_size(file: str | os.PathLike, exif: bool = False) -> tuple[int, int]:
    """Width and height from the header of an image file; with ``exif`` as they are once it is turned.

    Raises :class:`UnreadableImage` that names it.
    """
    check_file(file)
    with _refusals(file), _opened(file) as image:
        # Pillow turns a TIFF by itself, and decodes a PNG without EXIF in front of its pixels to look behind them.
        asks = exif and image.format != "TIFF"
        if asks and image.format == "PNG":
            asks = any(key in image.info for key in _PNG_EXIF) or has_late_exif(file)
        turned = asks and _orientation(image) in range(5, 9)
        return image.size[::-1] if turned else image.size


@contextlib.contextmanager
def _refusals(name: object) -> Iterator[None]:
    """Whatever Pillow raises in here, as :class:`UnreadableImage`; errors of this process stay what they are."""
    try:
        yield
    except Exception as error:
        if isinstance(error, MemoryError) or getattr(error, "errno", None) in EXHAUSTED:
            raise
        reason = str(error) if type(error) in (ValueError, OSError) else f"{type(error).__name__}: {error}"
        raise UnreadableImage(f"{name} cannot be read as an image: {reason}", name) from error


@contextlib.contextmanager
def _opened(file: str | os.PathLike | BinaryIO) -> Iterator[Image.Image]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # max_pixels is checked here
        with Image.open(file) as image:
            yield image


def retried(read: Callable[[], T]) -> T:
    """The result of ``read()``, tried again where the disk fails: a network disk may be away for a moment.

    Raises the ``OSError`` of the last try, and any other at once.
    """
    for left in reversed(range(TRIES)):
        try:
            return read()
        except OSError as error:
            if error.errno not in DISK_ERRORS or left == 0:
                raise
            time.sleep(PAUSE)
    raise AssertionError


def open_image(
    file: str | os.PathLike | BinaryIO,
    reading: ImageReading = ImageReading(),  # noqa: B008 (it is frozen)
    fit: str | None = None,
) -> Image.Image:
    """Read an image as 8-bit RGB.

    Args:
        file: a path, or a stream.
        reading: see :class:`ImageReading`. The number of pixels is looked up in the header, before decoding.
        fit: NATIVE (one that is longer than ``max_aspect`` allows is refused), SQUARE, MIDDLE (see :func:`fitted`) or
            None for what bounds its pixels itself.

    Raises:
        UnreadableImage: for a file that is missing, not regular, no image, too large, truncated or damaged, whatever
            Pillow raises for it.
    """
    name = file if isinstance(file, str | os.PathLike) else getattr(file, "name", "the image")
    if isinstance(file, str | os.PathLike):
        check_file(file)
    # LLaVA's train.py has Pillow fill what a truncated file lacks with gray.
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    with _refusals(name):
        return fitted(retried(lambda: _decode(file, reading, fit == NATIVE, str(name))), reading, fit)


def _decode(file: str | os.PathLike | BinaryIO, reading: ImageReading, native: bool, name: str) -> Image.Image:
    with _opened(file) as image:
        check_header(image.size, reading, native)
        if getattr(image, "n_frames", 1) > 1:
            _say_first_frame(name)
        is_jpeg = image.format in ("JPEG", "MPO")
        if is_jpeg:
            check_jpeg_length(image, file)
        image.load()
        if is_jpeg:
            check_jpeg_end(image, file)
        elif image.format == "PNG":
            check_pixel_data(image, file)
        return to_rgb(image, reading)


def check_header(size: tuple[int, int], reading: ImageReading, native: bool) -> None:
    """Raises ``ValueError`` for a (width, height) above ``max_pixels`` or, if it keeps its shape, ``max_aspect``."""
    width, height = size
    if min(size) < 1:
        raise ValueError(f"it has {width} x {height} pixels")
    if width * height > reading.max_pixels:
        raise ValueError(f"it has {width} x {height} pixels, more than mm_packing_max_pixels {reading.max_pixels}")
    if native and max(size) > reading.max_aspect * min(size):
        raise ValueError(
            f"an image of {width} x {height} pixels is longer than mm_packing_max_aspect {reading.max_aspect} times "
            f"its width"
        )


def fit_of(aspect_ratio: str | None) -> str | None:
    """What becomes of an image at an ``image_aspect_ratio`` of LLaVA, for :func:`open_image`."""
    return _FITS.get(aspect_ratio or "")


def fitted(picture: Image.Image, reading: ImageReading, fit: str | None) -> Image.Image:
    """An image that a host can pad (SQUARE) or enlarge and crop (MIDDLE) without many times the image's memory.

    A strip, longer than STRIP times its width, is reduced to REDUCED_SIDE before it is padded, as is an image whose
    square would have more than ``max_pixels``; of a strip that is cropped the middle is kept. Other images are
    returned as they are.
    """
    shortest, longest = sorted(picture.size)
    is_strip = longest > STRIP * shortest
    if fit == MIDDLE and is_strip:
        width, height = (min(side, STRIP * shortest) for side in picture.size)
        left, top = (picture.width - width) // 2, (picture.height - height) // 2
        return picture.crop((left, top, left + width, top + height))
    side = min(REDUCED_SIDE, math.isqrt(reading.max_pixels))
    if fit == SQUARE and longest > side and (is_strip or longest**2 > reading.max_pixels):
        width, height = (max(1, length * side // longest) for length in picture.size)
        return picture.resize((width, height))
    return picture


@functools.lru_cache(maxsize=1)
def _say_once() -> None:
    logger.warning("of an animated image the first frame is read")


def _say_first_frame(name: str) -> None:
    logger.debug("%s is animated: its first frame is read", name)
    _say_once()


# ---------------------------------------------------------------- for code that opens images itself


_current: ContextVar[tuple[ImageReading, str | None] | None] = ContextVar("image_reading", default=None)


@contextlib.contextmanager
def reading_as(reading: ImageReading | None, fit: str | None = None) -> Iterator[None]:
    """Within it, and in this thread, :class:`HostImage` opens images as :func:`open_image` does with these arguments.

    With None it opens them as Pillow does.
    """
    token = _current.set(None if reading is None else (reading, fit))
    try:
        yield
    finally:
        _current.reset(token)


class HostImage:
    """Stands in for the module ``PIL.Image`` in a host's module: ``open`` goes through :func:`open_image`."""

    def __getattr__(self, name: str) -> object:
        return getattr(Image, name)

    @staticmethod
    def open(file: str | Path | BinaryIO, *args: Any, **kwargs: Any) -> Image.Image:
        current = _current.get()
        if current is None:
            if isinstance(file, str | os.PathLike):
                check_file(file)
            ImageFile.LOAD_TRUNCATED_IMAGES = False
            return Image.open(file, *args, **kwargs)
        return open_image(file, *current)
