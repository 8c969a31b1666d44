"""The packed encoders: a family is one file here and one line in :mod:`registry`.

The names below are what a family in a package of your own builds on; each is imported when it is first used.
"""

from __future__ import annotations

from importlib import import_module

_PUBLIC = {
    "BlockConfig": "layers",
    "LearnedTable": "position_tables",
    "PackedEncoder": "encoder",
    "PackedVisionModel": "base",
    "family_for": "registry",
    "register_family": "registry",
    "stretched": "base",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_PUBLIC[name]}", __name__), name)
