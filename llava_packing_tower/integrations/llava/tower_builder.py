"""Which vision tower LLaVA builds: our rule first, LLaVA's own function for every other name."""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from ...towers.names import random_clip, tower_kind
from ...utils.import_hooks import ImportHooks
from .host import Host, Part, TowerBuilder
from .patcher import Patches

# What towers.names.tower_kind calls them, module and class of the tower.
TOWERS: tuple[tuple[str, str, str], ...] = (
    ("packing", "llava_packing_tower.towers.packing_tower", "HEVCViTPackingVisionTower"),
    ("fused", "llava_packing_tower.towers.fused_tower", "FusedPackingVisionTower"),
    ("hevc_vit", "llava_packing_tower.towers.standard_tower", "HEVCViTVisionTower"),
)
TOWER_BUILDER = Host.tower_builders[0]
_MARK = "_llava_packing_original"


def tower_class(name: object, note: Mapping | None = None) -> type | None:
    """The tower class for a vision tower name, or None where LLaVA is to decide: see :mod:`...towers.names`.

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


def hooked(original: Callable, builder: TowerBuilder = TOWER_BUILDER) -> Callable:
    """LLaVA's ``build_vision_tower(vision_tower_cfg, **kwargs)``, or another host's builder, with our towers added.

    When called, ``ValueError`` for a name that would give a CLIP with random weights.
    """
    if builder.lengths is not None:
        return hooked_list(original, builder, builder.lengths)
    names = tuple(inspect.signature(original).parameters)

    @functools.wraps(original)
    def build_vision_tower(*args: object, **kwargs: object) -> object:
        given = {**dict(zip(names, args)), **kwargs}
        config = given.pop(builder.config)
        name = _setting(config, builder.settings) if builder.tower is None else given.pop(builder.tower)
        saved = getattr(config, "mm_packing_config", None)
        cls = tower_class(name, saved)
        if cls is None:
            if reason := random_clip(name):
                raise ValueError(f"vision tower {reason}")
            return original(*args, **kwargs)
        if isinstance(saved, Mapping) and saved.get("weights") == "checkpoint":
            # LLaVA 1.x always asks to delay; these weights can only arrive while its checkpoint loads.
            given["delay_load"] = False
        for key, value in builder.defaults:
            if getattr(config, key, None) is None:
                setattr(config, key, value)
        return cls(name, args=config, **given)

    return mark_wrapper(build_vision_tower, original)


def hooked_list(original: Callable, builder: TowerBuilder, lengths: tuple[str, str]) -> Callable:
    """A host's builder of a list of towers, each with its number of tokens; ours are among them.

    Raises ``ValueError`` where a packing tower has another number of tokens than its entry says: it interpolates none.
    """
    parameters = tuple(inspect.signature(original).parameters)

    @functools.wraps(original)
    def build_vision_towers(*args: object, **kwargs: object) -> list:
        given = {**dict(zip(parameters, args)), **kwargs}
        config = given.pop(builder.config)
        towers: list = []
        for name, length in zip(_setting(config, builder.settings), _setting(config, lengths), strict=True):
            cls = tower_class(name)
            if cls is None:
                one = copy.copy(config)
                for keys, value in ((builder.settings, [name]), (lengths, [length])):
                    setattr(one, next(key for key in keys if hasattr(one, key)), value)
                towers += original(**{builder.config: one}, **given)
                continue
            tower = cls(name, args=config, **given)
            if tower.num_patches != length:
                raise ValueError(f"vision tower {name} has {tower.num_patches} tokens, not {length}")
            towers.append(tower)
        return towers

    return mark_wrapper(build_vision_towers, original)


def _setting(config: object, names: tuple[str, str]) -> Any:
    """A setting of a model config, else of training arguments: in the order of the builder that is replaced."""
    return getattr(config, names[0], getattr(config, names[1], None))


def hooked_projector(original: Callable) -> Callable:
    """LLaVA's ``build_vision_projector(config, ...)`` with our projectors, which merge patches, in front."""
    from ...data.smart_resize import CHECKPOINT
    from ...multimodal.projectors import make_projector
    from .checkpoint_projector import checkpoint_projector

    @functools.wraps(original)
    def build_vision_projector(config: object, *args: object, **kwargs: object) -> object:
        kind = getattr(config, "mm_projector_type", None)
        if kind == CHECKPOINT:
            return checkpoint_projector(config)
        ours = make_projector(kind, getattr(config, "mm_hidden_size", 0), config.hidden_size)
        return original(config, *args, **kwargs) if ours is None else ours

    return mark_wrapper(build_vision_projector, original)


def hooked_names(original: Callable, host: Host) -> Callable:
    """A host's ``get_model_name_from_path``; see :func:`.model_class.name_by_architectures`."""
    from .model_class import name_by_architectures

    return mark_wrapper(name_by_architectures(original, host), original)


def install(host: Host, hooks: ImportHooks, patches: Patches) -> None:
    """Hook the tower builders of a host."""
    for builder in host.tower_builders:
        hook_function(host, builder, functools.partial(hooked, builder=builder), hooks, patches, in_arch=True)
    hooks.surface_failures(host.module(host.models))


def hook_function(
    host: Host,
    part: Part,
    wrap: Callable[[Callable], Callable],
    hooks: ImportHooks,
    patches: Patches,
    in_arch: bool = False,
) -> None:
    """Wrap a function of a host, and every copy of it that its modules took.

    ``wrap(original)`` makes the wrapper, with the original in its attribute ``_llava_packing_original``. in_arch:
    whether the ``arch`` module must have a copy of it.
    """
    defined_in, name = host.module(part.module), part.name

    def patch(module: ModuleType) -> None:
        function = vars(module).get(name)
        if function is None:
            if module.__name__ != defined_in and not in_arch:
                return  # llava_arch takes a copy of some of them
            raise AttributeError(f"{module.__name__} has no {name}: this LLaVA does not have the expected layout")
        original = getattr(function, _MARK, function)
        wrapper = function if original is not function else wrap(original)
        for other in holders(host, name, original):
            patches.set(other, name, wrapper)
        # A module that is imported later copies the wrapper itself; undo has to know of it.
        patches.on_undo(lambda: restore_copies(host, name, wrapper, original))

    hooks.after(defined_in, patch)
    hooks.after(host.module(host.arch), patch)


def mark_wrapper(wrapper: Callable, original: Callable) -> Callable:
    """Note what a wrapper stands in for, so that it is not wrapped again."""
    setattr(wrapper, _MARK, original)
    return wrapper


def restore_copies(host: Host, name: str, wrapper: Callable, original: Callable) -> None:
    """Put ``original`` back in every imported module of a host in which ``name`` stands for ``wrapper``."""
    for module in holders(host, name, wrapper):
        setattr(module, name, original)


def holders(host: Host, name: str, function: Callable) -> list[ModuleType]:
    """The imported modules of a host in which ``name`` stands for ``function``."""
    # vars(), not getattr(): asking a lazy module for an attribute it lacks can import half of transformers.
    return [
        module
        for key, module in list(sys.modules.items())
        if host.owns(key) and isinstance(module, ModuleType) and vars(module).get(name) is function
    ]
