"""Checkpointed decoder layers of packed rows by CUDA graphs: small batches wait for the host otherwise.

transformers calls a checkpointed layer through a function that a model, or each layer, holds. For the time of a packed
step that function is one that replays graphs (:mod:`~llava_packing_tower.models.runtime.layer_graphs`) of the layer it
is given; whatever is not as it expects goes to the function that was there.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from ...attention.dispatch import backend_module
from ...data.segments import VarlenMetadata
from ...models.runtime.execution import recompute_by_graphs
from ...models.runtime.layer_graphs import Batch, LayerGraphs, Tables, graphs_of, is_plain_checkpoint
from ...models.runtime.module_state import OVERRIDES, state_of
from ...models.unused_parameters import is_whole
from ...multimodal.packed_decoder import PackedRow, causal_backend, only_backend, remember, segments_of
from ...utils.tracing import is_plain
from .liger import is_fused

logger = logging.getLogger(__name__)

HOLDS = "_gradient_checkpointing_func"
OWN = ("layer_idx",)
"""What differs between layers that compute the same."""
_TUPLE = "_llava_packing_returns_tuple"
_answers: weakref.WeakKeyDictionary[nn.Module, tuple[int, str | None]] = weakref.WeakKeyDictionary()


def unlike(layers: nn.ModuleList) -> str | None:
    """None if these layers are all made alike, of plain parts, else the first difference in words."""
    first = dict(layers[0].named_modules())
    for index, layer in enumerate(layers):
        parts = dict(layer.named_modules())
        if parts.keys() != first.keys():
            return f"layer {index} is made of other parts than layer 0"
        for name, part in parts.items():
            if reason := _differs(part, first[name]):
                return f"{name or 'the module'} of layer {index} {reason}"
    return None


def _differs(part: nn.Module, model: nn.Module) -> str | None:
    cls, own, other = type(part), vars(part), vars(model)
    if cls is not type(model):
        return f"is a {cls.__qualname__}"
    if not cls.__module__.startswith(("transformers.", "torch.nn.modules.")):
        return f"is a {cls.__module__}.{cls.__qualname__}"
    if isinstance(part, nn.Dropout) and part.p > 0:
        return "draws random numbers"
    if cls.__name__.endswith("ScalingRotaryEmbedding"):  # until 4.44; later ones are outside of the layers
        return f"is a {cls.__name__}, whose angles may depend on the batch"
    if any(own.get(name) is not None for name in OVERRIDES):
        return "has a forward of its own"
    for name, value in own.items():
        if name.startswith("_") or name in OWN:
            continue
        if isinstance(value, torch.Tensor) or name not in other or (other[name] is not value and other[name] != value):
            return f"has its own {name}"
    if any(not is_plain(p) or not is_whole(p) for p in part.parameters(recurse=False)):
        return "has weights that are no plain tensors"
    return None


def layer_graphs(model: nn.Module, hidden_states: torch.Tensor) -> LayerGraphs | None:
    """The graphs of a decoder's layers, None where a batch of ``[T, hidden]`` is to be run without."""
    layers = model.model.layers
    weights = sum(p.numel() for p in layers[0].parameters())
    if type(layers) is not nn.ModuleList or not recompute_by_graphs(hidden_states, weights):
        return None
    state = state_of(layers).snapshot()
    if state.hooked or _unlike(layers, state.version) is not None:
        return None
    return graphs_of(layers, layers[0], (state.version, is_fused(layers[0].mlp)))


def _unlike(layers: nn.ModuleList, version: int) -> str | None:
    """:func:`unlike`, asked once for each version of the modules."""
    kept = _answers.get(layers)
    if kept is None or kept[0] != version:
        kept = version, unlike(layers)
        logger.info("checkpointed decoder layers: %s", f"no CUDA graphs ({kept[1]})" if kept[1] else "CUDA graphs")
        _answers[layers] = kept
    return kept[1]


