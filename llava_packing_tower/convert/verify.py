"""Verifies that the packing model computes the same as the standard one: five tests on photographs.

The standard model sees one sample at a time, videos inside a clip of 64 frames; the packing model sees the same samples
packed, videos with interpolated frame positions. One model is in memory at a time.
"""

from __future__ import annotations

import gc
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional as F

from ..checkpoint.hashing import differing, tensor_digest
from ..checkpoint.pretrained import StrictPreTrainedModel
from ..data.patches import batch_images_to_packing_input, split_packed
from ..data.positions import compute_patch_positions_with_interpolated_temporal
from ..models.llava_vit.packed import LlavaViTPackingModel
from ..models.llava_vit.standard import LlavaViTModel
from ..models.llava_vit.standard_positions import clip_in_context
from .test_images import CONTEXT, Photographer, Sample

THRESHOLDS = {torch.float64: 0.99999, torch.float32: 0.99999, torch.bfloat16: 0.99, torch.float16: 0.99}
TEST_NAMES = (
    "1 single image 448",
    "2 video, 8 frames 224",
    "3 video and image, one pack",
    "4 three images, two videos, one pack",
    "5 save, reload, bit-equal",
)
RELOAD = TEST_NAMES[-1]
STEPS = 15
"""How often :func:`verify` reports a step: two models loaded, seven samples, four packs, reloading."""
Features = tuple[torch.Tensor, torch.Tensor | None]
"""What a model says of one sample, float32 on the CPU: tokens ``[n, hidden]`` and the pooled vector ``[hidden]``."""


@dataclass(frozen=True)
class TestResult:
    """One row of the table. ``passed`` is None for a comparison that there is nothing to make with; numbers are None
    where a test compares bits, or could not run."""

    name: str
    passed: bool | None
    vectors: int | None = None
    min_cosine: float | None = None
    mean_cosine: float | None = None
    max_difference: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Case:
    """One of the first four tests: samples that are encoded in one pack."""

    name: str
    samples: tuple[Sample, ...]


def make_cases(photos: Photographer) -> list[Case]:
    """The four packs; sides in pixels are rounded down to whole patches."""
    image, video = photos.image(0, 448), photos.clip(1, 224, 8)
    many = (
        photos.image(2, 224),
        photos.clip(3, 378, 3),
        photos.image(4, 336),
        photos.clip(0, 518, 2),
        photos.image(1, 1008),
    )
    packs = ((image,), (video,), (video, image), many)
    return [Case(name, pack) for name, pack in zip(TEST_NAMES[:4], packs, strict=True)]


# -------------------------------------------------------------------- running the two models


