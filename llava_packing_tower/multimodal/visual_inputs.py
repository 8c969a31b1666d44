"""Images and videos in the forms in which LLaVA passes them, read into one form."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

VIDEO = "video"
Detail = Mapping[str, object]
"""What may stand in LLaVA's ``image_sizes`` in place of (width, height), all optional: ``size`` (that pair),
``modality``, ``patch_positions`` ``[frames * rows * columns, 3]``, ``frame_indices`` (of the frames in their video),
``total_frames`` and ``group``. A plain dict: Trainer, accelerate and DeepSpeed move what is in it and keep its type."""


@dataclass(frozen=True)
class Visual:
    """One image, or the frames of one video: what one ``<image>`` in the text stands for.

    frames: pixels ``[T, C, H, W]``, one frame for an image. patch_positions: ``[T*h*w, 3]`` or None for those of the
    grid. frame_indices and total_frames: where the frames lie in their video (default: they are all of it). group:
    neighbors with one group and one size are frames of one clip, each with an ``<image>`` of its own.
    """

    frames: torch.Tensor
    is_video: bool = False
    patch_positions: torch.Tensor | None = None
    frame_indices: tuple[int, ...] | None = None
    total_frames: int | None = None
    group: int | None = None


def blank_like(frames: torch.Tensor | None, unit: tuple[int, int], device: torch.device) -> Visual:
    """A black image of one unit (height, width in pixels), for a batch without images."""
    dtype, device = (torch.float32, device) if frames is None else (frames.dtype, frames.device)
    return Visual(torch.zeros(1, 3, *unit, dtype=dtype, device=device))


def read_visuals(
    images: torch.Tensor | Sequence[torch.Tensor],
    modalities: Sequence[str] | str | None,
    details: Sequence[Detail | Sequence[int]] | None,
    per_sample: Sequence[int],
) -> list[Visual]:
    """Read what LLaVA's models are called with.

    Args:
        images: ``[B, C, H, W]``, ``[B, T, C, H, W]``, or a list of ``[C, H, W]``, ``[1, C, H, W]`` and, for videos,
            ``[T, C, H, W]``.
        modalities: "image", "video" or "text": one for each image, one for each sample, or one for all.
        details: LLaVA's ``image_sizes``; see :data:`Detail`.
        per_sample: number of ``<image>`` in each sample of the batch.

    Raises:
        ValueError: tensors of other shapes, several frames that are not said to be a video, more or fewer modalities.
    """
    if isinstance(images, torch.Tensor) and images.dim() not in (4, 5):
        raise ValueError(f"images must be [B, C, H, W] or [B, T, C, H, W] or a list, got {list(images.shape)}")
    images = list(images)
    kinds = _kinds(modalities, len(images), per_sample)
    # LLaVA itself never reads the sizes here, and callers pass anything: only the dicts of this package are read.
    given = [d if isinstance(d, Mapping) else {} for d in details or ()]
    given = given if len(given) == len(images) else [{}] * len(images)
    return [_read(index, *entry) for index, entry in enumerate(zip(images, kinds, given))]


def _read(index: int, pixels: object, kind: str, detail: Detail) -> Visual:
    if not isinstance(pixels, torch.Tensor) or pixels.dim() not in (3, 4):
        found = list(pixels.shape) if isinstance(pixels, torch.Tensor) else type(pixels).__name__
        raise ValueError(f"image {index} must be a tensor [C, H, W], or [T, C, H, W] for a video, got {found}")
    frames = pixels if pixels.dim() == 4 else pixels[None]
    is_video = detail.get("modality", kind) == VIDEO
    if not is_video and len(frames) != 1:
        raise ValueError(
            f"image {index} is {list(frames.shape)}, which is {len(frames)} images: at native resolution each image is "
            f"an entry of its own in the list, and a video has the modality 'video'"
        )
    indices, total = detail.get("frame_indices"), detail.get("total_frames")
    if indices is not None:
        indices = tuple(int(i) for i in indices)
        if len(indices) != len(frames):
            raise ValueError(f"image {index} has {len(frames)} frames, but {len(indices)} frame_indices")
    total, group = (None if value is None else int(value) for value in (total, detail.get("group")))
    return Visual(frames, is_video, detail.get("patch_positions"), indices, total, group)


def _kinds(modalities: Sequence[str] | str | None, count: int, per_sample: Sequence[int]) -> list[str]:
    """The modality of each image."""
    if modalities is None:
        return ["image"] * count
    kinds = [modalities] if isinstance(modalities, str) else list(modalities)
    if len(kinds) == count:
        return kinds
    if len(kinds) == 1:
        return kinds * count
    if len(kinds) == len(per_sample):
        for least in (1, 0):  # LLaVA's own data has an image for a sample without one too
            spread = [kind for kind, n in zip(kinds, per_sample) for _ in range(max(n, least))]
            if len(spread) == count:
                return spread
    raise ValueError(f"{len(kinds)} modalities for {count} images in {len(per_sample)} samples")


def with_positions(
    visuals: Sequence[Visual], positions: Sequence[torch.Tensor | None] | None, patch_size: int
) -> list[Visual]:
    """The visuals with the positions that a model is called with: one entry ``[n, 3]`` or ``[1, n, 3]`` for each image,
    or for each sample. The images of one entry are a clip.

    Raises ``ValueError`` for positions of another number of patches than all visuals have.
    """
    entries = [entry.reshape(-1, 3) for entry in positions or () if entry is not None]
    if not entries:
        return list(visuals)
    counts = [v.frames.shape[0] * math.prod(side // patch_size for side in v.frames.shape[-2:]) for v in visuals]
    if sum(map(len, entries)) != sum(counts):
        raise ValueError(f"patch_positions of {list(map(len, entries))} patches, but the images have {counts} patches")
    ends = torch.tensor([len(entry) for entry in entries]).cumsum(0)
    parts = torch.cat(entries).split(counts)
    groups = torch.searchsorted(ends, torch.tensor(counts).cumsum(0)).tolist()
    return [replace(v, patch_positions=part, group=group) for v, part, group in zip(visuals, parts, groups)]


def fill_slots(features: list[torch.Tensor], per_sample: Sequence[int]) -> list[torch.Tensor]:
    """The features as LLaVA takes them: one for each ``<image>``, and one for a sample without any (it adds none).

    Raises ``ValueError`` where the batch has more or fewer images than its text has ``<image>``.
    """
    if len(features) == sum(max(n, 1) for n in per_sample):
        return features
    if len(features) != sum(per_sample):
        raise ValueError(
            f"{len(features)} images, but the {len(per_sample)} samples of the batch have {list(per_sample)} <image>"
        )
    slots, rest = [], iter(features)
    for n in per_sample:
        slots += [next(rest) for _ in range(n)] if n else [features[0][:0]]
    return slots
