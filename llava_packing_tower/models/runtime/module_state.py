"""What is known of a module before each run: whether it contains foreign parts, and where its weights are.

Fused blocks and CUDA graphs read weights without calling the modules that hold them. They may do so only where every
module has a class of this package, runs the forward of that class and holds plain parameters. An adapter, a quantized
or offloaded layer, a hook or a parametrization must be *called*. :func:`foreign_part` decides this.

torch has no public way to ask a module for its hooks, or for whether its forward was replaced: this is the one file
that reads ``nn.Module``'s own attributes (``_modules``, ``_parameters``, ``_forward_hooks``, ...; torch 2.1 to 2.13).
tests/unit/test_module_state.py notices if one of them goes. ``LLAVA_PACKING_FUSED=0`` is the way around it.

It walks a module tree, which for a ViT-L takes a fifth of the time that one image takes on a GPU. So
:class:`ModuleState` keeps the answer, and checks on every call whether anything that it depends on has changed.
"""

from __future__ import annotations

import functools
import types
import weakref
from itertools import chain
from operator import itemgetter, methodcaller
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from ...utils.tracing import is_plain

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# Hooks that every module runs; the names differ between torch versions.
GLOBAL_HOOKS = tuple(name for name in (f"_global{hook}" for hook in HOOKS) if hasattr(torch_module, name))
OVERRIDES = ("forward", "_call_impl", "_compiled_call_impl")  # what a module is called through, if set on an instance
# Constants that are checked on every call.
LIVE = ("eps", "num_heads", "head_dim", "rotate", "partial_biases", "layout", "approximate")
KNOWN_MODULES = (f"{__name__.partition('.')[0]}.", "torch.nn.modules.", "transformers.activations")
FSDP, DTENSOR = "torch.distributed.fsdp", "torch.distributed.tensor"


def has_forward_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks)


class Snapshot(NamedTuple):
    """weights: all of them. hooked: whether any module has hooks (DeepSpeed ZeRO-3, FSDP, a user's). foreign: None, or
    a description of the first foreign part; hooks on complete blocks, as ZeRO-3 and FSDP use them, do not make a block
    foreign. version: changes whenever a part was replaced or runs in another way."""

    weights: list[nn.Parameter]
    hooked: bool
    foreign: str | None
    version: int


# ---------------------------------------------------------------- foreign parts


@functools.cache
def _as_defined(cls: type, forward: object) -> bool:
    """Whether ``forward``, which instances of ``cls`` run, is what the source of the class says: not set later on."""
    owner = next(c for c in cls.__mro__ if "forward" in vars(c))
    return owner is nn.Module or (  # a list of modules has none
        isinstance(forward, types.FunctionType)
        and forward.__module__ == owner.__module__
        and forward.__qualname__ == f"{owner.__qualname__}.forward"
        and not hasattr(forward, "__wrapped__")
    )


def _overridden(module: nn.Module) -> bool:
    """Whether this instance, or its class since it was defined, got another forward. (accelerate leaves the bound
    method of the class on the instance when it removes its hooks.)"""
    cls, own = type(module), vars(module)
    if not _as_defined(cls, cls.forward):  # type: ignore[arg-type]  # a class is hashable
        return True
    values = ((own.get(name), getattr(cls, name, None)) for name in OVERRIDES)
    return any(x is not None and not (getattr(x, "__func__", None) is of and x.__self__ is module) for x, of in values)


def _is_fsdp(module: nn.Module) -> bool:
    """Whether FSDP 1 wraps this module or ``fully_shard`` has given it a class of its own."""
    return type(module).__module__.startswith(FSDP)


def foreign_part(
    module: nn.Module, template: nn.Module | None = None, name: str = "", sharded: bool = False
) -> str | None:
    """None if a module and all below it are known, else a description of the first foreign part.

    A module is known if its class is of this package or of ``torch.nn``, if it runs the forward in the source of that
    class, and if its parameters are plain tensors. Hooks are not checked here (see :class:`Snapshot`).

    Args:
        module: whose weights are to be read without calling it.
        template: a fresh module of the same configuration, on the meta device for example. Given one, the module must
            be made of the same parts: classes, parameters, eps, numbers of heads, activation.
        name: of the module, for the description.
        sharded: whether ``fully_shard`` holds its parameters, which are plain only while its block runs.
    """
    cls, where = type(module), name or "the module"
    if template is not None and cls is not type(template) and _is_fsdp(module):
        if not isinstance(module, type(template)):  # FSDP 1, around a whole block
            return foreign_part(module.get_submodule("module"), template, name)
        cls, sharded = cls.__bases__[-1], True
    known = cls.__module__.startswith(KNOWN_MODULES) if template is None else cls is type(template)
    if not known:
        return f"{where} is a {cls.__module__}.{cls.__qualname__}"
    if _overridden(module):
        return f"{where} has a forward() that differs from {cls.__qualname__}"
    if found := _foreign_contents(module, template, where, sharded):
        return found
    for key, child in module._modules.items():
        if child is not None:
            below = None if template is None else template._modules[key]
            if found := foreign_part(child, below, f"{name}.{key}" if name else key, sharded):
                return found
    return None


