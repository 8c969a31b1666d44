"""CUDA graphs for training with checkpointing, where launching kernels takes longer than running them.

A stack of layers that are alike has one copy of a layer, its stand-in, and of that two graphs per token bucket: one
runs the layer, one runs it again and differentiates it. For each layer its weights and its input are copied to where
the graphs read them; what the graphs wrote is copied out. Copying a layer of a small model takes tens of microseconds
of the GPU, launching its kernels three times takes milliseconds of the host.

The batch is padded up to the bucket with a segment of its own, which no token sees and whose gradient is zero.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from ...data.cached_metadata import CachedMetadata
from ...data.segments import VarlenMetadata
from ...utils import environment
from ...utils.tracing import is_plain
from . import cuda_graphs
from .cuda_graphs import BUCKET, my_turn

logger = logging.getLogger(__name__)

MAX_TOKENS, MAX_WORK, MAX_WEIGHTS = 12288, 2e11, 1e8
"""Of a batch; tokens times weights of a layer; weights of a layer. Beyond them a GPU takes longer than the host, and
copies cost more than they save: measured on an H200 with layers of 15 million weights, where batches of 5,400 to 6,900
tokens took half of the time that they took without graphs, 12,000 three quarters, 18,000 the same, 24,000 4 % more."""
FINE_UP_TO = 4096
"""Tokens up to which buckets have BUCKET; from there on twice as much, so that there are fewer kinds of batches."""
MOST = 256
"""The number of kinds of batches whose graphs are kept."""

Tables = tuple[torch.Tensor, ...]
Run = Callable[[nn.Module, torch.Tensor, VarlenMetadata, Tables], torch.Tensor]


def worth_a_graph(weights: int, tokens: int) -> bool:
    """Whether the host is what a layer with so many weights would wait for."""
    return tokens <= MAX_TOKENS and weights <= MAX_WEIGHTS and weights * tokens <= MAX_WORK


def is_plain_checkpoint(function: object) -> bool:
    """Whether a checkpoint function is torch's, with whatever options: one that offloads what it keeps is not."""
    return getattr(function, "func", function) is checkpoint


def capture(function: Callable[[], object], device: torch.device) -> Callable[[], None]:
    """Run ``function``, capture it, and return what replays it."""
    metadata, graph = CachedMetadata(), torch.cuda.CUDAGraph()
    with metadata.making():
        function()
    stream, current = _streams.setdefault(device, torch.cuda.Stream(device)), torch.cuda.current_stream(device)
    stream.wait_stream(current)
    # (torch.cuda.graph would empty the allocator's cache each time, which the next step has to fill again.)
    with torch.cuda.stream(stream), metadata.giving_again():
        graph.capture_begin(pool=cuda_graphs.pool(device), capture_error_mode="thread_local")
        try:
            function()
        except BaseException as error:
            with contextlib.suppress(RuntimeError):  # of a capture that is broken: the first error is the one to see
                graph.capture_end()
            if isinstance(error, RuntimeError) and not isinstance(error, torch.cuda.OutOfMemoryError):
                raise RuntimeError(
                    f"a layer cannot be captured as a CUDA graph: set {environment.GRAPHS}=0 to train without ({error})"
                ) from error
            raise
        graph.capture_end()
    current.wait_stream(stream)

    def replay() -> None:
        assert metadata is not None  # what was made before must live as long as the graph
        graph.replay()

    return replay


_streams: dict[torch.device, Any] = {}
_graphs: weakref.WeakKeyDictionary[nn.Module, tuple[Hashable, LayerGraphs]] = weakref.WeakKeyDictionary()


def graphs_of(stack: nn.Module, layer: nn.Module, state: Hashable) -> LayerGraphs:
    """The graphs of ``stack``, whose layers are like ``layer``; made anew whenever ``state`` is another: the version of
    its modules and whatever else decides on what a layer runs."""
    weight = next(layer.parameters())
    state = (state, weight.dtype, weight.device)
    if stack not in _graphs or _graphs[stack][0] != state:
        _graphs[stack] = state, LayerGraphs(layer)
    return _graphs[stack][1]


def kinds_of(stack: nn.Module) -> int:
    """The number of kinds of batches that were captured for a stack of layers."""
    return len(_graphs[stack][1].kinds) if stack in _graphs else 0


class _Buffer:
    """Rows ``[MAX_TOKENS, width]`` that graphs read; behind those that are filled there are zeros."""

    def __init__(self, like: torch.Tensor) -> None:
        self.rows, self.filled = like.detach().new_zeros(MAX_TOKENS, like.shape[-1]), 0

    def fill(self, source: torch.Tensor) -> None:
        count = len(source)
        self.rows[:count].copy_(source)
        if self.filled > count:
            self.rows[count : self.filled].zero_()
        self.filled = count


