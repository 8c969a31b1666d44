"""What the plugin adds to a host's command-line arguments, so that one YAML means the same on every host."""

from __future__ import annotations

import dataclasses
from types import ModuleType
from typing import Optional

from .arguments_table import PLUGIN_ARGUMENTS
from .host import GROUPS
from .patcher import Patches

# HfArgumentParser of transformers 4.40 does not read `str | None` on Python 3.10.
_TYPES = {
    "bool": bool,
    "str": str,
    "Optional[str]": Optional[str],  # noqa: UP045
    "Optional[bool]": Optional[bool],  # noqa: UP045
    "Optional[int]": Optional[int],  # noqa: UP045
    "Optional[float]": Optional[float],  # noqa: UP045
}
_ADDED = "_llava_packing_added"
_current: dict[str, object] = {}


def extend(train: ModuleType, patches: Patches) -> None:
    """Replace the argument dataclasses of a host's ``train.train`` by subclasses that have the plugin's fields too."""
    # In whichever group: Open-LLaVA-NeXT has unfreeze_mm_vision_tower among those of the training.
    present = {f.name for group in GROUPS for f in dataclasses.fields(getattr(train, group))}
    for group in GROUPS:
        original = getattr(train, group)
        missing = [a for a in PLUGIN_ARGUMENTS if a.group == group and a.name not in present]
        fields = [
            (a.name, _TYPES[a.annotation], dataclasses.field(default=a.default, metadata={"help": a.help}))
            for a in missing
        ]
        namespace: dict[str, object] = {_ADDED: frozenset(a.name for a in missing)}

        def __post_init__(self, _base=original, _group=group):
            if hasattr(_base, "__post_init__"):
                _base.__post_init__(self)
            _current[_group] = self

        namespace["__post_init__"] = __post_init__
        extended = dataclasses.make_dataclass(group, fields, bases=(original,), namespace=namespace)
        # transformers pickles the training arguments by the name of their class.
        extended.__module__, extended.__qualname__ = original.__module__, original.__qualname__
        extended.__doc__ = original.__doc__
        patches.set(train, group, extended)
    patches.on_undo(_current.clear)


def current_training_arguments() -> object | None:
    """The TrainingArguments that the host parsed last in this process."""
    return _current.get("TrainingArguments")


def current_arguments(group: str) -> object | None:
    """The arguments of this dataclass that the host parsed last in this process."""
    return _current.get(group)


def host_lacks(train: ModuleType, name: str) -> bool:
    """Whether the host itself does not know an argument, so that the plugin has to carry it out."""
    return any(name in getattr(getattr(train, group), _ADDED, ()) for group in GROUPS)
