"""The photographs of the verification, as normalized images and clips."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from ..data.image_processor import PackingImageProcessor
from ..data.images import open_image
from ..data.positions import interpolate_frame_indices
from ..data.sample_photos import PHOTOS, source_of
from ..utils.files import user_path

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
CONTEXT = 64
SMALLEST_PATCH = 8


@dataclass(frozen=True)
class Sample:
    """An image or a clip.

    pixels: float32 ``[C, T, H, W]``, normalized. frame_indices: int64 ``[T]``, where its frames stand in a context of
    64 frames; an image is one frame at 0.
    """

    name: str
    pixels: torch.Tensor
    frame_indices: torch.Tensor


def find_photos(folder: str | Path | None = None) -> list[Path]:
    """Image files of the user's folder, else the photographs inside scikit-learn and scikit-image.

    Raises ``ValueError`` if there is none; the message says what to install or pass.
    """
    if folder is not None:
        found = sorted(file for file in user_path(folder).glob("*") if file.suffix.lower() in SUFFIXES)
        if not found:
            raise ValueError(f"--images {folder}: not a folder, or no file in it ends in {', '.join(SUFFIXES)}")
        return found
    found = []
    for photo in sorted(PHOTOS, key=lambda photo: photo.package, reverse=True):
        try:
            found.append(source_of(photo))
        except FileNotFoundError:
            continue
    if not found:
        raise ValueError(
            "verification needs photographs, and neither scikit-learn nor scikit-image, which contain some, is "
            "installed: pip install scikit-learn, or pass --images FOLDER with your own photos, or --no-verify"
        )
    return found


def open_photo(file: Path) -> Image.Image:
    """Raises ``ValueError`` that names the file if it is not an image."""
    return open_image(file)


class Photographer:
    """Makes samples out of photo files; clips are a window that wanders over a photo."""

    def __init__(self, files: list[Path], processor: PackingImageProcessor, patch_size: int, channels: int) -> None:
        self.processor, self.patch_size, self.channels = processor, patch_size, channels
        self.files = files

    def _open(self, number: int) -> Image.Image:
        return open_photo(self.files[number % len(self.files)])

    def snapped(self, side: int) -> int:
        """The side rounded down to whole patches, at least two. Models with patches below 8 pixels (no real ones) get
        smaller pictures: attention over the patches of 1008 pixels would take them hours."""
        patches = side // max(self.patch_size, SMALLEST_PATCH)
        return max(patches, 2) * self.patch_size

    def _pixels(self, image: Image.Image, side: int) -> torch.Tensor:
        size = {"height": side, "width": side}
        values = self.processor.preprocess(
            image, return_tensors="pt", size=size, crop_size=size, do_resize=True, do_center_crop=True
        )["pixel_values"][0]
        return values[torch.arange(self.channels) % len(values)]

    def image(self, number: int, side: int) -> Sample:
        side = self.snapped(side)
        pixels = self._pixels(self._open(number), side)
        return Sample(f"image {side}x{side}", pixels.unsqueeze(1), torch.zeros(1, dtype=torch.int64))

    def clip(self, number: int, side: int, frames: int) -> Sample:
        side, photo = self.snapped(side), self._open(number)
        width, height = photo.size
        window = min(width, height) * 3 // 4
        pictures = []
        for index in range(frames):
            part = index / max(frames - 1, 1)
            left, top = round(part * (width - window)), round(part * (height - window))
            pictures.append(self._pixels(photo.crop((left, top, left + window, top + window)), side))
        places = interpolate_frame_indices(torch.arange(frames)[None], torch.tensor([frames]), CONTEXT)[0]
        return Sample(f"{frames} frames {side}x{side}", torch.stack(pictures, dim=1), places)
