"""Images and videos as a tower gets them, with their grids, tokens and positions, and what a pass over them costs."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from ...data.images import NATIVE as FIT
from ...data.images import check_file, open_image
from ...data.native_config import DEFAULT_MIN_PATCHES, NativeSettings
from ...data.positions import interpolate_frame_indices
from ...data.segments import Grid
from ...data.smart_resize import merged
from ...data.video import read_clip
from ...multimodal.flops import encoder_flops
from ...multimodal.visual_inputs import Visual
from ...multimodal.visual_tokens import tower_inputs
from ...towers.packing_tower import HEVCViTPackingVisionTower
from ...train.preflight import check_projector

VIDEOS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg")

MOST_PLACES = 1 << 16
"""Most patches of a frame onto which those of a codec sample are put back."""


@dataclass
class Seen:
    """One image or video.

    size: its own width and height. pixels: uint8 ``[T, H, W, 3]`` as the tower gets them (before normalizing).
    values: the same, normalized, ``[T, C, H, W]``. grid: frames, rows, columns of patches; tokens: the same behind the
    projector. segments: patches that see each other. indices, total: of a video, which of how many frames. positions:
    in time, of its frames, or of all patches ``[N, 3]`` where they were given.
    """

    name: str
    size: tuple[int, int]
    pixels: np.ndarray
    values: torch.Tensor
    grid: Grid
    tokens: Grid
    segments: list[int]
    indices: list[int] | None = None
    total: int | None = None
    positions: np.ndarray | None = None
    features: np.ndarray | None = None

    @property
    def patches(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]


def load(name: str, projector: str, max_patches: int | None, device: str) -> HEVCViTPackingVisionTower:
    """A tower whose images keep their shapes, within the bounds; of a family that takes one size only, at that size."""
    check_projector("--projector", projector)
    arguments = SimpleNamespace(mm_vision_select_layer=-1, mm_projector_type=projector)
    tower = HEVCViTPackingVisionTower(name, arguments).to(device)
    model = tower.vision_tower
    if getattr(model, "fixed_side", None) is None:
        most = max_patches or (tower.image_size // tower.config.patch_size) ** 2
        clips = "frames" if model.image_only else "clip"
        tower.set_native(NativeSettings(min(DEFAULT_MIN_PATCHES, most), most, clips))
    elif max_patches is not None:
        raise ValueError(f"{name} takes images of one size only: --max_patches has no effect")
    return tower


def see(tower: HEVCViTPackingVisionTower, file: Path, frames: int) -> Seen:
    """Read an image, or sample ``frames`` frames of a video. Raises ``ValueError`` that names the file."""
    processor, patch, merge = tower.image_processor, tower.config.patch_size, tower.merge
    indices, total, places = None, None, None
    if file.suffix.lower() in VIDEOS:
        clip = read_clip(str(file), upbound=frames, force=True)
        indices, total = clip.indices, clip.total
        size = clip.frames.shape[2], clip.frames.shape[1]
        values = processor.preprocess(clip.frames, return_tensors="pt")["pixel_values"]
        places = np.array(indices)
        if tower.vision_tower.stretches_clips:
            places = interpolate_frame_indices(torch.tensor([indices]), torch.tensor([total]))[0].numpy()
    else:
        image = open_image(file, processor.image_reading, FIT)
        size = image.size
        values = processor.preprocess(image, return_tensors="pt")["pixel_values"]
    rows, columns = (side // patch for side in values.shape[-2:])
    grid = (-(-len(values) // tower.vision_tower.frames_per_patch), rows, columns)
    tokens = (grid[0], *merged((rows, columns), merge))
    segments = _segments(tower, grid) if _has_clips(tower) else [rows * columns] * grid[0]
    pixels = _as_bytes(values, processor)
    return Seen(str(file), size, pixels, values, grid, tokens, segments, indices, total, places)


def _has_clips(tower: HEVCViTPackingVisionTower) -> bool:
    """Whether the frames of a video see each other."""
    return not tower.vision_tower.image_only


def _segments(tower: HEVCViTPackingVisionTower, grid: Grid) -> list[int]:
    """Patches of a sample that see each other, without prefix tokens; where blocks differ, in those that see most."""
    attended = getattr(tower.config, "attended", None)
    return [math.prod(grid)] if attended is None else max((lengths for lengths, _ in attended([grid])), key=max)


def _as_bytes(values: torch.Tensor, processor: object) -> np.ndarray:
    """Normalized pixels ``[T, C, H, W]`` as uint8 ``[T, H, W, 3]`` again."""
    mean, std = (torch.tensor(getattr(processor, f"image_{name}")).view(-1, 1, 1) for name in ("mean", "std"))
    back = values * std + mean if processor.do_normalize else values
    back = back / (processor.rescale_factor if processor.do_rescale else 1)
    return back.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()


def place_patches(seen: Seen, file: Path) -> None:
    """Read the positions (frame, row, column) of the patches of a codec sample, whose image holds the kept ones.

    Raises ``ValueError`` for another number of positions than the image has patches, and for frames beyond MOST_PLACES.
    """
    check_file(file)
    try:
        found = np.load(file, allow_pickle=False, mmap_mode="r")
        count = found.size // 3
        positions = np.array(found, np.float32).reshape(-1, 3) if count == seen.patches else np.empty((0, 3))
    except Exception as error:  # NumPy reads the header as Python text: a damaged one raises anything at all
        raise ValueError(f"{file} is no file of positions: {error or type(error).__name__}") from error
    if count != seen.patches:
        raise ValueError(f"{file} has {count} positions, {seen.name} has {seen.patches} patches")
    if not np.isfinite(positions).all() or positions.min() < 0:
        raise ValueError(f"{file}: positions are numbers from 0 on, but one of them is {positions.min()}")
    height, width = (int(min(side, MOST_PLACES)) + 1 for side in np.rint(positions[:, 1:].max(0)))
    if height * width > MOST_PLACES:
        raise ValueError(
            f"{file}: its frames have {height} x {width} patches or more, at most {MOST_PLACES} in all are shown"
        )
    seen.positions = positions


@dataclass
class Cost:
    """Of one packed pass without gradients.

    weights, activations: bytes; of the activations those that are there at once in a block: its input and output, q, k,
    v, the result of attention, and the MLP before and behind its activation. flops: operations. rate: operations per
    second of this device in a matmul of the encoder's width. seconds, memory: measured, None if the tower did not run.
    """

    weights: int
    activations: int
    flops: float
    rate: float
    seconds: float | None = None
    memory: int | None = None

    @property
    def estimate(self) -> float:
        """Seconds, if all operations ran at the rate of the matmul."""
        return self.flops / self.rate


def cost_of(tower: HEVCViTPackingVisionTower, images: Sequence[Seen]) -> Cost:
    """What a pass over all images together costs on the tower's device: an estimate."""
    model, lengths = tower.vision_tower, [length for seen in images for length in seen.segments]
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    size = next(model.parameters()).element_size()
    values = 6 * tower.config.hidden_size + 2 * tower.config.intermediate_size
    flops = encoder_flops(tower.config, lengths, grids=[seen.grid for seen in images]).forward
    return Cost(weights, sum(lengths) * values * size, flops, _rate(tower, sum(lengths)))


