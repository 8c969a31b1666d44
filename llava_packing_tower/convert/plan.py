"""From a source checkpoint to a folder: which model it becomes, whether every tensor fits, and the writing."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from transformers import PretrainedConfig

from ..checkpoint.pretrained import StrictPreTrainedModel, config_content
from ..checkpoint.weights import (
    WeightPlan,
    describe_problems,
    dtype_problems,
    parameter_shapes,
    plan_problems,
)
from ..data.image_processor import PROCESSOR_NAME, PackingImageProcessor
from ..models.llava_vit.key_map import SOURCE_TYPE
from ..models.llava_vit.packed import LlavaViTPackingModel
from ..models.llava_vit.presets import PACKING, STANDARD, preset
from ..models.llava_vit.standard import LlavaViTModel, OneVisionEncoderModel
from ..models.registry import FAMILIES, family_for
from ..utils.files import CONFIG_NAME, write_json
from .sources import Source, check_preset
from .writer import TensorSpec, write_weights

STANDARD_MODELS = {"llava_vit": LlavaViTModel, "onevision_encoder": OneVisionEncoderModel}


# Fields of a config.json that are no settings of the encoder.
_BOOKKEEPING = {
    "architectures",
    "auto_map",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "vision_config",
    "text_config",
}


class DoesNotFit(ValueError):
    """The tensors of a checkpoint do not fit its config; ``rows`` are (kind, tensor, detail)."""

    def __init__(self, message: str, rows: list[tuple[str, str, str]]) -> None:
        super().__init__(f"{message}: {describe_problems(rows)}")
        self.message, self.rows = message, rows


@dataclass
class Conversion:
    """A conversion that has been checked and can be carried out."""

    source: Source
    model_class: type[StrictPreTrainedModel]
    config: PretrainedConfig
    plan: WeightPlan
    specs: dict[str, TensorSpec]
    processor: PackingImageProcessor
    config_dropped: dict[str, object]

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.specs.values())).dtype

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.specs.values())

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor of the target, made from the source. Raises ``ValueError`` if it holds NaN or infinity."""
        recipe, spec = self.plan.recipes[name], self.specs[name]
        made = recipe.build(*(self.source.files[key] for key in recipe.sources))
        result = made.to(spec.dtype)
        if not result.isfinite().all():
            if made.isfinite().all():
                raise ValueError(f"{name} has values up to {made.abs().max():.3g}, too large for {spec.dtype}")
            count = int((~made.isfinite()).sum())
            names = ", ".join(recipe.sources)
            raise ValueError(
                f"{count} of {made.numel()} numbers of {names} are NaN or infinite: the weights are damaged"
            )
        return result


def target_class(source: Source, target_name: str | None) -> type[StrictPreTrainedModel]:
    """Which model a source becomes. Raises ``ValueError`` if there is nothing to convert, or the name contradicts."""
    kind = source.kind
    if kind == "llava_vit_packing":
        found: type[StrictPreTrainedModel] = LlavaViTModel
    elif kind in (SOURCE_TYPE, *STANDARD_MODELS):
        found = LlavaViTPackingModel
    elif kind in FAMILIES:
        found = family_for(kind)
        if found.config_class.model_type == kind:
            raise ValueError(f"{source.name} is a {kind} checkpoint already: there is nothing to convert")
    else:
        raise ValueError(f"{source.name}: model_type {kind!r} cannot be converted; known: {', '.join(FAMILIES)}")
    if target_name is None:
        return found
    if target_name in STANDARD_MODELS or target_name == "llava_vit_packing":
        wanted = STANDARD_MODELS.get(target_name, LlavaViTPackingModel)
    else:
        form = preset(target_name).form
        if form not in (PACKING, STANDARD):
            raise ValueError(
                f"{target_name} names weights of the training code: checkpoints are not converted to those"
            )
        wanted = LlavaViTPackingModel if form == PACKING else LlavaViTModel
    if wanted is not found and not (issubclass(wanted, LlavaViTModel) and kind in (SOURCE_TYPE, "llava_vit_packing")):
        raise ValueError(
            f"{source.name} is a {kind} checkpoint, which becomes a {found.config_class.model_type} one, "
            f"not {target_name}"
        )
    return wanted


