"""Pixels to packed patch rows and back, and the metadata of a packed batch (made once, on the host).

A packed batch is ``hidden_states [N, patch_dim]``, one row per patch, samples one after the other, inside a sample
frame by frame, inside a frame row by row, and ``grid_thw [B, 3]`` with the (frames, rows, columns) of each sample in
patches. The order of the numbers inside a row is a property of the encoder family (:class:`PatchLayout`): with the
wrong one a model loads and runs, but its features are wrong.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import Enum
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image

from .pictures import picture_to_pixels
from .pixel_scale import PixelScale
from .segments import Grid, read_grid


class PatchLayout(Enum):
    """Order of the numbers inside one patch row; the value is its einops pattern."""

    CHANNEL_FIRST = "(c ph pw)"
    """LlavaViT: all of channel 0, then channel 1, then channel 2."""

    CHANNEL_LAST = "(ph pw c)"
    """SigLIP2, AIMv2, DINOv3: pixel by pixel, the channels of a pixel together."""


def _check_size(shape: Sequence[int], patch_size: int, num_channels: int, index: int) -> None:
    channels, height, width = shape[0], shape[-2], shape[-1]
    if channels != num_channels:
        raise ValueError(f"image {index} has {channels} channels, expected {num_channels} (shape {list(shape)})")
    for name, size in (("height", height), ("width", width)):
        if size % patch_size or size == 0:
            below = size // patch_size * patch_size
            nearest = [n for n in (below, below + patch_size) if n > 0]
            raise ValueError(
                f"image {index} is {height} x {width} pixels (height x width): {name} {size} is not a positive "
                f"multiple of the patch size {patch_size}; nearest {name}s: {' or '.join(map(str, nearest))}"
            )


def patchify(
    pixel_values: torch.Tensor, patch_size: int, layout: PatchLayout = PatchLayout.CHANNEL_FIRST
) -> torch.Tensor:
    """Cut pixels into patch rows.

    Args:
        pixel_values: one image ``[C, H, W]``, a batch ``[B, C, H, W]`` or clips ``[B, C, T, H, W]``.
        patch_size: side of a patch in pixels.
        layout: order inside a row.

    Returns:
        ``[N, C * patch_size ** 2]``, a new tensor.

    Raises:
        ValueError: another number of dimensions, or sides that are no multiple of the patch size.
    """
    if pixel_values.dim() not in (3, 4, 5):
        raise ValueError(f"expected [C,H,W], [B,C,H,W] or [B,C,T,H,W], got shape {list(pixel_values.shape)}")
    if pixel_values.dim() == 3:
        pixel_values = pixel_values[None]
    if pixel_values.dim() == 4:
        pixel_values = pixel_values.unsqueeze(2)
    for index, sample in enumerate(pixel_values[:1]):
        _check_size(sample.shape, patch_size, sample.shape[0], index)
    return rearrange(
        pixel_values, f"b c t (h ph) (w pw) -> (b t h w) {layout.value}", ph=patch_size, pw=patch_size
    ).contiguous()


def unpatchify(
    hidden_states: torch.Tensor,
    grid_thw: torch.Tensor,
    patch_size: int,
    layout: PatchLayout = PatchLayout.CHANNEL_FIRST,
) -> list[torch.Tensor]:
    """Inverse of packing: patch rows ``[N, patch_dim]`` to one ``[C, H, W]`` per image, ``[C, T, H, W]`` per clip.

    Raises ``ValueError`` if the rows do not fit the grid or the patch size.
    """
    grids = read_grid(grid_thw, hidden_states.shape[0])
    if hidden_states.shape[1] % patch_size**2:
        raise ValueError(f"rows of {hidden_states.shape[1]} numbers are not a multiple of {patch_size}^2 pixels")
    samples = []
    for (t, h, w), rows in zip(grids, split_packed(hidden_states, grids), strict=True):
        clip = rearrange(
            rows,
            f"(t h w) {layout.value} -> c t (h ph) (w pw)",
            **{"t": t, "h": h, "w": w, "ph": patch_size, "pw": patch_size},
        )
        samples.append(clip[:, 0] if t == 1 else clip)
    return samples


def longest_first(images: Sequence[torch.Tensor]) -> list[int]:
    """The indices of images ``[C, H, W]`` or clips ``[C, T, H, W]``, the largest first.

    A GPU works through the segments of a batch in their order: with the longest one last, all but one of its processors
    wait for that one. Besides, batches that differ only in their order share what is cached for them.
    """
    sizes = [image.numel() if isinstance(image, torch.Tensor) else 0 for image in images]
    return sorted(range(len(images)), key=sizes.__getitem__, reverse=True)


def split_packed(packed: torch.Tensor, grids: Sequence[Grid]) -> list[torch.Tensor]:
    """Split ``[N, ...]`` into one ``[t*h*w, ...]`` per sample (views)."""
    return list(packed.split([t * h * w for t, h, w in grids]))


def _temporal(sample: torch.Tensor, frames: int) -> torch.Tensor:
    """``[C, H, W]`` or ``[C, T, H, W]`` as temporal patches ``[C, t, frames, H, W]``.

    An image is repeated to a whole one; where T is no multiple, the last frame of the clip is.
    """
    if sample.dim() == 3:
        return sample[:, None, None].expand(-1, -1, frames, -1, -1)
    if missing := -sample.shape[1] % frames:
        sample = torch.cat([sample, sample[:, -1:].expand(-1, missing, -1, -1)], dim=1)
    return sample.unflatten(1, (-1, frames))


def _cut(clip: torch.Tensor, grid: Grid, patch_size: int, layout: PatchLayout) -> torch.Tensor:
    """``[C, t, frames, H, W]`` seen as ``[t, h, w, C, frames, patch, patch]``, or with the channels last."""
    t, h, w = grid
    frames, channels_first = clip.shape[2], layout is PatchLayout.CHANNEL_FIRST
    if clip.requires_grad:  # (the gradient of as_strided takes its time)
        split = clip.reshape(len(clip), t, frames, h, patch_size, w, patch_size)
        return split.permute((1, 3, 5, 0, 2, 4, 6) if channels_first else (1, 3, 5, 2, 4, 6, 0))
    channel, step, frame, line, pixel = clip.stride()
    size, inner = [frames, patch_size, patch_size], [frame, line, pixel]
    position = 0 if channels_first else 3
    size.insert(position, len(clip))
    inner.insert(position, channel)
    return clip.as_strided(
        (t, h, w, *size), (step, line * patch_size, pixel * patch_size, *inner), clip.storage_offset()
    )


def batch_images_to_packing_input(
    images: torch.Tensor | np.ndarray | Sequence[torch.Tensor | Image.Image | np.ndarray],
    patch_size: int = 16,
    layout: PatchLayout = PatchLayout.CHANNEL_FIRST,
    *,
    num_channels: int = 3,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    numbers: Sequence[int] | None = None,
    scale: PixelScale | None = None,
    frames_per_patch: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pack a batch of images, of one size or of many.

    Args:
        images: ``[B, C, H, W]`` or a list of ``[C, H, W]`` (or clips ``[C, T, H, W]``) of any sizes. PIL images and
            uint8 arrays ``[H, W, C]`` are resized to whole patches and normalized as CLIP's are
            (:func:`.pictures.picture_to_pixels`): for the statistics of another model, use its image processor.
        patch_size: side of a patch in pixels.
        layout: order inside a row.
        num_channels: channels that every image must have.
        device, dtype: where and as what the rows are made (default: those of the first image). Cutting, casting and
            concatenating are one copy per image; images on the host cross to a GPU in one transfer.
        numbers: what the images are called in errors (default: 0, 1, ...).
        scale: how uint8 images are normalized, on ``device`` and in float32; floating point ones are taken as they are.
        frames_per_patch: frames that one patch covers (``model.frames_per_patch``). An image is repeated to so many; a
            clip ends with its last frame repeated until it has a multiple of them.

    Returns:
        ``hidden_states [N, C * frames_per_patch * patch_size ** 2]``, the frames of a row in front of its pixels, and
        ``grid_thw [B, 3]`` (int64, on the CPU: its values are needed there), where t counts patches too.

    Raises:
        ValueError: no image, another channel count, sides that are not a multiple of the patch size (the message
            names the image and the nearest sizes), or integer pixels for floating point rows without a ``scale``.
    """
    if isinstance(images, torch.Tensor) and images.dim() != 4:
        raise ValueError(f"a tensor of images must be [B, C, H, W], got shape {list(images.shape)}")
    if len(images) == 0:
        raise ValueError("no images: the batch is empty")
    stacked = images if isinstance(images, torch.Tensor) else None
    tensors: list[Any] = [
        picture_to_pixels(image, patch_size, number) if isinstance(image, (Image.Image, np.ndarray)) else image
        for number, image in zip(numbers or range(len(images)), images)
    ]
    grids: list[Grid] = []
    for index, image in zip(numbers or range(len(tensors)), tensors):
        if not isinstance(image, torch.Tensor) or image.dim() not in (3, 4):
            found = list(image.shape) if isinstance(image, torch.Tensor) else type(image).__name__
            raise ValueError(f"image {index} must be a tensor [C, H, W] (or a clip [C, T, H, W]), got {found}")
        _check_size(image.shape, patch_size, num_channels, index)
        frames = image.shape[1] if image.dim() == 4 else 1
        grids.append((-(-frames // frames_per_patch), image.shape[-2] // patch_size, image.shape[-1] // patch_size))

    device = torch.device(tensors[0].device if device is None else device)
    in_bytes = [not image.is_floating_point() for image in tensors]
    if any(in_bytes) and scale is None and dtype is not None and dtype.is_floating_point:
        number = list(numbers or range(len(tensors)))[in_bytes.index(True)]
        raise ValueError(f"image {number} is {tensors[in_bytes.index(True)].dtype}: integer pixels need a scale")
    if any(in_bytes) and scale is not None and not all(in_bytes):
        stacked, tensors = None, [scale(x.to(device), 0) if raw else x for raw, x in zip(in_bytes, tensors)]
        in_bytes = [False]
    late = scale if all(in_bytes) else None  # bytes cross to the device as they are
    wanted = dtype
    if late is not None:
        wanted, dtype = wanted or torch.float32, tensors[0].dtype
    dtype = tensors[0].dtype if dtype is None else dtype
    staging = device if all(image.device == device for image in tensors) else tensors[0].device
    rows = torch.empty(
        sum(t * h * w for t, h, w in grids),
        num_channels * frames_per_patch * patch_size**2,
        dtype=dtype,
        device=staging,
        pin_memory=staging.type == "cpu" and device.type == "cuda",
    )
    if stacked is not None:  # one size: one copy for all
        clips = [stacked.transpose(0, 1).unsqueeze(2).expand(-1, -1, frames_per_patch, -1, -1)]
        shapes = [(len(grids), *grids[0][1:])]
    else:
        clips, shapes = [_temporal(image, frames_per_patch) for image in tensors], grids
    cuts, targets, start = [], [], 0
    for clip, grid in zip(clips, shapes, strict=True):
        cuts.append(_cut(clip, grid, patch_size, layout))
        targets.append(rows[start : start + math.prod(grid)].view(cuts[-1].shape))
        start += math.prod(grid)
    if any(cut.requires_grad for cut in cuts):
        rows = torch.cat([cut.reshape(-1, rows.shape[1]) for cut in cuts]).to(dtype)
    else:
        for target, cut in zip(targets, cuts, strict=True):
            target.copy_(cut, non_blocking=True)
    rows = rows.to(device, non_blocking=True)
    if late is not None:
        first = layout is PatchLayout.CHANNEL_FIRST
        pixels = rows.unflatten(1, (num_channels, -1) if first else (-1, num_channels))
        rows = late(pixels, 1 if first else 2).flatten(1).to(wanted)
    return rows, torch.tensor(grids, dtype=torch.int64, device="cpu")


def image_to_packing_input(
    image: torch.Tensor | Image.Image | np.ndarray,
    patch_size: int = 16,
    layout: PatchLayout = PatchLayout.CHANNEL_FIRST,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One image ``[C, H, W]`` (or clip ``[C, T, H, W]``, or picture) as ``hidden_states [N, patch_dim]`` and
    ``grid_thw [1, 3]``.

    Options and errors are those of :func:`batch_images_to_packing_input`.
    """
    return batch_images_to_packing_input([image], patch_size, layout, **options)
