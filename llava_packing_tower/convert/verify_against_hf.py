"""Verification of the families that transformers has models of its own for (SigLIP2, AIMv2, DINOv3)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from ..checkpoint.namings import NAMINGS
from ..data.patches import batch_images_to_packing_input
from ..models.base import PackedVisionModel
from .hf_reference import NoReference, Reference, require_reference
from .parity import compare, comparison_packs, fixed_size, random_images, real_images, side_unit, snapped
from .plan import Conversion
from .test_images import open_photo
from .verify import RELOAD, THRESHOLDS, Features, TestResult, reload_test

PHOTOS = 4


def verify_family(
    conversion: Conversion,
    folder: Path,
    device: torch.device,
    expected: Mapping[str, str],
    photos: Sequence[Path],
    step: Callable[[str], None] = lambda what: None,
) -> list[TestResult]:
    """Against transformers' model where this transformers has one; the bits on disk in any case."""
    cls, dtype = conversion.model_class, conversion.dtype
    load = partial(cls.from_pretrained, folder, dtype=dtype, device=device)
    try:
        results = _against_transformers(conversion, load, device, photos[:PHOTOS], step)
    except NoReference as error:
        results = [TestResult("transformers' own model", None, note=f"not compared: {error}")]
    step(RELOAD)
    return [*results, reload_test(load, _probe, folder.parent, expected)]


def _against_transformers(
    conversion: Conversion,
    load: Callable[[], PackedVisionModel],
    device: torch.device,
    photos: Sequence[Path],
    step: Callable[[str], None],
) -> list[TestResult]:
    model_type, dtype = conversion.config.model_type, conversion.dtype
    require_reference(model_type)
    if whose := next((n.whose for n in NAMINGS if n.model_type == conversion.source.kind), None):
        raise NoReference(f"the source is {whose}, which transformers does not read")
    step(f"transformers' model for {model_type}")
    exact = Reference(model_type, conversion.source.path, torch.float32, device)
    low = None
    if dtype != torch.float32:  # the same rounded weights in all three: only the arithmetic is compared
        low = Reference(model_type, conversion.source.path, dtype, device)
        exact.round_weights(dtype)
    model, results = load(), []

    def pictures() -> list[torch.Tensor]:
        opened = [open_photo(file) for file in photos]
        return real_images(opened, conversion.processor, side_unit(model), fixed_size(model))

    for name, images in comparison_packs(model, photos=pictures):
        step(f"transformers' model: {name}")
        row = compare(name, images, model, exact, low, THRESHOLDS[dtype])
        numbers = (row.tokens, row.min_cosine, row.mean_cosine, row.max_difference)
        results.append(TestResult(f"against transformers, {name}", row.passed, *numbers))
    return results


@torch.no_grad()
def _probe(model: PackedVisionModel) -> list[Features]:
    """Features of one image of noise."""
    side = fixed_size(model) or snapped(64, model.config.patch_size)
    images = random_images([(side, side)], model.config.num_channels)
    rows, grid = batch_images_to_packing_input(
        images,
        model.config.patch_size,
        model.patch_layout,
        num_channels=model.config.num_channels,
        device=model.device,
        dtype=model.dtype,
        frames_per_patch=model.frames_per_patch,
    )
    return [(model(rows, grid).float().cpu(), None)]