@contextlib.contextmanager
def recomputed_by_graphs(model: nn.Module, hidden_states: torch.Tensor, row: PackedRow) -> Iterator[None]:
    """Within it, layers of the decoder that are to be checkpointed replay graphs, where that can be.

    hidden_states: ``[1, T, hidden]``, of the packed ``row``.
    """
    holders = [part for part in (model.model, *model.model.layers) if HOLDS in vars(part)]
    head_dim = model.model.layers[0].self_attn.head_dim
    backend = causal_backend(hidden_states.device, hidden_states.dtype, head_dim, row.segments.lengths)
    kept = [vars(holder)[HOLDS] for holder in holders]
    known = bool(kept) and all(map(is_plain_checkpoint, kept)) and backend_module(backend).VARLEN
    graphs = layer_graphs(model, hidden_states[0]) if known else None
    if graphs is None:
        yield
        return
    recompute = _checkpoint_by(graphs, row, backend, kept[0])
    try:
        for holder in holders:
            setattr(holder, HOLDS, recompute)
        yield
    finally:
        for holder, value in zip(holders, kept, strict=True):
            setattr(holder, HOLDS, value)


def _checkpoint_by(graphs: LayerGraphs, row: PackedRow, backend: str, otherwise: Callable) -> Callable:
    """A checkpoint function: called with a layer's method and arguments, as transformers does."""

    def checkpoint(function: Callable, *args: Any, **kwargs: Any) -> Any:
        layer, given = arguments_of(function, args, kwargs)
        call = layer_call(given)
        weights = list(layer.parameters())
        if call is None or segments_of(call[1][0], True) is not row.segments or not graphs.fits(weights, call[0]):
            return otherwise(function, *args, **kwargs)
        hidden_states, tables, constants = call
        run = functools.partial(_run_layer, backend, constants)
        how = (backend, tuple(sorted(constants.items())))
        out = graphs(weights, hidden_states[0], Batch(row.segments, tables, 1, how), run)
        if out is None:
            return otherwise(function, *args, **kwargs)
        out = out[None]
        return (out,) if getattr(graphs.stand_in, _TUPLE) else out

    return checkpoint


_signature = functools.lru_cache(maxsize=16)(inspect.signature)  # asked for each layer of each step


def arguments_of(function: Callable, args: tuple, kwargs: dict) -> tuple[nn.Module, dict[str, Any]]:
    """The layer that a checkpoint function is to call, and its arguments by name.

    function: a bound method of a layer, or a function whose first argument it is, as it is or in a ``partial``.
    """
    while isinstance(function, functools.partial):
        args, kwargs, function = (*function.args, *args), {**function.keywords, **kwargs}, function.func
    if (layer := getattr(function, "__self__", None)) is None:
        layer, *args = args
    bound = _signature(type(layer).forward).bind(layer, *args, **kwargs).arguments
    given = {**bound, **bound.pop("kwargs", {})}
    given.pop("self")
    return layer, given


def layer_call(given: dict[str, Any]) -> tuple[torch.Tensor, Tables, dict[str, Any]] | None:
    """States, tables (positions, cosines and sines) and constants that a layer was given; None if there is more."""
    given = {name: value for name, value in given.items() if value is not None and name != "cache_position"}
    hidden_states, position_ids = given.pop("hidden_states", None), given.pop("position_ids", None)
    tables = (position_ids, *given.pop("position_embeddings", ()))
    if hidden_states is None or position_ids is None or not all(isinstance(x, bool) for x in given.values()):
        return None
    return hidden_states, tables, given


def _run_layer(
    backend: str,
    constants: dict[str, Any],
    layer: nn.Module,
    hidden_states: torch.Tensor,
    segments: VarlenMetadata,
    tables: Tables,
) -> torch.Tensor:
    position_ids, *angles = tables
    remember(position_ids, segments)
    more = {"position_embeddings": tuple(angles)} if angles else {}
    with only_backend(backend):
        out = layer(hidden_states[None], position_ids=position_ids, **more, **constants)
    setattr(layer, _TUPLE, isinstance(out, tuple))
    return (out[0] if isinstance(out, tuple) else out)[0]
