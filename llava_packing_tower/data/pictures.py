"""Pictures that are no tensors yet (PIL images, arrays) as pixels that can be cut into patches."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from .images import to_rgb
from .pixel_scale import CLIP_MEAN, CLIP_STD, PixelScale


def picture_to_pixels(picture: Image.Image | np.ndarray, patch_size: int, number: int = 0) -> torch.Tensor:
    """A picture as float32 ``[3, H, W]``, normalized with CLIP's statistics.

    Both sides are resized (bicubic) to the multiples of the patch size below them.

    Args:
        picture: a PIL image, or a uint8 array ``[H, W]``, ``[H, W, C]`` or ``[C, H, W]``.
        patch_size: side of a patch in pixels.
        number: what the picture is called in errors.

    Raises:
        ValueError: an array of another kind, or a side shorter than a patch.
    """
    if isinstance(picture, np.ndarray):
        array = picture
        if array.dtype != np.uint8 or array.ndim not in (2, 3):
            raise ValueError(f"image {number}: an array must be uint8 [H, W, C], got {array.dtype} {list(array.shape)}")
        if array.ndim == 3 and array.shape[0] in (1, 3) and array.shape[2] not in (1, 3, 4):
            array = array.transpose(1, 2, 0)
        picture = Image.fromarray(np.ascontiguousarray(array[..., 0] if array.shape[2:] == (1,) else array))
    picture = to_rgb(picture)
    width, height = (side // patch_size * patch_size for side in picture.size)
    if not width or not height:
        raise ValueError(
            f"image {number} is {picture.height} x {picture.width} pixels (height x width), less than a patch of "
            f"{patch_size}"
        )
    resized = picture.resize((width, height), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1)
    return PixelScale(1 / 255, CLIP_MEAN, CLIP_STD)(pixels, 0).contiguous()
