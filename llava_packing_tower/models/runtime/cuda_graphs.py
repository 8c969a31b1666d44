"""CUDA graphs for small batches of inference, where launching kernels takes longer than running them.

Two stretches of a forward are captured, by the same mechanism:

- the blocks, by token bucket: the batch is padded up to the bucket with a segment of its own, so no image sees the
  padding. (Batches for a backend of equal lengths stay as they are.) The first batch of a kind runs without a graph, in
  the same shapes and so to the same bits: a capture takes four times as long as a run.
- everything from pixels to features, for batches of exactly the same shapes: one copy in, one replay, one copy out. A
  capture costs as much as fifty replays save, so the shapes must come again soon: three times among the latest few.

The graphs of a device share memory, and each has one place for its input and output: threads and streams take turns.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ...attention.dispatch import backend_module
from ...data.cached_metadata import CachedMetadata
from ...data.segments import Grid, VarlenMetadata
from ...utils import environment
from ...utils.tracing import traced
from ..layers import Rotary
from .module_state import addresses, state_of

MAX_TOKENS, BUCKET = 4096, 256
DEVICE_TYPE = "cuda"

Images = torch.Tensor | Sequence[torch.Tensor]
Encoded = tuple[torch.Tensor, list[Grid]]
States = dict[int, torch.Tensor]
Run = Callable[[torch.Tensor, VarlenMetadata, "Rotary | None", Sequence[int], str], States]


@dataclass(frozen=True)
class Policy:
    """capture_at: which batch of a kind is captured (2: the second); counted: the number of recent kinds whose batches
    are counted; most: the number of graphs that are kept."""

    capture_at: int
    counted: int
    most: int


BLOCKS = Policy(capture_at=2, counted=256, most=32)
PIXELS = Policy(capture_at=3, counted=16, most=16)


@dataclass
class Captured:
    """A captured graph, the tensors that it reads and writes, and the metadata that must live as long."""

    replay: Callable[[], None]
    inputs: list[torch.Tensor]
    result: Any
    metadata: CachedMetadata
    sources: tuple[Any, Any] = (None, None)  # the rotary table and the segments that were copied in last


@dataclass
class Memory:
    """Counts of the kinds of batches of one model, and what was captured for each.

    A key is a tuple that begins with a hash of where the weights lie: what was captured for other weights is dropped.
    """

    policy: Policy
    counts: OrderedDict = field(default_factory=OrderedDict)
    captured: OrderedDict = field(default_factory=OrderedDict)

    def is_due(self, key: tuple[Hashable, ...]) -> bool:
        """Count this batch; whether it is to be captured."""
        self.counts[key] = self.counts.pop(key, 0) + 1
        if len(self.counts) > self.policy.counted:
            self.counts.popitem(last=False)
        return self.counts[key] >= self.policy.capture_at

    def find(self, key: tuple[Hashable, ...]) -> Captured | None:
        """The graph of this kind, which becomes the most recently used one; None if there is none."""
        found = self.captured.get(key)
        if found is not None:
            self.captured.move_to_end(key)
        return found

    def keep(self, key: tuple[Hashable, ...], captured: Captured) -> None:
        """Add a graph. Graphs of other weights are dropped, and beyond the policy's number the least recently used."""
        for stale in [k for k in self.captured if k[0] != key[0]]:
            del self.captured[stale]
            self.counts.pop(stale, None)
        self.captured[key] = captured
        if len(self.captured) > self.policy.most:
            dropped, _ = self.captured.popitem(last=False)
            self.counts.pop(dropped, None)  # else it would be captured again as soon as it comes


_memories: dict[Policy, weakref.WeakKeyDictionary[nn.Module, Memory]] = {
    policy: weakref.WeakKeyDictionary() for policy in (BLOCKS, PIXELS)
}
_thread = threading.local()  # .capturing: whether this thread captures a larger stretch


def memory_of(module: nn.Module, policy: Policy) -> Memory:
    """What was captured of ``module``: the encoder for blocks, the model for pixels."""
    return _memories[policy].setdefault(module, Memory(policy))


def graphs_allowed(device: torch.device, num_tokens: int = 0) -> bool:
    """Whether a batch of inference may be captured or replayed: small, on CUDA, neither traced nor captured already,
    and not switched off. Raises ``ValueError`` for a switch that is neither 0 nor 1."""
    if device.type != DEVICE_TYPE or num_tokens > MAX_TOKENS or environment.switch(environment.GRAPHS) is False:
        return False
    if getattr(_thread, "capturing", False) or traced():
        return False
    return device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


# ---------------------------------------------------------------- capturing