def sample_positions(sample: Sample, patch_size: int) -> torch.Tensor:
    """(frame in the context, row, column) of every patch, ``[n, 3]``."""
    rows, columns = (side // patch_size for side in sample.pixels.shape[-2:])
    return compute_patch_positions_with_interpolated_temporal(sample.frame_indices[None], rows, columns)


@torch.no_grad()
def standard_features(model: LlavaViTModel, sample: Sample) -> Features:
    """One sample through the standard model."""
    pixels = sample.pixels.unsqueeze(0).to(device=model.device, dtype=model.dtype)
    context = getattr(model.config, "rope_temporal_size", None) or CONTEXT
    if pixels.shape[2] == 1:
        out = model(pixels.squeeze(2))
    elif context < CONTEXT:  # a OneVision model with a shorter context is told the positions themselves
        out = model(pixels, patch_positions=sample_positions(sample, model.config.patch_size)[None])
    else:
        clip, visible = clip_in_context(pixels, sample.frame_indices[None], model.config.patch_size, CONTEXT)
        out = model(clip, visible_indices=visible)
    pooled = None if out.pooler_output is None else out.pooler_output[0].float().cpu()
    return out.last_hidden_state[0].float().cpu(), pooled


@torch.no_grad()
def packed_features(model: LlavaViTPackingModel, samples: Sequence[Sample]) -> list[Features]:
    """All samples through the packing model, in one pack."""
    hidden_states, grid_thw = batch_images_to_packing_input(
        [sample.pixels for sample in samples],
        model.config.patch_size,
        model.patch_layout,
        num_channels=model.config.num_channels,
        device=model.device,
        dtype=model.dtype,
    )
    grids = grid_thw.tolist()
    positions = torch.cat([sample_positions(sample, model.config.patch_size) for sample in samples])
    out = model(hidden_states, grid_thw, patch_positions=positions)
    tokens = split_packed(out.last_hidden_state.float().cpu(), grids)
    pooled = [None] * len(grids) if out.pooler_output is None else list(out.pooler_output.float().cpu())
    return list(zip(tokens, pooled))


def compare(name: str, expected: Sequence[Features], found: Sequence[Features], threshold: float) -> TestResult:
    """Cosine of every token and pooled vector; NaN fails."""
    cosines, difference = [], 0.0
    for (tokens, pooled), (other_tokens, other_pooled) in zip(expected, found, strict=True):
        if (pooled is None) != (other_pooled is None) or tokens.shape != other_tokens.shape:
            return TestResult(
                name, False, note=f"different outputs: {list(tokens.shape)} and {list(other_tokens.shape)}"
            )
        pairs = [(tokens, other_tokens)] + ([] if pooled is None else [(pooled[None], other_pooled[None])])
        for left, right in pairs:
            cosines.append(F.cosine_similarity(left.double(), right.double(), dim=-1, eps=1e-12))
            worst = (left - right).abs().max().item()
            difference = math.nan if math.isnan(worst) or math.isnan(difference) else max(difference, worst)
    cosine = torch.cat(cosines)
    least = cosine.min().item()
    passed = least > threshold and not math.isnan(difference)
    return TestResult(name, passed, len(cosine), least, cosine.mean().item(), difference)


# -------------------------------------------------------------------- the five tests

Loader = Callable[[], StrictPreTrainedModel]


def _drop() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def reload_test(
    load: Loader,
    probe: Callable[[StrictPreTrainedModel], list[Features]],
    scratch: Path | None = None,
    expected: Mapping[str, str] | None = None,
) -> TestResult:
    """Test 5: the tensors in the file are the expected ones, and saving and loading again changes no bit.

    Args:
        load: loads the checkpoint in question.
        probe: some features of a model, which must be the same before and after.
        scratch: where to save for a moment; the system's temporary folder if None.
        expected: digests (``digest.tensor_digest``) of the tensors that the checkpoint must hold, if they are known.
    """
    with tempfile.TemporaryDirectory(dir=scratch, prefix=".reload.") as folder:
        model = load()
        before = {name: tensor_digest(tensor) for name, tensor in model.state_dict().items()}
        if expected is not None and (wrong := differing(before, expected)):
            return TestResult(
                RELOAD, False, note=f"{len(wrong)} tensors on disk differ from the converted ones, e.g. {wrong[0]}"
            )
        features, kind, dtype, device = probe(model), type(model), model.dtype, model.device
        model.save_pretrained(Path(folder) / "saved")
        del model
        _drop()
        try:
            again = kind.from_pretrained(Path(folder) / "saved", dtype=dtype, device=device)
        except (ValueError, OSError) as error:
            return TestResult(RELOAD, False, note=f"cannot be loaded again: {error}")
        after = {name: tensor_digest(tensor) for name, tensor in again.state_dict().items()}
        if wrong := differing(before, after):
            return TestResult(RELOAD, False, note=f"{len(wrong)} tensors changed, e.g. {wrong[0]}")
        row = compare(RELOAD, features, probe(again), 0.0)
        return replace(row, passed=row.max_difference == 0, note=f"{len(after)} tensors")


def verify(
    load_standard: Loader,
    load_packed: Loader,
    photos: Callable[[StrictPreTrainedModel], Photographer],
    *,
    subject: str = "packed",
    expected: Mapping[str, str] | None = None,
    scratch: Path | None = None,
    step: Callable[[str], None] = lambda what: None,
) -> list[TestResult]:
    """Run the five tests.

    Args:
        load_standard, load_packed: load the two models, in the same dtype, on the same device.
        photos: makes the photographer for a loaded model.
        subject: which of the two, "standard" or "packed", is the checkpoint in question: it is saved and reloaded.
        expected, scratch: see :func:`reload_test`.
        step: called with a description before each step.

    Returns:
        Five results. A failing one does not keep the others from running.

    Raises:
        CannotLoad: the checkpoint in question cannot be loaded.
        ValueError: the other one cannot.
    """
    loaders = {"standard": load_standard, "packed": load_packed}

    def load(which: str) -> StrictPreTrainedModel:
        step(f"loading the {which} model")
        try:
            return loaders[which]()
        except (ValueError, OSError) as error:
            raise (CannotLoad if which == subject else ValueError)(str(error)) from error

    # TF32 would be the largest difference between the patch convolution of one model and the product of the other.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        return _five_tests(load, photos, subject, expected, scratch, step)


class CannotLoad(ValueError):
    """The checkpoint in question cannot be loaded."""


def _five_tests(
    load: Callable[[str], StrictPreTrainedModel],
    photos: Callable[[StrictPreTrainedModel], Photographer],
    subject: str,
    expected: Mapping[str, str] | None,
    scratch: Path | None,
    step: Callable[[str], None],
) -> list[TestResult]:
    model = load("standard")
    threshold = THRESHOLDS[model.dtype]
    cases, seen = make_cases(photos(model)), {}
    for sample in {id(sample): sample for case in cases for sample in case.samples}.values():
        step(f"standard model: {sample.name}")
        seen[id(sample)] = standard_features(model, sample)
    del model
    _drop()
    model, results = load("packed"), []
    for case in cases:
        step(f"packing model: {case.name}")
        known = [seen[id(sample)] for sample in case.samples]
        row = compare(case.name, known, packed_features(model, case.samples), threshold)
        results.append(row if row.note else replace(row, note=", ".join(sample.name for sample in case.samples)))
    del model
    _drop()
    step(RELOAD)
    return [*results, reload_test(lambda: load(subject), partial(_one, cases[0].samples[0]), scratch, expected)]


def _one(sample: Sample, model: StrictPreTrainedModel) -> list[Features]:
    """One sample through either model."""
    packs = isinstance(model, LlavaViTPackingModel)
    return packed_features(model, [sample]) if packs else [standard_features(model, sample)]
