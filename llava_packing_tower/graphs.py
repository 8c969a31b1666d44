"""CUDA graphs for small batches, where launching kernels takes longer than running them.

There is one per bucket of the token count: the batch is padded up to the bucket with a segment of its own, so no image
sees the padding. (Batches for a backend of equal lengths stay as they are.) The first batch of a kind is run without a
graph, in the same shapes and so to the same bits: on an H100 a capture takes four times as long as a run, and photos of
many sizes make many kinds. Inference only: no gradient is recorded.
"""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn import functional as F

from .attention import backend_module
from .layers import Rotary
from .packing import PackedSegments
from .tracing import traced

GRAPHS_ENV = "LLAVA_PACKING_CUDA_GRAPHS"
MAX_TOKENS = 4096
BUCKET = 256
CAPTURE_AT = 2
MAX_GRAPHS, MAX_COUNTED = 16, 256

States = dict[int, torch.Tensor]
Run = Callable[[torch.Tensor, PackedSegments, "Rotary | None", Sequence[int], str], States]


@dataclass
class _Captured:
    graph: torch.cuda.CUDAGraph
    tokens: torch.Tensor
    rotary: Rotary | None
    cu_seqlens: torch.Tensor
    states: States
    sources: tuple = (None, None)  # the rotary table and the segments that were copied in last


@dataclass
class Memory:
    """How often each kind of batch came, and what was captured for it, of one model.

    A key is a tuple that begins with a hash of where the weights lie: what was captured for other weights is dropped.
    """

    most: int
    counts: OrderedDict = field(default_factory=OrderedDict)
    captured: OrderedDict = field(default_factory=OrderedDict)

    def count(self, key: tuple[Hashable, ...]) -> int:
        self.counts[key] = self.counts.pop(key, 0) + 1
        if len(self.counts) > MAX_COUNTED:
            self.counts.popitem(last=False)
        return self.counts[key]

    def find(self, key: tuple[Hashable, ...]) -> object | None:
        found = self.captured.get(key)
        if found is not None:
            self.captured.move_to_end(key)
        return found

    def keep(self, key: tuple[Hashable, ...], captured: object) -> None:
        for stale in [k for k in self.captured if k[0] != key[0]]:
            del self.captured[stale]
            self.counts.pop(stale, None)
        self.captured[key] = captured
        if len(self.captured) > self.most:
            dropped, _ = self.captured.popitem(last=False)
            self.counts.pop(dropped, None)  # else it would be captured again as soon as it comes


_memories: weakref.WeakKeyDictionary[nn.Module, Memory] = weakref.WeakKeyDictionary()
_pools: dict[torch.device, tuple] = {}  # device -> pool, and the graph that keeps it alive
_turns: dict[torch.device, _Turn] = {}
_thread = threading.local()  # .suspended: whether this thread records a larger graph


class _Turn:
    """Whose turn it is to use the graphs of a device, and the stream that used them last."""

    def __init__(self) -> None:
        self.lock, self.stream = threading.RLock(), None


@contextlib.contextmanager
def my_turn(device: torch.device) -> Iterator[None]:
    """In here no other thread uses graphs of this device, and what other streams did with them is over.

    All graphs share memory, and each has one place for its input and its output.
    """
    turn = _turns.setdefault(device, _Turn())
    with turn.lock:
        current = torch.cuda.current_stream(device) if device.type == "cuda" else None
        if turn.stream is not None and turn.stream != current:
            current.wait_stream(turn.stream)
        try:
            yield
        finally:
            turn.stream = current


@contextlib.contextmanager
def suspended() -> Iterator[None]:
    """No graphs in here: a larger one is being recorded."""
    before, _thread.suspended = getattr(_thread, "suspended", False), True
    try:
        yield
    finally:
        _thread.suspended = before


def graphs_wanted(device: torch.device, num_tokens: int, grad: bool) -> bool:
    """Whether a batch is small enough, on CUDA, without gradients, and graphs are not switched off."""
    if device.type != "cuda" or grad or num_tokens > MAX_TOKENS or os.environ.get(GRAPHS_ENV) == "0":
        return False
    # (What autocast has cast is kept until its end only, and a graph would go on reading it.)
    if getattr(_thread, "suspended", False) or torch.is_autocast_enabled() or traced():
        return False
    return not torch.cuda.is_current_stream_capturing()


