"""Which vision tower LLaVA builds: our rule first, LLaVA's own function for every other name."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

from ...towers.names import random_clip, tower_kind
from .import_hooks import ImportHooks
from .patcher import Patches

# What tower_names.tower_kind calls them, module and class of the tower.
TOWERS: tuple[tuple[str, str, str], ...] = (
    ("packing", "llava_packing_tower.towers.packing_tower", "HEVCViTPackingVisionTower"),
    ("hevc_vit", "llava_packing_tower.towers.standard_tower", "HEVCViTVisionTower"),
)
FUNCTION = "build_vision_tower"
_MARK = "_llava_packing_original"


def tower_class(name: object, note: Mapping | None = None) -> type | None:
    """The tower class for a vision tower name, or None where LLaVA is to decide: see :mod:`..tower_names`.

    note: ``mm_packing_config`` of the LLaVA checkpoint that names it, if there is one.

    Raises ``ValueError`` for a name whose tower this version of the package does not have.
    """
    kind = tower_kind(name, note)
    for word, module, cls in TOWERS:
        if word == kind:
            if find_spec(module) is None:
                raise ValueError(
                    f"vision tower {name!r}: its name selects {cls} ({word!r}), which this version does not have. "
                    f"Use a packing checkpoint, with 'packing' in its name or as 'packing:{name}'."
                )
            return getattr(import_module(module), cls)
    return None


def hooked(original: Callable) -> Callable:
    """LLaVA's ``build_vision_tower(vision_tower_cfg, **kwargs)`` with our rule in front."""

    @functools.wraps(original)
    def build_vision_tower(vision_tower_cfg: object, **kwargs: object) -> object:
        # The same two attributes, in the same order, as the function it stands in for.
        name = getattr(vision_tower_cfg, "mm_vision_tower", getattr(vision_tower_cfg, "vision_tower", None))
        saved = getattr(vision_tower_cfg, "mm_packing_config", None)
        cls = tower_class(name, saved)
        if cls is None:
            if reason := random_clip(name):
                raise ValueError(reason)
            return original(vision_tower_cfg, **kwargs)
        if saved and saved.get("weights") == "checkpoint":
            # LLaVA 1.x always asks to delay; these weights can only arrive while its checkpoint loads.
            kwargs["delay_load"] = False
        return cls(name, args=vision_tower_cfg, **kwargs)

    return mark_wrapper(build_vision_tower, original)


def install(package: str, hooks: ImportHooks, patches: Patches) -> None:
    """Hook the tower builder of the LLaVA in ``package``."""
    hook_function(package, "model.multimodal_encoder.builder", FUNCTION, hooked, hooks, patches)
    hooks.surface_failures(f"{package}.model")


def hook_function(
    package: str,
    defined_in: str,
    name: str,
    wrap: Callable[[Callable], Callable],
    hooks: ImportHooks,
    patches: Patches,
) -> None:
    """Wrap a function of the LLaVA in ``package``, and every copy of it that its modules took.

    ``wrap(original)`` makes the wrapper, with the original in its attribute ``_llava_packing_original``.
    """

    def patch(module: ModuleType) -> None:
        function = vars(module).get(name)
        if function is None:
            if module.__name__ != f"{package}.{defined_in}" and name != FUNCTION:
                return  # llava_arch takes a copy of some of them
            raise AttributeError(f"{module.__name__} has no {name}: this LLaVA does not have the expected layout")
        original = getattr(function, _MARK, function)
        wrapper = function if original is not function else wrap(original)
        for other in holders(package, name, original):
            patches.set(other, name, wrapper)
        # A module that is imported later copies the wrapper itself; undo has to know of it.
        patches.on_undo(lambda: restore_copies(package, name, wrapper, original))

    hooks.after(f"{package}.{defined_in}", patch)
    hooks.after(f"{package}.model.llava_arch", patch)


def mark_wrapper(wrapper: Callable, original: Callable) -> Callable:
    """Note what a wrapper stands in for, so that it is not wrapped again."""
    setattr(wrapper, _MARK, original)
    return wrapper


def restore_copies(package: str, name: str, wrapper: Callable, original: Callable) -> None:
    """Put ``original`` back in every imported module of ``package`` in which ``name`` stands for ``wrapper``."""
    for module in holders(package, name, wrapper):
        setattr(module, name, original)


def holders(package: str, name: str, function: Callable) -> list[ModuleType]:
    """The imported modules of ``package`` in which ``name`` stands for ``function``."""
    # vars(), not getattr(): asking a lazy module for an attribute it lacks can import half of transformers.
    return [
        module
        for key, module in list(sys.modules.items())
        if key.split(".")[0] == package and isinstance(module, ModuleType) and vars(module).get(name) is function
    ]
