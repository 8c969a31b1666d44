"""What the plugin adds to a host's command-line arguments, so that one YAML means the same on every host."""

from __future__ import annotations

import dataclasses
from types import ModuleType
from typing import Any, NamedTuple, Optional

from .patches import Patches


class PluginArgument(NamedTuple):
    """An argument that hosts may lack: it is added to dataclass ``group`` of those that do."""

    name: str
    group: str
    type: type
    default: Any
    help: str


PLUGIN_ARGUMENTS: tuple[PluginArgument, ...] = (
    PluginArgument(
        "mm_tunable_parts",
        "ModelArguments",
        Optional[str],  # noqa: UP045  HfArgumentParser of transformers 4.40 does not read str | None on Python 3.10
        None,
        "what is trained: any of mm_vision_tower, mm_mlp_adapter, mm_vision_resampler, mm_language_model, "
        "joined by commas",
    ),
    PluginArgument("unfreeze_mm_vision_tower", "ModelArguments", bool, False, "train the vision tower too"),
    PluginArgument(
        "mm_packing_attention",
        "ModelArguments",
        str,
        "auto",
        "attention backend of a packing tower: auto, flash_attention_2, torch_varlen, sdpa or eager",
    ),
    PluginArgument(
        "mm_vision_tower_lr",
        "TrainingArguments",
        Optional[float],  # noqa: UP045
        None,
        "learning rate of the vision tower, where it differs from learning_rate",
    ),
    PluginArgument(
        "attn_implementation",
        "TrainingArguments",
        Optional[str],  # noqa: UP045
        None,
        "attention of the language model: flash_attention_2, sdpa or eager",
    ),
)

_ADDED = "_llava_packing_added"
_current: dict[str, object] = {}


def extend(train: ModuleType, patches: Patches) -> None:
    """Replace the argument dataclasses of a host's ``train.train`` by subclasses that have the plugin's fields too."""
    for group in ("ModelArguments", "TrainingArguments"):
        original = getattr(train, group)
        present = {f.name for f in dataclasses.fields(original)}
        missing = [a for a in PLUGIN_ARGUMENTS if a.group == group and a.name not in present]
        fields = [(a.name, a.type, dataclasses.field(default=a.default, metadata={"help": a.help})) for a in missing]
        namespace: dict[str, object] = {_ADDED: frozenset(a.name for a in missing)}
        if group == "TrainingArguments":

            def __post_init__(self, _base=original):
                _base.__post_init__(self)
                _current["training"] = self

            namespace["__post_init__"] = __post_init__
        extended = dataclasses.make_dataclass(group, fields, bases=(original,), namespace=namespace)
        # transformers pickles the training arguments by the name of their class.
        extended.__module__, extended.__qualname__ = original.__module__, original.__qualname__
        extended.__doc__ = original.__doc__
        patches.set(train, group, extended)
    patches.on_undo(_current.clear)


def current_training_arguments() -> object | None:
    """The TrainingArguments that the host parsed last in this process."""
    return _current.get("training")


def host_lacks(train: ModuleType, name: str) -> bool:
    """Whether the host itself does not know an argument, so that the plugin has to carry it out."""
    return any(name in getattr(getattr(train, group), _ADDED, ()) for group in ("ModelArguments", "TrainingArguments"))