def target_dtype(name: str, source: Source, used: set[str]) -> torch.dtype:
    """The dtype of the output. Raises ``ValueError`` for "keep" where the source mixes dtypes."""
    if name != "keep":
        return getattr(torch, name)
    counts: dict[str, int] = {}
    for key, dtype in source.files.dtypes().items():
        if key in used:
            counts[dtype] = counts.get(dtype, 0) + 1
    if len(counts) != 1:
        mixed = ", ".join(f"{n} tensors {dtype}" for dtype, n in counts.items())
        raise ValueError(f"{source.name} mixes dtypes ({mixed}): choose one with --dtype")
    return getattr(torch, next(iter(counts)))


def plan_conversion(
    source: Source,
    target_name: str | None = None,
    dtype: str = "keep",
    choose: Callable[[Source, str | None], type[StrictPreTrainedModel]] = target_class,
) -> Conversion:
    """Check a conversion without reading a weight.

    Args:
        source: from :func:`sources.read_source`.
        target_name: a named size that the result must have, or a ``model_type``; usually None.
        dtype: ``keep``, ``float32``, ``bfloat16`` ...

    Raises:
        DoesNotFit: tensors missing, unexpected, mis-shaped or not floating-point.
        ValueError: nothing to convert, a contradiction, or a config that cannot be.
    """
    cls, shapes = choose(source, target_name), source.files.shapes()
    config, plan = cls.plan(cls.with_values(source.raw, source.files), shapes, None, source.path)
    targets = parameter_shapes(cls.without_values(config, torch.float32, source.path))
    fields = config.to_dict()
    if target_name and target_name not in (*STANDARD_MODELS, "llava_vit_packing"):
        check_preset(preset(target_name), fields, source.name)
    used = {key for recipe in plan.recipes.values() for key in recipe.sources}
    dtypes = {key: value for key, value in source.files.dtypes().items() if key in used}
    if rows := plan_problems(plan, shapes, targets) + dtype_problems(dtypes):
        raise DoesNotFit(f"the weights of {source.path} do not fit {cls.__name__} with its config", rows)
    wanted = target_dtype(dtype, source, used)
    dropped = {key: value for key, value in source.raw.items() if key not in fields and key not in _BOOKKEEPING}
    processor = _image_processor(cls, source, config)
    specs = {name: TensorSpec(shape, wanted) for name, shape in targets.items()}
    return Conversion(source, cls, config, plan, specs, processor, dropped)


def _image_processor(
    cls: type[StrictPreTrainedModel], source: Source, config: PretrainedConfig
) -> PackingImageProcessor:
    """That of the source, tried out on a small gray picture. Raises ``ValueError`` for one that does not work."""
    try:
        processor = cls.load_image_processor(source.path, config)
        processor.preprocess(Image.new("RGB", (12, 8), (127, 127, 127)), size={"height": 8, "width": 8}, crop_size=8)
    except (TypeError, ArithmeticError, LookupError, AttributeError, ValueError) as error:
        raise ValueError(f"{source.path}: its {PROCESSOR_NAME} describes no image processor: {error}") from error
    return processor


@dataclass
class WriteReport:
    nbytes: int
    seconds: float
    peak_memory: int
    """Bytes: the largest resident memory of this process so far."""

    @property
    def seconds_per_gb(self) -> float:
        return self.seconds / max(self.nbytes / 1e9, 1e-9)


def peak_memory() -> int:
    """Bytes of the largest resident set of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def write_conversion(
    conversion: Conversion, folder: Path, step: Callable[[int], None] = lambda nbytes: None
) -> WriteReport:
    """Write config, image processor and weights into an existing empty folder; ``step`` is called with the bytes
    written.

    Raises ``ValueError`` for NaN and the like, ``OSError`` if the disk is full.
    """
    started = time.perf_counter()

    def produce(name: str) -> torch.Tensor:
        tensor = conversion.tensor(name)
        step(conversion.specs[name].nbytes)
        return tensor

    nbytes = write_weights(folder, conversion.specs, produce)
    conversion.processor.save_pretrained(folder)
    write_json(config_content(conversion.model_class, conversion.config, conversion.dtype), folder / CONFIG_NAME)
    return WriteReport(nbytes, time.perf_counter() - started, peak_memory())
