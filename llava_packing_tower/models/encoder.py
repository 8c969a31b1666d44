"""The encoder core: a stack of blocks over one packed sequence. All families run through this file."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..attention.dispatch import backend_module
from ..data.segments import LayerSegments, Segments, VarlenMetadata
from ..utils.tracing import traced
from .layers import BlockConfig, EncoderBlock, Rotary
from .runtime.cuda_graphs import run_blocks
from .runtime.execution import FUSED, ExecutionPlan, compute_dtype, is_autocast, plan_kinds
from .runtime.fused import block_spec_of, fused_block, settled
from .runtime.layer_graphs import Batch, Tables, graphs_of, is_plain_checkpoint
from .runtime.module_state import Snapshot, addresses, state_of
from .unused_parameters import checkpoint_input


@functools.cache
def _fresh_block(config: BlockConfig) -> EncoderBlock:
    with torch.device("meta"):
        return EncoderBlock(config)


class PackedEncoder(nn.Module):
    """``num_layers`` blocks.

    ``attention_backend`` is a backend's name or ``auto``; ``fused`` is False (eager blocks), True (fused ones wherever
    that can be) or None for the default (see :func:`execution.make_plan`). ``last_plan`` is how the last call ran.
    """

    def __init__(self, config: BlockConfig, num_layers: int) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.attention_backend = "auto"
        self.fused: bool | None = None
        self.last_plan: ExecutionPlan | None = None  # for reports
        self.config = config
        self.layers = nn.ModuleList(EncoderBlock(config) for _ in range(num_layers))
        # The two names that transformers' gradient_checkpointing_enable() looks for and sets.
        self.gradient_checkpointing = False
        self._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)
        self.runs_several_times = False
        """In one step, so that a reentrant checkpoint would finish the gradient of a weight several times."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        segments: Segments,
        rotary: Rotary | None,
        keep: Iterable[int],
    ) -> tuple[torch.Tensor, ...]:
        """Run as many blocks as ``keep`` asks for and return the wanted states.

        Args:
            hidden_states: ``[N, hidden]`` input of block 0.
            segments: metadata of the packed sequence, the same for all blocks or each its own.
            rotary: cosines and sines ``[N, 1, head_dim]``, or None.
            keep: indices of the states to return; 0 is the input of block 0, i the output of block i.

        Returns:
            ``[N, hidden]`` for each index of ``keep``, in its order: a tuple, because the hooks of DeepSpeed's ZeRO-3
            look for tensors in tuples and not in a dict by number. Blocks above the highest index are not run.
        """
        keep, device = tuple(keep), hidden_states.device
        if traced(hidden_states):
            state = Snapshot(list(self.parameters()), False, "traced", 0)
        else:
            state = state_of(self).snapshot()
        # (The copies that DataParallel makes hold no parameters.)
        trained = hidden_states.requires_grad or not state.weights or any(p.requires_grad for p in state.weights)
        grad = torch.is_grad_enabled() and trained
        kinds = segments.kinds if isinstance(segments, LayerSegments) else (segments,)
        lengths = [kind.lengths for kind in kinds]
        replayable = self.is_checkpointed and is_plain_checkpoint(self._gradient_checkpointing_func)
        recomputed = sum(p.numel() for p in self.layers[0].parameters()) if replayable else 0
        plan, backends = plan_kinds(
            self.config, hidden_states, lengths, state, grad, self.attention_backend, self.fused, recomputed
        )
        self.last_plan, dtype = plan, hidden_states.dtype
        if plan.path == FUSED:
            hidden_states = hidden_states.to(compute_dtype(hidden_states))
        run = functools.partial(self.run, path=plan.path, cast=is_autocast(device))
        with torch.set_grad_enabled(grad):
            if plan.graph and grad:
                states = run(hidden_states, segments, rotary, keep, backends, graphs=state.version)
            elif plan.graph and isinstance(segments, VarlenMetadata):
                place = hash((addresses(state.weights), state.version))
                states = run_blocks(self, run, hidden_states, segments, rotary, keep, plan.backend, place)
            else:
                states = run(hidden_states, segments, rotary, keep, backends)
        return tuple(states[index].to(device, dtype) for index in keep)  # (the blocks may lie on several devices)

    @property
    def is_checkpointed(self) -> bool:
        return self.gradient_checkpointing and self.training

    def _checkpoint(self, *call: Any) -> Any:
        if self.runs_several_times:
            return checkpoint(*call, use_reentrant=False)
        return self._gradient_checkpointing_func(*call)

    def fresh_block(self) -> EncoderBlock:
        """What each block was when it was made, without values (see :func:`module_state.foreign_part`)."""
        return _fresh_block(self.config)

    def run(
        self,
        hidden_states: torch.Tensor,
        segments: Segments,
        rotary: Rotary | None,
        keep: Sequence[int],
        backends: str | tuple[str, ...],
        path: str,
        cast: bool = False,
        graphs: int | None = None,
    ) -> dict[int, torch.Tensor]:
        """The blocks, one after the other, by number of the wanted states; see :meth:`forward`.

        backends: of attention, of each kind of segments; path: of the plan; cast: whether fused blocks read their
        weights in the dtype of the states; graphs: the version of the modules, if checkpointed blocks are replayed.
        """
        states = {0: hidden_states} if 0 in keep else {}
        pending: Any = None
        body, settle, grad = None, torch.add, torch.is_grad_enabled()
        if path == FUSED:
            body = functools.partial(fused_block, block_spec_of(self.config), grad, cast)
            settle = functools.partial(settled, grad)
            if not grad:
                hidden_states = hidden_states.clone(memory_format=torch.contiguous_format)  # blocks write into it
        if isinstance(segments, VarlenMetadata):
            segments = LayerSegments((segments,), (0,) * len(self.layers))
        backends = (backends,) if isinstance(backends, str) else backends
        recompute = None if graphs is None else self._by_graphs(graphs, hidden_states, segments, rotary, backends, body)
        for index, layer in enumerate(self.layers[: max(keep)], start=1):
            kind = segments.of_block[index - 1]
            if recompute is not None:
                hidden_states = recompute(layer, kind, hidden_states)
            else:
                run = layer if body is None else functools.partial(layer, body=body)
                if self.is_checkpointed:
                    hidden_states = checkpoint_input(layer, hidden_states)
                    if hidden_states.requires_grad:  # else there is nothing to compute again
                        run = functools.partial(self._checkpoint, run)
                hidden_states, pending = run(hidden_states, pending, segments.kinds[kind], rotary, backends[kind])
            if index in keep:
                states[index] = settle(hidden_states, pending)
        return states

    def _by_graphs(
        self,
        version: int,
        hidden_states: torch.Tensor,
        segments: LayerSegments,
        rotary: Rotary | None,
        backends: tuple[str, ...],
        body: Any,
    ) -> Callable[[Any, int, torch.Tensor], torch.Tensor] | None:
        """What runs a block, with a kind of segments, on ``[N, hidden]`` states, by :mod:`.runtime.layer_graphs`; None
        if their weights have not all the sizes of the first one's."""
        graphs = graphs_of(self, self.layers[0], version)
        weights = {layer: list(layer.parameters()) for layer in self.layers}
        if not all(graphs.fits(each, hidden_states) for each in weights.values()):
            return None
        batches = [
            Batch(kind, rotary or (), 0, (name,), not getattr(backend_module(name), "EQUAL_LENGTHS_ONLY", False))
            for kind, name in zip(segments.kinds, backends, strict=True)
        ]

        def block(
            backend: str, layer: nn.Module, states: torch.Tensor, segments: VarlenMetadata, tables: Tables
        ) -> torch.Tensor:
            return settled(True, *layer(states, None, segments, tables or None, backend, body=body))

        def recompute(layer: Any, kind: int, states: torch.Tensor) -> torch.Tensor:
            run = functools.partial(block, backends[kind])
            out = graphs(weights[layer], states, batches[kind], run)
            if out is None:
                call = functools.partial(layer, body=body)
                given = (checkpoint_input(layer, states), None, segments.kinds[kind], rotary, backends[kind])
                return settled(True, *self._checkpoint(call, *given))
            return out

        return recompute
