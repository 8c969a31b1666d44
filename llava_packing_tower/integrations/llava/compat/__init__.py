"""Compat patches: defects of LLaVA, and of the libraries under it, that stop training, saving or reloading, or slow
them down many times, and what is done about each.

A compat patch is one function in one of PATCH_MODULES. It says when it is due (before or after a module is imported),
how its defect is detected, and why. It is applied only where the defect is detected, logged once, and switched off by
name:
``LLAVA_PACKING_DISABLE_PATCHES=cuda_sync,inner_loop``.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

from ....utils import environment
from ....utils.import_hooks import ImportHooks
from ..host import Host
from ..patcher import Patches

logger = logging.getLogger(__name__)

DISABLE_ENV = environment.DISABLE_PATCHES
PATCH_MODULES = (
    "transformers_imports",
    "llava",
    "trainer",
    "dpo",
    "models",
    "deepspeed",
    "torch_load",
    "fsdp",
    "cudnn_sdpa",
)


@dataclass(frozen=True)
class CompatPatch:
    """``module`` is where it looks: a library, or one of the words of :meth:`..host.Host.modules` for a module of the
    host, like ``{arch}``; ``defect(module)`` says whether the
    defect is there; ``apply(module, patches)`` removes it."""

    name: str
    module: str
    reason: str
    issue: str | None
    defect: Callable[[ModuleType], bool]
    apply: Callable[[ModuleType, Patches], None]
    before: bool = False


COMPAT_PATCHES: dict[str, CompatPatch] = {}
_applied: dict[str, CompatPatch] = {}
_left: dict[str, CompatPatch] = {}
_watched: set[str] = set()  # patches of libraries that wait for their library


def compat_patch(
    *, module: str, reason: str, defect: Callable[[ModuleType], bool], issue: str | None = None, before: bool = False
) -> Callable:
    """Register a function ``(module, patches) -> None`` as the compat patch of its own name.

    Raises ``ValueError`` if there is one of that name.
    """

    def enter(function: Callable[[ModuleType, Patches], None]) -> Callable:
        if function.__name__ in COMPAT_PATCHES:
            raise ValueError(f"two compat patches are called {function.__name__}")
        COMPAT_PATCHES[function.__name__] = CompatPatch(
            function.__name__, module, reason, issue, defect, function, before
        )
        return function

    return enter


def load_all() -> dict[str, CompatPatch]:
    """Every compat patch by name, in the order of PATCH_MODULES, whichever of them was imported first."""
    for name in PATCH_MODULES:
        import_module(f"{__name__}.{name}")
    order = {f"{__name__}.{name}": place for place, name in enumerate(PATCH_MODULES)}
    return dict(sorted(COMPAT_PATCHES.items(), key=lambda entry: order.get(entry[1].apply.__module__, len(order))))


def disabled() -> frozenset[str]:
    """The patches that are switched off in the environment. Raises ``ValueError`` for a name that no patch has."""
    names = frozenset(name.strip() for name in (environment.read(DISABLE_ENV) or "").split(",") if name.strip())
    for name in sorted(names - load_all().keys()):
        nearest = difflib.get_close_matches(name, COMPAT_PATCHES, n=1, cutoff=0)
        raise ValueError(f"{DISABLE_ENV} names {name!r}, which is not a compat patch; the nearest is {nearest[0]!r}")
    return names


def applied() -> tuple[str, ...]:
    """Names of the compat patches in force in this process, in the order in which they were applied."""
    return tuple(_applied)


def left() -> tuple[str, ...]:
    """Names of the compat patches that were switched off though their defect is there."""
    return tuple(_left)


def install(host: Host, hooks: ImportHooks, patches: Patches) -> None:
    """Have every compat patch applied when it is due, for a host that is about to be imported, or has been."""
    off = disabled()
    for item in load_all().values():

        def act(module: ModuleType, item: CompatPatch = item) -> None:
            if not item.defect(module):
                return
            if item.name in off:
                _left[item.name] = item
                patches.on_undo(lambda: _left.pop(item.name, None))
                return
            item.apply(module, patches)
            if item.name not in _applied:
                _applied[item.name] = item
                patches.on_undo(lambda: _applied.pop(item.name, None))
                issue = f" ({item.issue})" if item.issue else ""
                logger.info("compat patch %s: %s%s", item.name, item.reason, issue)

        name = item.module.format(**host.modules())
        if item.before:
            hooks.before(name, act)
        elif item.module != name:
            for module in [name, *(map(host.module, host.late_models) if item.module == "{models}" else ())]:
                hooks.after(module, act)
        elif item.name not in _watched:  # once, however many hosts there are
            _watched.add(item.name)
            patches.on_undo(lambda item=item: _watched.discard(item.name))
            hooks.after(name, act)
