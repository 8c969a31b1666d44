"""Functions of the documents' ``alignment_utils.py``: images to packed rows, and how close two outputs are."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from ..data.images import open_image
from ..data.patches import PatchLayout, batch_images_to_packing_input

PIL_AVAILABLE = True
"""Pillow is a requirement of this package; upstream's scripts ask."""


def convert_to_patches(pixel_values: torch.Tensor, patch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images ``[B, C, H, W]`` as rows ``[B*h*w, patch_size**2 * C]``, channels last, and ``grid_thw [B, 3]`` on their
    device: what SigLIP2, AIMv2 and DINOv3 take. (LlavaViT's rows are channels first: ``patchify``.)

    Raises ``ValueError`` for sides that are no multiple of the patch size.
    """
    rows, grid = batch_images_to_packing_input(
        pixel_values, patch_size, PatchLayout.CHANNEL_LAST, num_channels=pixel_values.shape[1]
    )
    return rows, grid.to(pixel_values.device)


convert_to_packing_format = convert_to_patches
"""The name of :func:`convert_to_patches` in the guide to the packing format."""


def compute_similarity_metrics(feat1: torch.Tensor, feat2: torch.Tensor) -> dict[str, float]:
    """How close two outputs ``[..., hidden]`` are: ``max_diff``, ``mean_diff``, and ``min_cosine``, ``mean_cosine``,
    ``max_cosine`` over the vectors; computed in float32.

    Raises ``ValueError`` for different shapes.
    """
    if feat1.shape != feat2.shape:
        raise ValueError(f"outputs of different shapes: {list(feat1.shape)} and {list(feat2.shape)}")
    left, right = (feature.float().reshape(-1, feature.shape[-1]) for feature in (feat1, feat2))
    difference, cosine = (left - right).abs(), F.cosine_similarity(left, right, dim=-1)
    return {
        "max_diff": difference.max().item(),
        "mean_diff": difference.mean().item(),
        "min_cosine": cosine.min().item(),
        "mean_cosine": cosine.mean().item(),
        "max_cosine": cosine.max().item(),
    }


def print_metrics(metrics: dict[str, float], prefix: str = "", indent: int = 0) -> None:
    """Print what :func:`compute_similarity_metrics` returns, one line each."""
    margin = " " * indent
    if prefix:
        print(f"{margin}{prefix}:")
    for name, value in metrics.items():
        print(f"{margin}{name:<12} {value:.8f}")


def round_up_to_multiple(value: int, multiple: int) -> int:
    """The smallest multiple that is not below ``value``."""
    return -(-int(value) // multiple) * multiple


def generate_test_image(path: str | os.PathLike, width: int, height: int) -> str | os.PathLike:
    """Write an image of random colors, the same at each call; its folder is made. Returns ``path``."""
    colors = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(colors).save(path)
    return path


def load_image_as_tensor(image_path: str | os.PathLike, device: torch.device | str = "cpu") -> torch.Tensor:
    """An image file as float32 ``[1, 3, H, W]`` from 0 to 1, not normalized."""
    pixels = torch.from_numpy(np.array(open_image(image_path))).permute(2, 0, 1)
    return (pixels.float() / 255).unsqueeze(0).to(device)
