"""The steps of a conversion: read, check, write to a temporary folder, verify, rename."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
import transformers

from .. import __version__
from ..checkpoint.hashing import tensor_digest
from ..checkpoint.pretrained import StrictPreTrainedModel
from ..models.llava_vit.key_map import SOURCE_TYPE
from ..models.llava_vit.packed import LlavaViTPackingModel
from ..models.llava_vit.standard import LlavaViTModel
from ..utils.device import resolve_device as resolve_device
from ..utils.errors import DISK_FULL
from ..utils.files import check_target, open_to_others, put, user_path, write_json
from ..utils.scratch import content_of, scratch_beside, stays
from .plan import STANDARD_MODELS, Conversion, WriteReport, plan_conversion, write_conversion
from .sources import Source, read_source
from .test_images import Photographer, find_photos
from .verify import TEST_NAMES, THRESHOLDS, CannotLoad, TestResult, verify
from .verify_against_hf import verify_family

REPORT_NAME = "conversion.json"
LLAVA_VIT = (SOURCE_TYPE, "llava_vit_packing", *STANDARD_MODELS)


class NotWritten(OSError):
    """The disk refused the result: nothing is wrong with what the user gave."""


@dataclass
class Options:
    """What the user asked for; see ``llava-packing convert --help``."""

    model_name: str | None = None
    target_model_name: str | None = None
    dtype: str = "keep"
    device: str = "auto"
    verify: bool = True
    images: str | None = None
    fields: Mapping[str, object] = field(default_factory=dict)


@dataclass
class Progress:
    """Callbacks for a progress display; all optional."""

    planned: Callable[[Conversion], None] = lambda conversion: None
    written: Callable[[int], None] = lambda nbytes: None
    step: Callable[[str], None] = lambda what: None


def any_failed(results: list[TestResult]) -> bool:
    """Whether a test that was run did not pass."""
    return any(result.passed is False for result in results)


@dataclass
class Outcome:
    """What came of a conversion. ``folder`` is the output, or where it was moved if a test failed."""

    conversion: Conversion
    folder: Path
    report: WriteReport
    results: list[TestResult]
    verify_seconds: float = 0.0

    @property
    def passed(self) -> bool:
        return not any_failed(self.results)


def default_output(conversion: Conversion) -> Path:
    """Beside the source: ``<stem>_packing``, ``<stem>_hf_packing`` for a training file, ``<stem>_standard`` back."""
    source = conversion.source
    local = user_path(source.name)
    if local.exists():
        local = local.resolve()
        parent, stem = local.parent, local.name if local.is_dir() else local.stem
    else:
        parent, stem = Path.cwd(), source.name.rsplit("/", 1)[-1]
    if issubclass(conversion.model_class, LlavaViTModel):
        return parent / f"{stem}_standard"
    return parent / (f"{stem}_hf_packing" if source.kind == SOURCE_TYPE else f"{stem}_packing")


def check_output(folder: Path) -> Path:
    """Raises ``ValueError`` unless the output folder is free: it must not exist, or be empty."""
    folder = user_path(folder).absolute()
    if folder.is_dir():
        folder = Path(os.path.realpath(folder))
        if content_of(folder):
            raise ValueError(
                f"the output folder {folder} exists and is not empty: remove it or choose another --output_dir"
            )
    elif folder.exists() or folder.is_symlink():
        raise ValueError(f"the output {folder} exists and is not a folder: choose another --output_dir")
    check_target(folder, is_folder=True)
    return folder


@contextmanager
def aside(folder: Path) -> Iterator[Path]:
    """A scratch folder beside ``folder``, on the same disk; gone afterwards unless it was renamed.

    Raises :class:`NotWritten` that names ``folder`` for what the disk refuses; folders made on the way to it go again.
    """
    made = [parent for parent in folder.parents if not parent.exists()]
    scratch = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with scratch_beside(folder, alone=True) as scratch:
            yield scratch
    except BlockingIOError as error:
        raise ValueError(str(error)) from error
    except OSError as error:
        reason = str(error) if scratch else error.strerror
        if error.errno in DISK_FULL:
            reason = f"the disk is full ({shutil.disk_usage(folder.parent).free / 1e6:.0f} MB free): {reason}"
        raise NotWritten(f"{folder} was not written: {reason}") from error
    finally:
        for parent in made:
            with suppress(OSError):  # not empty: the output is in it
                parent.rmdir()


def check_room(folder: Path, nbytes: int, verify: bool) -> None:
    """Raises ``OSError`` unless the disk that ``folder`` is on has room for the result, and a second one to verify."""
    free, needed = shutil.disk_usage(folder).free, nbytes * (2 if verify else 1)
    if needed > free:
        twice = " (the result, and a temporary copy for the verification)" if verify else ""
        raise OSError(f"it needs {needed / 1e6:.1f} MB{twice}, the disk has {free / 1e6:.1f} MB free")


def failed_name(folder: Path) -> Path:
    """``<folder>.failed``, or the first ``<folder>.<n>.failed`` that is free; in the folder where that stays."""
    place, number = folder if stays(folder) else folder.parent, 1
    candidate = place / f"{folder.name}.failed"
    while candidate.exists():
        number += 1
        candidate = place / f"{folder.name}.{number}.failed"
    return candidate


def convert(name: str, output: str | None, options: Options, progress: Progress | None = None) -> Outcome:
    """Convert a checkpoint.

    Args:
        name: folder, hub id or weight file.
        output: folder to write, None for the default beside the source.
        options, progress: see there.

    Returns:
        The outcome. If a test failed, the folder was moved to ``*.failed`` and ``passed`` is False.

    Raises:
        ValueError, OSError: nothing was written; :class:`NotWritten` if that is the disk's fault.
    """
    progress = progress or Progress()
    device = resolve_device(options.device)
    source = read_source(name, options.model_name, options.fields)
    conversion = plan_conversion(source, options.target_model_name, options.dtype)
    folder = check_output(Path(output) if output else default_output(conversion))
    photos = find_photos(options.images) if options.verify else []
    progress.planned(conversion)
    with aside(folder) as scratch:
        check_room(scratch, conversion.nbytes, options.verify)
        result = scratch / folder.name
        result.mkdir()
        report = write_conversion(conversion, result, progress.written)
        started = time.perf_counter()
        results = verify_conversion(conversion, result, device, photos, progress.step) if options.verify else []
        write_json(_report(conversion, report, results), result / REPORT_NAME)
        final = failed_name(folder) if any_failed(results) else folder
        open_to_others(result)
        put(result, final)
    return Outcome(conversion, final, report, results, time.perf_counter() - started)


def _report(conversion: Conversion, report: WriteReport, results: list[TestResult]) -> dict:
    return {
        "source": conversion.source.path.name,
        "source_kind": conversion.source.kind,
        "dtype": str(conversion.dtype).removeprefix("torch."),
        "tensors": len(conversion.specs),
        "bytes": report.nbytes,
        "seconds": round(report.seconds, 3),
        "left_out": {**conversion.source.ignored, **conversion.plan.dropped},
        "verification": [asdict(result) for result in results],
        "versions": {
            "llava_packing_tower": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


# -------------------------------------------------------------------- verification of what was written


def load_as(cls: type[StrictPreTrainedModel], source: Source, dtype: torch.dtype, device: torch.device):
    """A source, of whatever kind, as a model of this class."""
    config, plan = cls.plan(source.raw, source.files.shapes(), None, source.path)
    return cls.from_weights(config, plan, source.files, dtype, device)


def verify_conversion(
    conversion: Conversion,
    folder: Path,
    device: torch.device,
    photos: list[Path],
    step: Callable[[str], None] = lambda what: None,
) -> list[TestResult]:
    """The tests of what lies in ``folder``, which ``conversion`` was written to."""
    cls, dtype, source = conversion.model_class, conversion.dtype, conversion.source
    step("digests of the converted tensors")
    expected = {name: tensor_digest(conversion.tensor(name)) for name in conversion.specs}
    if source.kind not in LLAVA_VIT:
        return verify_family(conversion, folder, device, expected, photos, step)
    backwards = issubclass(cls, LlavaViTModel)
    original = LlavaViTPackingModel if backwards else LlavaViTModel
    from_source = partial(load_as, original, source, dtype, device)
    from_result = partial(cls.from_pretrained, folder, dtype=dtype, device=device)

    def photographer(model: StrictPreTrainedModel) -> Photographer:
        return Photographer(photos, conversion.processor, model.config.patch_size, model.config.num_channels)

    try:
        return verify(
            from_result if backwards else from_source,
            from_source if backwards else from_result,
            photographer,
            subject="standard" if backwards else "packed",
            expected=expected,
            scratch=folder.parent,
            step=step,
        )
    except CannotLoad as error:
        return [TestResult(name, False, note=f"cannot be loaded: {error}") for name in TEST_NAMES]


def verify_pair(
    left: str,
    right: str,
    options: Options,
    step: Callable[[str], None] = lambda what: None,
) -> tuple[list[TestResult], float]:
    """Compare two existing LlavaViT checkpoints of any kinds; the second is checked against the first.

    One of them runs as the standard model, the other packed: a packing checkpoint packs, the other kinds do not, and
    of two of the same kind the second packs.

    Returns:
        The five results, and the cosine that they had to exceed.

    Raises:
        ValueError, OSError: one cannot be read or loaded, or is not a LlavaViT checkpoint.
    """
    device, photos = resolve_device(options.device), find_photos(options.images)
    first, second = (read_source(name, options.model_name, options.fields) for name in (left, right))
    for source in (first, second):
        if source.kind not in LLAVA_VIT:
            raise ValueError(
                f"{source.name} is a {source.kind} checkpoint; verify compares LlavaViT checkpoints "
                f"({', '.join(LLAVA_VIT)}), `llava-packing align` the other families with transformers' models"
            )
    dtype = _common_dtype(options.dtype, [first, second])
    swap = first.kind == "llava_vit_packing" and second.kind != "llava_vit_packing"
    standard, packed = (second, first) if swap else (first, second)

    def photographer(model: StrictPreTrainedModel) -> Photographer:
        processor = LlavaViTPackingModel.load_image_processor(second.path, model.config)
        return Photographer(photos, processor, model.config.patch_size, model.config.num_channels)

    results = verify(
        partial(load_as, LlavaViTModel, standard, dtype, device),
        partial(load_as, LlavaViTPackingModel, packed, dtype, device),
        photographer,
        subject="standard" if swap else "packed",
        step=step,
    )
    return results, THRESHOLDS[dtype]


def _common_dtype(name: str, sources: list[Source]) -> torch.dtype:
    """float32 if both checkpoints are, else the (first) narrower dtype of the two, if nothing was asked for."""
    if name != "keep":
        return getattr(torch, name)
    found = [dtype for source in sources for dtype in source.files.dtypes().values()]
    return next((getattr(torch, dtype) for dtype in found if dtype in ("bfloat16", "float16")), torch.float32)