class _Device:
    """Whose turn it is to use the graphs of a device, the stream that used them last, and the memory that they share
    (they never run at the same time, and results are copied out)."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.stream: torch.cuda.Stream | None = None
        self.pool: tuple[Any, torch.cuda.CUDAGraph] | None = None


_devices: dict[torch.device, _Device] = {}


@contextlib.contextmanager
def my_turn(device: torch.device) -> Iterator[None]:
    """Within it no other thread uses graphs of this device, and other streams have finished with them."""
    turn = _devices.setdefault(device, _Device())
    with turn.lock:
        current = torch.cuda.current_stream(device) if device.type == "cuda" else None
        if current is not None and turn.stream is not None and turn.stream != current:
            current.wait_stream(turn.stream)
        try:
            yield
        finally:
            turn.stream = current


def _capturing(graph: torch.cuda.CUDAGraph, pool: Any) -> contextlib.AbstractContextManager:
    """Kernels are recorded in here. Work of other threads (a loader that pins memory) is not an error."""
    return torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local")


def pool(device: torch.device) -> Any:
    """The memory that all graphs of a device share, within :func:`my_turn`."""
    shared = _devices[device]
    if shared.pool is None:
        handle, keeper = torch.cuda.graph_pool_handle(), torch.cuda.CUDAGraph()
        with _capturing(keeper, handle):
            torch.zeros(1, device=device)
        shared.pool = handle, keeper  # (a graph keeps the pool alive)
    return shared.pool[0]


def capture(function: Callable[[], object], inputs: list[torch.Tensor], device: torch.device) -> Captured:
    """Capture ``function``, which reads the tensors ``inputs``: it runs once, and once more while it is captured."""
    metadata, stream, graph = CachedMetadata(), torch.cuda.Stream(device), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream), metadata.making():
        function()
    torch.cuda.current_stream(device).wait_stream(stream)
    with _capturing(graph, pool(device)), metadata.giving_again():
        result = function()
    return Captured(graph.replay, inputs, result, metadata)


def _capture(function: Callable[[], object], inputs: list[torch.Tensor], device: torch.device) -> Captured:
    before, _thread.capturing = getattr(_thread, "capturing", False), True
    try:
        with torch.inference_mode(False), torch.no_grad():
            return capture(function, inputs, device)
    finally:
        _thread.capturing = before


# ---------------------------------------------------------------- the blocks, by token bucket


def run_blocks(
    module: nn.Module,
    run: Run,
    hidden_states: torch.Tensor,
    segments: VarlenMetadata,
    rotary: Rotary | None,
    keep: Sequence[int],
    backend: str,
    weights: int,
) -> States:
    """``run(hidden_states, segments, rotary, keep, backend)``; from the second batch of a kind on by a CUDA graph.

    hidden_states: ``[N, hidden]``; rotary: ``[N, 1, head_dim]`` each; returns ``[N, hidden]`` for each index of keep.
    weights: a hash of where they are in memory and of how ``run`` runs: a graph must not outlive the memory it reads.
    """
    tokens, device = hidden_states.shape[0], hidden_states.device
    if getattr(backend_module(backend), "EQUAL_LENGTHS_ONLY", False):
        bucket, count, longest = tokens, len(segments.lengths), segments.max_seqlen
    else:
        bucket = -(-tokens // BUCKET) * BUCKET
        count = len(segments.lengths) + (bucket > tokens)
        longest = -(-max(segments.max_seqlen, bucket - tokens) // BUCKET) * BUCKET
    key = (weights, bucket, count, longest, tuple(keep), backend, hidden_states.dtype, device, rotary is None)
    memory = memory_of(module, BLOCKS)
    with my_turn(device):
        captured = memory.find(key)
        if captured is None and memory.is_due(key):
            captured = _capture_blocks(run, hidden_states, rotary, bucket, count, longest, keep, backend)
            memory.keep(key, captured)
        if captured is not None:
            return _replay_blocks(captured, hidden_states, segments, rotary)
    # What a graph would compute, without one.
    with torch.inference_mode(False), torch.no_grad():
        fill = (0, 0, 0, bucket - tokens)
        padded = F.pad(hidden_states, fill)
        tables: Any = None if rotary is None else tuple(F.pad(table, (0, 0, *fill)) for table in rotary)
        cu_seqlens = F.pad(segments.cu_seqlens, (0, int(bucket > tokens)), value=bucket)
        # No lengths, as in a graph: a kernel that reads them would be another one.
        states = run(padded, VarlenMetadata(cu_seqlens, longest, ()), tables, keep, backend)
    return {index: state[:tokens] for index, state in states.items()}


def _replay_blocks(
    captured: Captured, hidden_states: torch.Tensor, segments: VarlenMetadata, rotary: Rotary | None
) -> States:
    tokens = hidden_states.shape[0]
    static, cu_seqlens, *tables = captured.inputs
    static[:tokens].copy_(hidden_states)
    if captured.sources[0] is not rotary:
        for table, source in zip(tables, rotary or (), strict=True):
            table[:tokens].copy_(source)
    if captured.sources[1] is not segments:
        cu_seqlens[: len(segments.lengths) + 1].copy_(segments.cu_seqlens)
    captured.sources = (rotary, segments)
    captured.replay()
    return {index: state[:tokens].clone() for index, state in captured.result.items()}


def _capture_blocks(
    run: Run,
    hidden_states: torch.Tensor,
    rotary: Rotary | None,
    bucket: int,
    count: int,
    longest: int,
    keep: Sequence[int],
    backend: str,
) -> Captured:
    device = hidden_states.device
    with torch.inference_mode(False):
        tokens = hidden_states.new_zeros(bucket, hidden_states.shape[1])
        tables = [torch.zeros(bucket, *x.shape[1:], dtype=x.dtype, device=device) for x in rotary or ()]
        # Any valid division will do while capturing; the last border, behind the padding, never changes.
        borders = [bucket * i // count for i in range(count)] + [bucket]
        cu_seqlens = torch.tensor(borders, dtype=torch.int32, device=device)
    # No lengths: only kernels that read cu_seqlens on the device can be replayed for other segments.
    segments = VarlenMetadata(cu_seqlens, longest, ())
    padded: Any = tuple(tables) if tables else None
    return _capture(lambda: run(tokens, segments, padded, keep, backend), [tokens, cu_seqlens, *tables], device)


# ---------------------------------------------------------------- from pixels to features


def encode_images(
    model: nn.Module, images: Images, layers: tuple[int, ...], encode: Callable[[Images], Encoded]
) -> Encoded:
    """``encode(images)``, by replaying a graph of it where there is one.

    Args:
        model: the packed encoder that ``encode`` runs; graphs are tied to its weights and live as long as it.
        images: ``[B, C, H, W]`` or a list of ``[C, H, W]`` or ``[C, T, H, W]``.
        layers: the hidden states that ``encode`` selects.
        encode: pixels to ``(packed [N, hidden], grids)``; must do the same for the same shapes.
    """
    key = _key(model, images, layers)
    if key is None:
        return encode(images)
    memory, device = memory_of(model, PIXELS), key[1]
    with my_turn(device):
        captured = memory.find(key)
        if captured is not None:
            for target, image in zip(captured.inputs, _batch(images), strict=True):
                target.copy_(image)
            captured.replay()
            packed, grids = captured.result
            return packed.clone(), list(grids)
    packed, grids = encode(images)
    if packed.shape[0] <= MAX_TOKENS:
        with my_turn(device):
            if memory.is_due(key):
                memory.keep(key, _capture_images(images, encode, packed))
    return packed, grids


def _batch(images: Images) -> Sequence[torch.Tensor]:
    return [images] if isinstance(images, torch.Tensor) else images


def _key(model: nn.Module, images: Images, layers: tuple[int, ...]) -> tuple | None:
    """All that decides what is run; None for what is not captured."""
    batch = _batch(images)
    if model.training or not batch or not all(isinstance(x, torch.Tensor) for x in batch):
        return None
    if not all(x.is_floating_point() for x in batch):  # bytes, which are scaled as the tower's processor is now
        return None
    parameters, hooked, foreign, version = state_of(model).snapshot()
    encoder: Any = model.encoder
    if hooked or foreign is not None or not parameters or encoder.fused is False or traced(*batch):
        return None
    device, dtype = parameters[0].device, parameters[0].dtype
    if any(x.device != device for x in batch) or not graphs_allowed(device):
        return None
    # (What autocast has cast is kept until its end only, and a graph would go on reading it.)
    if torch.is_autocast_enabled() or (torch.is_grad_enabled() and any(x.requires_grad for x in (*batch, *parameters))):
        return None
    if encoder.fused is None and environment.switch(environment.FUSED) is False:
        return None
    place = hash((addresses(parameters), version, encoder.fused))
    shapes = (isinstance(images, torch.Tensor), *(x.shape for x in batch))
    return place, device, dtype, encoder.attention_backend, layers, shapes


def _capture_images(images: Images, encode: Callable[[Images], Encoded], like: torch.Tensor) -> Captured:
    """Capture ``encode`` for batches of these shapes; ``like``: a tensor with the model's dtype and device."""
    with torch.inference_mode(False):
        pixels = [torch.zeros(x.shape, dtype=like.dtype, device=like.device) for x in _batch(images)]
    given = pixels[0] if isinstance(images, torch.Tensor) else pixels
    return _capture(lambda: encode(given), pixels, like.device)
