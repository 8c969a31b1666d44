"""Compat patches of the hosts' models, tokenization and loader."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from ..methods import Call, add_step
from ..patcher import Patches
from ..registry import host_of, loader
from ..tower_builder import holders, restore_copies
from . import compat_patch
from .trainer import _source

# ---------------------------------------------------------------- the rotary embedding


def _rope_is_erased(model: ModuleType) -> bool:
    from transformers import PretrainedConfig

    if not isinstance(vars(PretrainedConfig).get("rope_scaling"), property):
        return False
    folder = Path(model.__file__).parent / host_of(model).language_models.rpartition(".")[2]
    files = folder.glob("*.py")
    return any("config.rope_scaling = None" in file.read_text(encoding="utf-8") for file in files)


@compat_patch(
    module="{models}",
    reason="the host sets config.rope_scaling to None for no scaling, which in transformers 5 also erases the base "
    "frequency",
    defect=_rope_is_erased,
)
def rope_scaling_none(model: ModuleType, patches: Patches) -> None:
    from transformers import PretrainedConfig

    original = vars(PretrainedConfig)["rope_scaling"]

    def assign(self, value):
        kept = getattr(self, "rope_parameters", None)
        if value is None and isinstance(kept, dict) and "rope_theta" in kept:
            unscaled = {key: kept[key] for key in ("rope_theta", "partial_rotary_factor") if key in kept}
            value = {**unscaled, "rope_type": "default"}
        original.fset(self, value)

    patches.set(PretrainedConfig, "rope_scaling", property(original.fget, assign))


# ---------------------------------------------------------------- the dtype of the weights


def _host_models(model: ModuleType) -> list[type]:
    from transformers import PreTrainedModel

    owns = host_of(model).owns
    return [
        cls
        for cls in vars(model).values()
        if isinstance(cls, type) and issubclass(cls, PreTrainedModel) and owns(cls.__module__)
    ]


def _none_is_auto(model: ModuleType) -> bool:
    from transformers import PreTrainedModel

    return 'dtype = "auto"' in _source(PreTrainedModel.from_pretrained) and bool(_host_models(model))


@compat_patch(
    module="{models}",
    reason="without bf16 the host loads its model with torch_dtype=None, which is float32 in transformers 4 and the "
    "files' own dtype in 5: without DeepSpeed, which casts, training in float32 fails beside a float32 projector",
    defect=_none_is_auto,
)
def dtype_none(model: ModuleType, patches: Patches) -> None:
    import torch

    for cls in _host_models(model):
        original = cls.from_pretrained.__func__

        @functools.wraps(original)
        def from_pretrained(cls, *args, _original=original, **kwargs):
            if "torch_dtype" in kwargs and kwargs["torch_dtype"] is None and kwargs.get("dtype") is None:
                kwargs["torch_dtype"] = torch.get_default_dtype()
            return _original(cls, *args, **kwargs)

        patches.set(cls, "from_pretrained", classmethod(from_pretrained))


# ---------------------------------------------------------------- tokenization

PREPROCESS = ("preprocess_qwen", "preprocess_llama3")


def _chat_template_returns_a_dict(train: ModuleType) -> bool:
    from transformers import PreTrainedTokenizerBase

    taken = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
    return taken["return_dict"].default is True and any(hasattr(train, name) for name in PREPROCESS)


@functools.cache
def _as_in_transformers_4(cls: type) -> type:
    """A tokenizer class whose apply_chat_template returns a list of ids and that has additional_special_tokens_ids."""

    def apply_chat_template(self, *args, **kwargs):
        return cls.apply_chat_template(self, *args, **{"return_dict": False, **kwargs})

    def ids(self):
        tokens = self.extra_special_tokens or _additional_tokens(self.name_or_path)
        return self.convert_tokens_to_ids([str(token) for token in tokens])

    own = {"apply_chat_template": apply_chat_template, "additional_special_tokens_ids": property(ids)}
    return type(cls.__name__, (cls,), own)


@functools.cache
def _additional_tokens(folder: str) -> tuple[str, ...]:
    """What a tokenizer's own configuration calls additional special tokens.

    Saved by transformers 4.47 to 4.57, it has an empty ``extra_special_tokens`` beside them, and 5.17 reads that alone.
    """
    from transformers.utils import cached_file

    file = cached_file(folder, "tokenizer_config.json", _raise_exceptions_for_missing_entries=False)
    if file is None:
        return ()
    tokens = json.loads(Path(file).read_text(encoding="utf-8")).get("additional_special_tokens") or ()
    return tuple(token["content"] if isinstance(token, dict) else token for token in tokens)


@compat_patch(
    module="{train}",
    reason="the host tokenizes with additional_special_tokens_ids, which transformers 5 removed, and concatenates the "
    "results of apply_chat_template, which are dicts there instead of lists",
    defect=_chat_template_returns_a_dict,
)
def chat_template_ids(train: ModuleType, patches: Patches) -> None:
    for name in PREPROCESS:
        if hasattr(train, name):
            add_step(train, f"train.{name}", "chat_template_ids", _tokenize_as_in_transformers_4, patches)


def _tokenize_as_in_transformers_4(call: Call) -> None:
    tokenizer = call.arguments["tokenizer"] = copy.copy(call.arguments["tokenizer"])
    tokenizer.__class__ = _as_in_transformers_4(type(tokenizer))


# ---------------------------------------------------------------- images


class _SizesAsDicts:
    """An image processor whose sizes are dicts, as in transformers 4, and which is the given one in all else."""

    def __init__(self, processor: object) -> None:
        self._processor = processor

    def __getattr__(self, name: str) -> object:
        from transformers.image_utils import SizeDict

        value = getattr(self._processor, name)
        return dict(value) if isinstance(value, SizeDict) else value


def _size_is_no_dict(mm_utils: ModuleType) -> bool:
    import transformers.image_utils as image_utils

    asks = "isinstance(processor.size, dict)" in _source(vars(mm_utils).get("process_anyres_image"))
    return asks and hasattr(image_utils, "SizeDict") and not issubclass(image_utils.SizeDict, dict)


@compat_patch(
    module="{mm_utils}",
    reason="the host tests whether an image processor's size is a dict, and takes the SizeDict of transformers 5 (CLIP "
    "with anyres) for a pair of numbers",
    defect=_size_is_no_dict,
)
def size_dicts(mm_utils: ModuleType, patches: Patches) -> None:
    host, name = host_of(mm_utils), "process_anyres_image"
    original = vars(mm_utils)[name]

    @functools.wraps(original)
    def process_anyres_image(image, processor, grid_pinpoints):
        return original(image, _SizesAsDicts(processor), grid_pinpoints)

    # Modules that are imported already hold copies, and those that come later make them.
    for holder in holders(host, name, original):
        patches.set(holder, name, process_anyres_image)
    patches.on_undo(lambda: restore_copies(host, name, process_anyres_image, original))


# ---------------------------------------------------------------- the loader


TOWER_AS_HALF = re.compile(r"(vision|image)_tower\.to\(device=[\w\"']+, dtype=torch\.float16\)")


@contextlib.contextmanager
def _tower_stays(tower_class: type) -> Iterator[None]:
    """Within it, `tower.to(device=..., dtype=torch.float16)` does nothing for our towers."""
    import torch

    to = tower_class.to

    def stay(self, *args, **kwargs):
        if not args and kwargs.keys() == {"device", "dtype"} and kwargs["dtype"] is torch.float16:
            return self
        return to(self, *args, **kwargs)

    tower_class.to = stay
    try:
        yield
    finally:
        if tower_class.__dict__.get("to") is stay:
            del tower_class.to


@compat_patch(
    module="{loader}",
    reason="unless device_map is 'auto', the loader moves the tower to the first GPU as float16, whatever the device "
    "and dtype of the model: this fails without CUDA and rounds a bfloat16 tower",
    defect=lambda builder: 'vision_tower.to(device="cuda", dtype=torch.float16)' in _source(loader(builder)),
)
def tower_half(builder: ModuleType, patches: Patches) -> None:
    # Only here: `import builder_patch` must stay cheap.
    from ....towers.packing_tower import HEVCViTPackingVisionTower

    def beside_projector(call: Call) -> Iterator[None]:
        with _tower_stays(HEVCViTPackingVisionTower):
            yield
        model = call.result[1]
        tower = getattr(model, "get_vision_tower", lambda: None)()
        if isinstance(tower, HEVCViTPackingVisionTower):
            # A frozen tower may have come from its own folder, in that folder's dtype.
            projector = next(model.get_model().mm_projector.parameters(), None)
            if projector is not None and not projector.is_meta:
                tower.to(device=projector.device, dtype=projector.dtype)

    add_step(
        builder, "builder.load_pretrained_model", "tower_half", beside_projector, patches, loader(builder).__name__
    )
