"""Defects of LLaVA, and of the libraries under it, that stop training, saving or reloading, or slow them down many
times; and their mends.

A mend is one function in one of MEND_MODULES. It says when it is due (before or after a module is imported), how its
defect is detected, and why. It is applied only where the defect is detected, logged once, and switched off by name:
``LLAVA_PACKING_DISABLE_PATCHES=cuda_sync,inner_loop``.
"""

from __future__ import annotations

import difflib
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

from ....utils import environment
from ..import_hooks import ImportHooks
from ..patcher import Patches

logger = logging.getLogger(__name__)

DISABLE_ENV = environment.DISABLE_PATCHES
MEND_MODULES = ("transformers_imports", "llava", "trainer", "models", "deepspeed", "torch_load", "fsdp", "cudnn_sdpa")


@dataclass(frozen=True)
class Mend:
    """A mend. ``module`` is where it looks, with ``{package}`` for the host's package; ``defect(module)`` says whether
    the defect is there; ``apply(module, patches)`` mends it."""

    name: str
    module: str
    reason: str
    issue: str | None
    defect: Callable[[ModuleType], bool]
    apply: Callable[[ModuleType, Patches], None]
    before: bool = False


MENDS: dict[str, Mend] = {}
_applied: dict[str, Mend] = {}
_left: dict[str, Mend] = {}
_watched: set[str] = set()  # mends of libraries that wait for their library


def mend(
    *, module: str, reason: str, defect: Callable[[ModuleType], bool], issue: str | None = None, before: bool = False
) -> Callable:
    """Enter a function ``(module, patches) -> None`` as the mend of its own name."""

    def enter(function: Callable[[ModuleType, Patches], None]) -> Callable:
        if function.__name__ in MENDS:
            raise ValueError(f"two mends are called {function.__name__}")
        MENDS[function.__name__] = Mend(function.__name__, module, reason, issue, defect, function, before)
        return function

    return enter


def load_all() -> dict[str, Mend]:
    """Every mend by name."""
    for name in MEND_MODULES:
        import_module(f"{__name__}.{name}")
    return MENDS


def disabled() -> frozenset[str]:
    """The mends switched off in the environment. Raises ``ValueError`` for a name that no mend has."""
    names = frozenset(name.strip() for name in (environment.read(DISABLE_ENV) or "").split(",") if name.strip())
    for name in sorted(names - load_all().keys()):
        nearest = difflib.get_close_matches(name, MENDS, n=1, cutoff=0)
        raise ValueError(f"{DISABLE_ENV} names {name!r}, which is no mend; the nearest is {nearest[0]!r}")
    return names


def applied() -> tuple[str, ...]:
    """Names of the mends in force in this process, in the order in which they were applied."""
    return tuple(_applied)


def left() -> tuple[str, ...]:
    """Names of the mends that were switched off though their defect is there."""
    return tuple(_left)


def install(package: str, hooks: ImportHooks, patches: Patches) -> None:
    """Have every mend applied when it is due, for the LLaVA in ``package``."""
    off = disabled()
    for item in load_all().values():

        def act(module: ModuleType, item: Mend = item) -> None:
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
                logger.info("mend %s: %s%s", item.name, item.reason, issue)

        name = item.module.format(package=package)
        if item.before:
            hooks.before(name, act)
        elif item.module != name:
            hooks.after(name, act)
        elif name in sys.modules and package not in sys.modules:
            # A library that is loaded already: mended when its user, the first host, comes, not before.
            hooks.before(package, lambda _, act=act, item=item: item.name in _applied or act(sys.modules[item.module]))
        elif item.name not in _watched:  # once, however many hosts there are
            _watched.add(item.name)
            patches.on_undo(lambda item=item: _watched.discard(item.name))
            hooks.after(name, act)
