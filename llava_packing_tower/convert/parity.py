"""Compares a packed encoder with transformers' own model: test images, the comparison, its rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch.nn import functional as F

from ..data.image_processor import PackingImageProcessor
from ..data.patches import batch_images_to_packing_input, split_packed
from ..data.segments import read_grid
from ..models.base import PackedVisionModel

SINGLE_SIZES = (224, 336, 448)
MIXED_SIZES = ((224, 336), (448, 224), (336, 336), (112, 448))  # (height, width)
OWN_ERROR_FACTOR = 2.0
FLOAT32_TOLERANCE = 1e-3  # of the largest feature; noise is 1e-5, a damaged layer 1e-2 and more


@dataclass(frozen=True)
class Row:
    """One comparison, over all tokens of all its images.

    ``allowed_difference``: below float32, twice the largest difference of transformers' model in that precision from
    itself in float32; in float32 a thousandth of the largest feature.
    """

    name: str
    images: int
    tokens: int
    min_cosine: float
    mean_cosine: float
    max_difference: float
    allowed_difference: float
    threshold: float

    @property
    def passed(self) -> bool:
        """Smallest cosine at the threshold or above, largest difference as allowed or below (NaN fails)."""
        return self.min_cosine >= self.threshold and self.max_difference <= self.allowed_difference


def snapped(size: int, patch_size: int) -> int:
    """The size rounded down to a multiple of the patch, but at least one patch."""
    return max(size // patch_size, 1) * patch_size


def side_unit(model: PackedVisionModel) -> int:
    """What sides are made multiples of for a comparison: a patch, or where a VLM merges patches, a cell of them."""
    return model.config.patch_size * getattr(model.config, "spatial_merge_size", 1)


def fixed_size(model: PackedVisionModel) -> int | None:
    """The only image side in pixels that the model takes (learned positions for one grid); None if it takes any."""
    side = getattr(model, "fixed_side", None)
    return None if side is None else side * model.config.patch_size


def random_images(sizes: Sequence[tuple[int, int]], channels: int, seed: int = 0) -> list[torch.Tensor]:
    """Images ``[C, H, W]`` of normal noise (as normalized photos are in mean and spread), the same on every machine."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(channels, h, w, generator=generator) for h, w in sizes]


def real_images(
    photos: Sequence[Image.Image], processor: PackingImageProcessor, patch_size: int, side: int | None, seed: int = 0
) -> list[torch.Tensor]:
    """Photos at random sizes (160 to 640 pixels a side, multiples of the patch; ``side`` fixes both), normalized."""
    generator = torch.Generator().manual_seed(seed)
    images = []
    for photo in photos:
        height, width = (
            side or snapped(int(torch.randint(160, 641, (), generator=generator)), patch_size) for _ in range(2)
        )
        size = {"height": height, "width": width}
        processed = processor.preprocess(photo, return_tensors="pt", size=size, crop_size=size)
        images.append(processed["pixel_values"][0])
    return images


def comparison_packs(
    model: PackedVisionModel,
    batch_size: int = 2,
    image_size: int | None = None,
    photos: Callable[[], list[torch.Tensor]] | None = None,
) -> Iterator[tuple[str, list[torch.Tensor]]]:
    """Name and images of each comparison: single resolutions, one mixed pack, photos if asked for.

    Raises ``ValueError`` for an ``image_size`` that the model cannot take.
    """
    patch, channels, only = side_unit(model), model.config.num_channels, fixed_size(model)
    if image_size is not None and (image_size % patch or image_size < patch):
        below = snapped(image_size, patch)
        raise ValueError(
            f"image_size {image_size} is not a multiple of {patch}, the side of a patch or a cell of them; "
            f"nearest: {below}, {below + patch}"
        )
    if image_size is not None and only is not None and image_size != only:
        raise ValueError(f"this checkpoint has learned positions for {only} pixels only, not for {image_size}")
    wanted = [image_size] if image_size else [only] if only else [snapped(size, patch) for size in SINGLE_SIZES]
    for seed, side in enumerate(dict.fromkeys(wanted)):
        yield f"{side}x{side}", random_images([(side, side)] * batch_size, channels, seed)
    if only is None:
        mixed = [(snapped(h, patch), snapped(w, patch)) for h, w in MIXED_SIZES]
        yield "mixed pack", random_images(mixed, channels, 100)
    if model.frames_per_patch > 1:
        noise = random_images([(snapped(112, patch), snapped(224, patch) * 5)], channels, 200)[0]
        yield "clip", [noise.unflatten(2, (5, -1)).transpose(1, 2)]  # an odd number of frames
    if photos is not None:
        yield "real photos", photos()


@torch.no_grad()
def compare(
    name: str,
    images: Sequence[torch.Tensor],
    model: PackedVisionModel,
    exact: Callable[[torch.Tensor], torch.Tensor],
    low: Callable[[torch.Tensor], torch.Tensor] | None,
    threshold: float,
) -> Row:
    """One packed pass against transformers' model image by image.

    Args:
        name: of the row.
        images: ``[C, H, W]`` each.
        model: the packed encoder.
        exact, low: ``[C, H, W]`` to ``[h*w, hidden]``: the reference in float32, and in the model's own precision if
            that is lower.
        threshold: of the smallest cosine over all tokens.
    """
    rows, grid = batch_images_to_packing_input(
        list(images),
        model.config.patch_size,
        model.patch_layout,
        device=model.device,
        dtype=model.dtype,
        frames_per_patch=model.frames_per_patch,
    )
    cosines, difference, own, largest = [], 0.0, 0.0, 0.0
    for image, packed in zip(images, split_packed(model(rows, grid), read_grid(grid))):
        # Both get the pixels that the packed encoder got, rounded to its precision.
        seen = image.to(model.dtype)
        truth, packed = exact(seen.float()).float(), packed.float()
        cosines.append(F.cosine_similarity(packed, truth, dim=-1).cpu())
        difference = _largest(difference, packed - truth)
        largest = _largest(largest, truth)
        if low:
            own = _largest(own, low(seen).float() - truth)
    cosine = torch.cat(cosines)
    allowed = OWN_ERROR_FACTOR * own if low else FLOAT32_TOLERANCE * largest
    return Row(
        name, len(images), len(cosine), cosine.min().item(), cosine.mean().item(), difference, allowed, threshold
    )


def _largest(so_far: float, difference: torch.Tensor) -> float:
    """The larger of the two magnitudes; NaN stays NaN."""
    worst = difference.abs().max().item()
    return math.nan if math.isnan(worst) or math.isnan(so_far) else max(so_far, worst)