def run_graphed(
    module: nn.Module,
    run: Run,
    hidden_states: torch.Tensor,
    segments: PackedSegments,
    rotary: Rotary | None,
    keep: Sequence[int],
    backend: str,
    weights: int,
) -> States:
    """``run(hidden_states, segments, rotary, keep, backend)``, by replaying a graph from the second batch of a kind on.

    weights: a hash of where they lie, and of how ``run`` runs: a graph must not outlive the memory that it reads.
    """
    tokens, device = hidden_states.shape[0], hidden_states.device
    if getattr(backend_module(backend), "EQUAL_LENGTHS_ONLY", False):
        bucket, count, longest = tokens, len(segments.lengths), segments.max_seqlen
    else:
        bucket = -(-tokens // BUCKET) * BUCKET
        count = len(segments.lengths) + (bucket > tokens)
        longest = -(-max(segments.max_seqlen, bucket - tokens) // BUCKET) * BUCKET
    key = (weights, bucket, count, longest, tuple(keep), backend, hidden_states.dtype, device, rotary is None)
    memory = _memories.setdefault(module, Memory(MAX_GRAPHS))
    with my_turn(device):
        captured = memory.find(key)
        if captured is None and memory.count(key) >= CAPTURE_AT:
            captured = _capture(run, hidden_states, rotary, bucket, count, longest, keep, backend)
            memory.keep(key, captured)
        if captured is not None:
            captured.tokens[:tokens].copy_(hidden_states)
            if rotary is not None and captured.sources[0] is not rotary:
                for static, source in zip(captured.rotary, rotary, strict=True):
                    static[:tokens].copy_(source)
            if captured.sources[1] is not segments:
                captured.cu_seqlens[: len(segments.lengths) + 1].copy_(segments.cu_seqlens)
            captured.sources = (rotary, segments)
            captured.graph.replay()
            return {index: state[:tokens].clone() for index, state in captured.states.items()}
    return _run_once(run, hidden_states, segments, rotary, bucket, longest, keep, backend)


def _run_once(
    run: Run,
    hidden_states: torch.Tensor,
    segments: PackedSegments,
    rotary: Rotary | None,
    bucket: int,
    longest: int,
    keep: Sequence[int],
    backend: str,
) -> States:
    """What a graph would compute, without one."""
    tokens = hidden_states.shape[0]
    padding = bucket - tokens
    with torch.inference_mode(False), torch.no_grad():  # as _capture: else blocks would be compiled twice
        fill = (0, 0, 0, padding)
        padded = F.pad(hidden_states, fill)
        tables = None if rotary is None else tuple(F.pad(table, (0, 0, *fill)) for table in rotary)
        cu_seqlens = F.pad(segments.cu_seqlens, (0, int(padding > 0)), value=bucket)
        # No lengths, as in a graph: a kernel that reads them would be another one.
        states = run(padded, PackedSegments(cu_seqlens, longest, ()), tables, keep, backend)
    return {index: state[:tokens] for index, state in states.items()}


def capturing(graph: torch.cuda.CUDAGraph, pool: tuple) -> contextlib.AbstractContextManager:
    """In here kernels are recorded; what other threads do meanwhile (a loader that pins memory) is no error."""
    return torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local")


def shared_pool(device: torch.device) -> tuple:
    """The memory that all graphs of a device share: they never run at the same time, and results are copied out."""
    if device not in _pools:
        pool, keeper = torch.cuda.graph_pool_handle(), torch.cuda.CUDAGraph()
        with capturing(keeper, pool):
            torch.zeros(1, device=device)
        _pools[device] = (pool, keeper)
    return _pools[device][0]


def _capture(
    run: Run,
    hidden_states: torch.Tensor,
    rotary: Rotary | None,
    bucket: int,
    count: int,
    longest: int,
    keep: Sequence[int],
    backend: str,
) -> _Captured:
    device = hidden_states.device
    with torch.inference_mode(False), torch.no_grad():
        tokens = torch.zeros(bucket, hidden_states.shape[1], dtype=hidden_states.dtype, device=device)
        static_rotary = None
        if rotary is not None:
            static_rotary = tuple(torch.zeros(bucket, *x.shape[1:], dtype=x.dtype, device=device) for x in rotary)
        # Any valid division will do while capturing; the last border, behind the padding, never changes.
        borders = [bucket * i // count for i in range(count)] + [bucket]
        cu_seqlens = torch.tensor(borders, dtype=torch.int32, device=device)
        # No lengths: only kernels that read cu_seqlens on the device can be replayed for other segments.
        static = PackedSegments(cu_seqlens, longest, ())
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            run(tokens, static, static_rotary, keep, backend)
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with capturing(graph, shared_pool(device)):
            states = run(tokens, static, static_rotary, keep, backend)
    return _Captured(graph, tokens, static_rotary, cu_seqlens, states)
