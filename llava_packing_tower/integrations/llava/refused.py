"""Programs of the hosts that do not work with this package, refused by name before they fail in a way of their own."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

from .import_hooks import ImportHooks

REFUSED = {
    "llava.train.train_dpo": "LLaVA-NeXT's train_dpo does not work with a packing tower (and its repository lacks "
    "data_processing, which it imports). Fine-tune with `llava-packing train`; to train by DPO with another tower, "
    "start it without llava-packing",
}


def refused(target: str) -> str | None:
    """Why a module (``llava.train.train_dpo``) or a script (``.../llava/train/train_dpo.py``) is refused, or None."""
    if target in REFUSED:
        return REFUSED[target]
    if target.endswith(".py"):
        parts = Path(target).expanduser().resolve().with_suffix("").parts
        return next((why for name, why in REFUSED.items() if ".".join(parts[-3:]) == name), None)
    return None


def install(package: str, hooks: ImportHooks) -> None:
    """Have the import of a refused module of ``package`` raise ``ImportError`` with the reason."""
    for name, why in REFUSED.items():

        def refuse(_: ModuleType, name: str = name, why: str = why) -> None:
            raise ImportError(f"{name}: {why}", name=name)

        if name.partition(".")[0] == package:
            hooks.before(name, refuse)
