"""CUDA graphs of the whole way from pixels to features, for small batches whose shapes come again and again.

A GPU needs two milliseconds for one image of a usual size; calling all that lies before the blocks takes Python almost
one more. The third batch of the same shapes is recorded: from then on such a batch is one copy in, one replay and one
copy out. Inference only. Other batches go through :mod:`graphs` (the blocks alone, by token bucket).
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from .compiling import compile_wanted
from .encoder import compute_dtype
from .graphs import GRAPHS_ENV, MAX_TOKENS, Memory, capturing, my_turn, shared_pool, suspended
from .module_state import addresses, state_of
from .packing import Grid
from .tape import Tape
from .tracing import traced

Images = torch.Tensor | Sequence[torch.Tensor]
Encoded = tuple[torch.Tensor, list[Grid]]

RECORD_AT = 3
MAX_RECORDINGS = 16
DEVICE_TYPE = "cuda"


@dataclass
class Recording:
    """A graph with what it reads (``pixels``, and the metadata on ``tape``) and writes (``packed``)."""

    replay: Callable[[], None]
    pixels: torch.Tensor | list[torch.Tensor]
    packed: torch.Tensor
    grids: list[Grid]
    tape: Tape


_memories: weakref.WeakKeyDictionary[nn.Module, Memory] = weakref.WeakKeyDictionary()


def encode_recorded(
    model: nn.Module, images: Images, layers: tuple[int, ...], encode: Callable[[Images], Encoded]
) -> Encoded:
    """``encode(images)``, by replaying a recording of it where there is one.

    Args:
        model: the packed encoder that ``encode`` runs; recordings are tied to its weights and live as long as it.
        images: ``[B, C, H, W]`` or a list of ``[C, H, W]`` or ``[C, T, H, W]``.
        layers: the hidden states that ``encode`` selects.
        encode: pixels to ``(packed [N, hidden], grids)``; must do the same for the same shapes.
    """
    key = _key(model, images, layers)
    if key is None:
        return encode(images)
    memory, device = _memories.setdefault(model, Memory(MAX_RECORDINGS)), key[1]
    with my_turn(device):
        recording = memory.find(key)
        if recording is not None:
            if isinstance(images, torch.Tensor):
                recording.pixels.copy_(images)
            else:
                torch._foreach_copy_(recording.pixels, list(images))
            recording.replay()
            return recording.packed.clone(), list(recording.grids)
    encoded = encode(images)
    if encoded[0].shape[0] <= MAX_TOKENS:
        with my_turn(device):
            if memory.count(key) == RECORD_AT:
                memory.keep(key, record(images, encode, encoded[0]))
    return encoded


def _key(model: nn.Module, images: Images, layers: tuple[int, ...]) -> tuple | None:
    """All that decides what is run; None for what is not recorded."""
    batch = [images] if isinstance(images, torch.Tensor) else images
    if model.training or not batch or not all(isinstance(x, torch.Tensor) for x in batch):
        return None
    parameters, hooked, foreign, version = state_of(model).snapshot()
    if hooked or foreign is not None or traced(*batch):
        return None
    device, dtype = parameters[0].device, parameters[0].dtype
    if device.type != DEVICE_TYPE or any(x.device != device for x in batch) or os.environ.get(GRAPHS_ENV) == "0":
        return None
    if torch.is_grad_enabled() and any(x.requires_grad for x in (*batch, *parameters)):
        return None
    if not compile_wanted(model.encoder.compile_blocks, device):
        return None
    if compute_dtype(parameters[0]) != dtype or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        return None
    shapes = (isinstance(images, torch.Tensor), *(x.shape for x in batch))
    encoder = model.encoder
    place = hash((addresses(parameters), version, encoder.compile_blocks, encoder.fused_blocks))
    return place, device, dtype, encoder.attention_backend, layers, shapes


def record(images: Images, encode: Callable[[Images], Encoded], like: torch.Tensor) -> Recording:
    """Record ``encode`` for batches of these shapes; ``like``: a tensor with the model's dtype and device."""
    device = like.device
    with torch.inference_mode(False), torch.no_grad(), suspended():
        if isinstance(images, torch.Tensor):
            pixels = torch.zeros(images.shape, dtype=like.dtype, device=device)
        else:
            pixels = [torch.zeros(x.shape, dtype=like.dtype, device=device) for x in images]
        tape, stream = Tape(), torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream), tape.making():
            encode(pixels)
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with capturing(graph, shared_pool(device)), tape.playing():
            packed, grids = encode(pixels)
    return Recording(graph.replay, pixels, packed, grids, tape)
