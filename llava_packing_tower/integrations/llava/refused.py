"""Programs of the hosts that do not work with this package: refused with the reason, before they fail less clearly."""

from __future__ import annotations

from types import ModuleType

from ...utils.files import user_path
from ...utils.import_hooks import ImportHooks
from .host import Host
from .registry import all_hosts


def refused(target: str) -> str | None:
    """Why a module (``llava.train.train_dpo``) or a script (``.../llava/train/train_dpo.py``) is refused, or None."""
    is_script = target.endswith(".py")
    parts = list(user_path(target).resolve().with_suffix("").parts) if is_script else target.split(".")
    for host in all_hosts():
        for module, why in host.refused:
            words = host.module(module).split(".")
            if (parts[-len(words) :] if is_script else parts) == words:
                return why
    return None


def install(host: Host, hooks: ImportHooks) -> None:
    """Have the import of a refused module of a host raise ``ImportError`` with the reason."""
    for module, why in host.refused:
        name = host.module(module)

        def refuse(_: ModuleType, name: str = name, why: str = why) -> None:
            raise ImportError(f"{name}: {why}", name=name)

        hooks.before(name, refuse)