@dataclass
class _Kind:
    """The graphs of one kind of batch, and what they read besides weights and states."""

    trained: tuple[bool, ...]
    segments: VarlenMetadata
    tables: Tables
    sources: tuple[Any, ...] = ()  # the segments and tables that were copied in last
    run: Callable[[], None] = lambda: None
    differentiate: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Batch:
    """What all layers of a pass are given besides their states.

    segments: of the tokens; tables: of each token along ``axis``, for example cosines and sines; how: what else
    decides on what is run; padded: whether tokens may be padded up to a bucket, with a segment of any length.
    """

    segments: VarlenMetadata
    tables: Tables
    axis: int
    how: tuple[Hashable, ...] = ()
    padded: bool = True


def _twice(attempt: Callable[[], _Kind], bucket: int) -> _Kind | None:
    """The second time with what the allocator keeps for later, which is no use to a capture, given back; None, with a
    warning, if the memory does not suffice even so."""
    for is_last in (False, True):
        try:
            return attempt()
        except torch.cuda.OutOfMemoryError as error:
            reason = str(error).split(". ")[0]
        if not is_last:
            torch.cuda.empty_cache()
    logger.warning("no CUDA graphs of layers for batches of %d tokens: %s", bucket, reason)
    return None


class LayerGraphs:
    """The graphs of a stack of layers that are made of the same parts.

    layer: one of them. Its modules are copied, its weights are not.
    """

    def __init__(self, layer: nn.Module) -> None:
        weights = list(layer.parameters())
        self.shapes, self.sizes = [p.shape for p in weights], [p.numel() for p in weights]
        with torch.inference_mode(False), torch.no_grad():
            self.flat = weights[0].new_empty(sum(self.sizes))
            self.grads = torch.empty_like(self.flat)
        parts = zip(weights, self.flat.split(self.sizes), self.shapes, strict=True)
        # (Under ZeRO a weight lies in a storage that holds those of all layers: copying it would copy all.)
        memo: dict[int, Any] = {id(weight): nn.Parameter(part.view(shape)) for weight, part, shape in parts}
        self.stand_in = copy.deepcopy(layer, memo).train()
        for module in self.stand_in.modules():
            if getattr(module, "gradient_checkpointing", False):  # transformers 5 has it in each layer
                vars(module)["gradient_checkpointing"] = False
        self.weights = list(self.stand_in.parameters())
        self.kinds: OrderedDict[tuple, _Kind | None] = OrderedDict()
        self.buffers: dict[str, _Buffer] = {}

    @property
    def device(self) -> torch.device:
        return self.flat.device

    def fits(self, weights: Sequence[torch.Tensor], hidden_states: torch.Tensor) -> bool:
        """Whether a layer has weights of the sizes, the dtype and the device of the stand-in's, all in one piece."""
        dtype, device = self.flat.dtype, self.device
        return (
            hidden_states.dtype == dtype
            and hidden_states.device == device
            and len(weights) == len(self.shapes)
            and is_plain(*weights)
            and all(
                p.shape == shape and p.dtype == dtype and p.device == device and p.is_contiguous()
                for p, shape in zip(weights, self.shapes, strict=True)
            )
        )

    def __call__(
        self, weights: Sequence[torch.Tensor], hidden_states: torch.Tensor, batch: Batch, run: Run
    ) -> torch.Tensor | None:
        """``run(layer, hidden_states, batch.segments, batch.tables)``, ``[N, hidden]``, of a layer with these weights;
        None where there was no memory for the graphs of such a batch.

        ``run`` must do the same for each layer, and the same as before for a batch with an equal ``how``.
        """
        with my_turn(self.device):
            kind = self._kind(weights, hidden_states, batch, run)
        return None if kind is None else _Recomputed.apply(self, kind, batch, hidden_states, *weights)

    # ------------------------------------------------------------ kinds

    def _kind(
        self, weights: Sequence[torch.Tensor], hidden_states: torch.Tensor, batch: Batch, run: Run
    ) -> _Kind | None:
        tokens, segments = hidden_states.shape[0], batch.segments
        bucket, longest = tokens, segments.max_seqlen
        if batch.padded:
            step = BUCKET if tokens <= FINE_UP_TO else 2 * BUCKET
            bucket = -(-tokens // step) * step
            # A power of two: blocks of a kernel that begin behind their segment end at once.
            longest = max(BUCKET, 1 << (max(longest, bucket - tokens) - 1).bit_length())
        count = len(segments.lengths) + (bucket > tokens)
        trained = tuple(p.requires_grad for p in weights)
        shapes = tuple((x.shape[: batch.axis], x.shape[batch.axis + 1 :], x.dtype) for x in batch.tables)
        key = (bucket, count, longest, trained, batch.axis, shapes, batch.how)
        if key not in self.kinds:
            attempt = functools.partial(self._capture, weights, hidden_states, batch, run, bucket, count, longest)
            self.kinds[key] = _twice(attempt, bucket)
            if len(self.kinds) > MOST:
                self.kinds.popitem(last=False)
        self.kinds.move_to_end(key)
        return self.kinds[key]

    def _capture(
        self,
        weights: Sequence[torch.Tensor],
        hidden_states: torch.Tensor,
        batch: Batch,
        run: Run,
        bucket: int,
        count: int,
        longest: int,
    ) -> _Kind:
        device, trained = self.device, tuple(p.requires_grad for p in weights)
        with torch.inference_mode(False), torch.no_grad():
            if not self.buffers:
                self.buffers = {name: _Buffer(hidden_states) for name in ("states", "grad", "out", "back")}
            states, given, out, back = (buffer.rows[:bucket] for buffer in self.buffers.values())
            tables = tuple(
                x.new_zeros(*x.shape[: batch.axis], bucket, *x.shape[batch.axis + 1 :]) for x in batch.tables
            )
            # Any valid division will do while capturing; the last border, behind the padding, never changes.
            borders = [bucket * i // count for i in range(count)] + [bucket]
            cu_seqlens = torch.tensor(borders, dtype=torch.int32, device=device)
            torch.cat([p.detach().view(-1) for p in weights], out=self.flat)
        # No lengths: only kernels that read cu_seqlens on the device can be replayed for other segments.
        kind = _Kind(trained, VarlenMetadata(cu_seqlens, longest, ()), tables)
        wanted = [weight for weight, is_trained in zip(self.weights, trained, strict=True) if is_trained]

        def forward() -> None:
            with torch.no_grad():
                out.copy_(run(self.stand_in, states, kind.segments, tables))

        def backward() -> None:
            for weight, is_trained in zip(self.weights, trained, strict=True):
                weight.requires_grad_(is_trained)
            with torch.enable_grad():
                x = states.detach().requires_grad_()
                y = run(self.stand_in, x, kind.segments, tables)
                grads = torch.autograd.grad(y, [x, *wanted], given)
            back.copy_(grads[0])
            if wanted:
                flat = [grad.reshape(-1) for grad in grads[1:]]
                torch.cat(flat, out=self.grads[: sum(map(len, flat))])

        with torch.inference_mode(False):
            kind.run, kind.differentiate = capture(forward, device), capture(backward, device)
        return kind

    # ------------------------------------------------------------ replays

    def _load(self, kind: _Kind, batch: Batch, hidden_states: torch.Tensor, weights: Sequence[torch.Tensor]) -> None:
        torch.cat([p.detach().view(-1) for p in weights], out=self.flat)
        self.buffers["states"].fill(hidden_states)
        sources = (batch.segments, *batch.tables)
        if len(kind.sources) == len(sources) and all(a is b for a, b in zip(kind.sources, sources, strict=True)):
            return
        count = len(batch.segments.lengths) + 1
        kind.segments.cu_seqlens[:count].copy_(batch.segments.cu_seqlens)
        for table, source in zip(kind.tables, batch.tables, strict=True):
            table.narrow(batch.axis, 0, source.shape[batch.axis]).copy_(source)
        kind.sources = sources

    @torch.no_grad()
    def run(
        self, kind: _Kind, batch: Batch, hidden_states: torch.Tensor, weights: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        with my_turn(self.device):
            self._load(kind, batch, hidden_states, weights)
            kind.run()
            return self.buffers["out"].rows[: hidden_states.shape[0]].clone()

    @torch.no_grad()
    def differentiate(
        self,
        kind: _Kind,
        batch: Batch,
        hidden_states: torch.Tensor,
        weights: Sequence[torch.Tensor],
        grad: torch.Tensor,
    ) -> list[torch.Tensor | None]:
        """Gradients of the states and of each weight, None for one that is not trained."""
        with my_turn(self.device):
            self._load(kind, batch, hidden_states, weights)
            self.buffers["grad"].fill(grad)
            kind.differentiate()
            back = self.buffers["back"].rows[: hidden_states.shape[0]].clone()
            sizes = [size for size, wanted in zip(self.sizes, kind.trained, strict=True) if wanted]
            flat = iter(self.grads[: sum(sizes)].clone().split(sizes))
        found = [
            next(flat).view(shape) if wanted else None for shape, wanted in zip(self.shapes, kind.trained, strict=True)
        ]
        return [back, *found]


class _Recomputed(torch.autograd.Function):
    """A layer by graphs, of which nothing but the input is kept for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, graphs: LayerGraphs, kind: _Kind, batch: Batch, hidden_states: torch.Tensor, *weights: torch.Tensor
    ) -> torch.Tensor:
        ctx.graphs, ctx.kind, ctx.batch = graphs, kind, batch
        ctx.save_for_backward(hidden_states, *weights)
        return graphs.run(kind, batch, hidden_states, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_states, *weights = ctx.saved_tensors
        return None, None, None, *ctx.graphs.differentiate(ctx.kind, ctx.batch, hidden_states, weights, grad)
