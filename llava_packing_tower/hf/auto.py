"""Makes transformers' Auto classes know ``llava_packing``, whichever of the two packages is imported first."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Protocol

OLDEST = (4, 57)
"""The oldest transformers that the classes are made for; in an older one nothing is registered."""
PLACES = {
    "configuration_auto": "configuration",
    "image_processing_auto": "image_processing",
    "processing_auto": "processing",
    "modeling_auto": "modeling",
}
"""Module of ``transformers.models.auto`` -> the module here that registers itself there when it is imported."""


class Hooks(Protocol):
    def install(self) -> None: ...

    def after(self, name: str, callback: Callable[[ModuleType], None]) -> None: ...


def install(hooks: Hooks) -> None:
    """Import each of :data:`PLACES` as soon as its counterpart has been imported; nothing is imported before that."""
    hooks.install()
    for place, module in PLACES.items():
        hooks.after(f"transformers.models.auto.{place}", lambda _, module=module: _register(module))


def _register(module: str) -> None:
    if is_supported(sys.modules["transformers"].__version__):
        import_module(f".{module}", __package__)


def is_supported(version: str) -> bool:
    """Whether a version of transformers is one that the classes are made for."""
    return tuple(int(part) for part in version.split(".")[:2]) >= OLDEST