def _rate(tower: HEVCViTPackingVisionTower, rows: int) -> float:
    """Operations per second of a matmul ``[rows, width] x [width, 4 width]`` on the tower's device."""
    width = tower.config.hidden_size
    left = torch.randn(min(rows, 4096), width, device=tower.device, dtype=tower.dtype)
    right = torch.randn(width, 4 * width, device=tower.device, dtype=tower.dtype)
    best = float("inf")
    for _ in range(4):
        _wait(tower)
        start = time.perf_counter()
        left @ right
        _wait(tower)
        best = min(best, time.perf_counter() - start)
    return 2 * left.shape[0] * width * 4 * width / best


def _wait(tower: HEVCViTPackingVisionTower) -> None:
    if tower.device.type == "cuda":
        torch.cuda.synchronize(tower.device)


@torch.inference_mode()
def run(tower: HEVCViTPackingVisionTower, images: Sequence[Seen], cost: Cost) -> None:
    """Encode all images in one pass, as LLaVA does at native resolution; notes features, time and peak memory."""
    visuals = []
    for seen in images:
        values = seen.values.to(tower.device, tower.dtype)
        if seen.indices is not None:
            visuals.append(Visual(values, True, frame_indices=tuple(seen.indices), total_frames=seen.total))
        else:
            own = None if seen.positions is None else torch.from_numpy(seen.positions)
            visuals.append(Visual(values, patch_positions=own))
    model, patch, clips = tower.vision_tower, tower.config.patch_size, _has_clips(tower)
    places = clips and model.takes_positions
    inputs, _, positions = tower_inputs(visuals, patch, clips, model.frames_per_patch, places, model.stretches_clips)
    _wait(tower)
    start = time.perf_counter()
    found = tower(inputs) if positions is None or not places else tower(inputs, patch_positions=positions)
    _wait(tower)
    cost.seconds = time.perf_counter() - start
    if tower.device.type == "cuda":
        cost.memory = torch.cuda.max_memory_allocated(tower.device)
    else:
        cost.memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    parts = torch.cat(list(found)).split([seen.patches for seen in images])
    for seen, features in zip(images, parts):
        seen.features = features.float().cpu().numpy()


def principal_colors(images: Sequence[Seen]) -> list[np.ndarray]:
    """The first three principal components of all features together as colors: uint8 ``[t, h, w, 3]`` of each image."""
    features = np.concatenate([seen.features for seen in images]).astype(np.float64)
    features -= features.mean(0)
    _, _, axes = np.linalg.svd(features, full_matrices=False)
    parts = features @ axes[:3].T
    parts = np.pad(parts, ((0, 0), (0, 3 - parts.shape[1])))
    low, high = np.percentile(parts, [2, 98], axis=0)
    colors = np.clip((parts - low) / np.maximum(high - low, 1e-12), 0, 1)
    colors = np.rint(255 * colors).astype(np.uint8)
    ends = np.cumsum([seen.patches for seen in images])[:-1]
    return [part.reshape(*seen.grid, 3) for seen, part in zip(images, np.split(colors, ends))]