def _foreign_contents(module: nn.Module, template: nn.Module | None, where: str, sharded: bool) -> str | None:
    """:func:`foreign_part` for what a module itself holds."""
    held, own = dict(module._parameters), vars(module)
    if template is not None:
        held = {**dict.fromkeys(template._parameters), **held}
        held.update((key, own[key]) for key in template._parameters if key in own)  # FSDP 1 sets views of its own
        for kind, found, fresh in (
            ("parameter", held, template._parameters),
            ("part", module._modules, template._modules),
        ):
            for key in found.keys() | fresh.keys():
                if (found.get(key) is None) != (fresh.get(key) is None):
                    return f"{where} has {'no' if found.get(key) is None else 'a'} {kind} {key}"
        for key, value in vars(template).items():
            if not key.startswith("_") and key != "training" and own.get(key) != value:
                return f"{where} has {key} {own.get(key)!r} instead of {value!r}"
    for key, value in held.items():
        if not is_plain(value) and not (sharded and type(value).__module__.startswith(DTENSOR)):
            return f"{where} has a {type(value).__qualname__} as its {key}"
    return None


# ---------------------------------------------------------------- the answer, kept


class ModuleState:
    """What a :class:`Snapshot` of a module is made from, gathered anew when a part of it was replaced or changed.

    A module that has encoder blocks (``layers``) defines with ``fresh_block()`` what these are made of.
    """

    def __init__(self, root: nn.Module) -> None:
        self._root, self._version = weakref.ref(root), 0
        self._gather()

    def _gather(self) -> None:
        root, self._version = self._root(), self._version + 1
        assert root is not None  # whoever asks holds it
        modules = list(root.modules())
        self._below, self._dicts = modules[1:], [vars(module) for module in modules]  # (not the root: it must be freed)
        # What lies inside of a block: such a class is one that DeepSpeed takes for a leaf (see layers.EncoderBlock).
        blocks = [m for m in modules if hasattr(type(m), "_z3_leaf")]
        inside = {id(below) for block in blocks for below in block.modules() if below is not block}
        self._inner = [vars(module) for module in modules if id(module) in inside]
        self._outer = [vars(module) for module in modules if id(module) not in inside]
        self._kinds: list[Any] = list(dict.fromkeys(map(type, modules)))
        # (Whatever is put into a module without parts runs only if its class, or how it is called, changes as well.)
        self._with_parts = [held for held in self._dicts if held["_modules"]]
        self._with_weights = [held for held in self._dicts if held["_parameters"]]
        self._constants = [(d, key) for d in self._dicts for key in LIVE if key in d]
        self._known = self._now(self._weights())
        self._foreign = self._foreign_part(root)

    def _foreign_part(self, root: Any) -> str | None:
        if not hasattr(root, "fresh_block"):
            return foreign_part(root)
        fresh, name = root.fresh_block(), "layers"
        if type(root.layers) is not nn.ModuleList:
            return f"{name} is a {type(root.layers).__qualname__}"
        found = (foreign_part(block, fresh, f"{name}.{index}") for index, block in enumerate(root.layers))
        return next(filter(None, found), None)

    def _weights(self) -> list[nn.Parameter]:
        held = chain.from_iterable(map(dict.values, map(itemgetter("_parameters"), self._with_weights)))
        return [parameter for parameter in held if parameter is not None]

    def _now(self, weights: list[nn.Parameter]) -> tuple[list, ...]:
        return (
            list(chain.from_iterable(map(dict.values, map(itemgetter("_modules"), self._with_parts)))),
            list(map(type, self._below)),
            list(map(len, self._dicts)),  # a second way of being called, set on an instance
            list(map(methodcaller("get", "forward"), self._dicts)),
            [kind.forward for kind in self._kinds],
            [held[key] for held, key in self._constants],
            list(map(type, weights)),
        )

    def snapshot(self) -> Snapshot:
        weights = self._weights()
        if self._now(weights) != self._known:
            self._gather()
            weights = self._weights()
        inner, foreign = any(map(any, map(itemgetter(*HOOKS), self._inner))), self._foreign
        if inner and foreign is None:
            foreign = "there is a hook inside a block"
        if foreign is None and any(getattr(torch_module, name) for name in GLOBAL_HOOKS):
            foreign = "there are hooks on all modules"
        hooked = inner or any(map(any, map(itemgetter(*HOOKS), self._outer)))
        return Snapshot(weights, hooked, foreign, self._version)


def addresses(parameters: list[nn.Parameter]) -> int:
    """A hash of where these weights lie in memory."""
    return hash(tuple(map(torch.Tensor.data_ptr, parameters)))


_states: weakref.WeakKeyDictionary[nn.Module, ModuleState] = weakref.WeakKeyDictionary()


def state_of(module: nn.Module) -> ModuleState:
    """The :class:`ModuleState` of ``module``."""
    state = _states.get(module)
    if state is None:
        state = _states[module] = ModuleState(module)
    return state
