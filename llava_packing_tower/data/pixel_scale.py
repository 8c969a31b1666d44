"""Pixels in bytes to the numbers that an encoder was trained on."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .cached_metadata import cached

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class PixelScale(NamedTuple):
    """What an image processor does to pixels once they have their size: ``(pixels * factor - mean) / std``.

    mean and std: per channel, or None where it does not normalize.
    """

    factor: float
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def __call__(self, pixels: torch.Tensor, dim: int) -> torch.Tensor:
        """uint8 pixels, whose channels are dimension ``dim``, as float32: computed as the image processors do it.

        Raises ``ValueError`` for other integers, and another number of channels.
        """
        if pixels.dtype != torch.uint8:
            raise ValueError(f"pixels must be uint8 (0 to 255) or floating point, got {pixels.dtype}")
        values = pixels.to(torch.float32).mul_(self.factor)
        if self.mean is None or self.std is None:
            return values
        if len(self.mean) != pixels.shape[dim]:
            raise ValueError(f"images have {pixels.shape[dim]} channels, but image_mean has {len(self.mean)}")
        shape = [1] * pixels.dim()
        shape[dim] = -1
        mean, std = _statistics(self.mean, self.std, pixels.device)
        return values.sub_(mean.view(shape)).div_(std.view(shape))


@cached(8)
def _statistics(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    made = (torch.tensor(values, dtype=torch.float32, device="cpu").to(device) for values in (mean, std))
    first, second = made
    return first, second


def check_floating(pixels: torch.Tensor) -> None:
    """Raises ``ValueError`` for integer pixels (of any shape): a model cannot know their scale."""
    if not pixels.is_floating_point():
        raise ValueError(
            f"pixels are {pixels.dtype}, and a model takes normalized floating point ones: normalize them with the "
            f"image processor, or give them to the vision tower as uint8, which does it itself"
        )
