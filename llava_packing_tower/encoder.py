"""The encoder core: a stack of blocks over one packed sequence. All families run through this file."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable, Sequence

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .attention import backend_module, resolve_backend
from .compiling import call_compiled, compile_wanted, constant_floats
from .fused import fused_block, fused_wanted, kind_of, settled
from .graphs import graphs_wanted, run_graphed
from .layers import BlockConfig, EncoderBlock, Rotary
from .module_state import Snapshot, addresses, state_of
from .packing import PackedSegments
from .participation import checkpoint_input
from .tracing import traced

logger = logging.getLogger(__name__)


def compute_dtype(hidden_states: torch.Tensor) -> torch.dtype:
    """The dtype that the linears will put out: autocast's where it is on, else that of the input."""
    kind = hidden_states.device.type
    if hasattr(torch, "get_autocast_dtype"):  # torch 2.4 and newer
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden_states.dtype
    if kind == "cuda" and torch.is_autocast_enabled():
        return torch.get_autocast_gpu_dtype()
    return hidden_states.dtype


@functools.cache
def _log_how(how: str, foreign: str | None) -> None:
    logger.info("encoder blocks: %s%s", how, "" if foreign is None else f" ({foreign})")


@functools.cache
def _fresh_block(config: BlockConfig) -> EncoderBlock:
    with torch.device("meta"):
        return EncoderBlock(config)


class PackedEncoder(nn.Module):
    """``num_layers`` blocks.

    ``attention_backend`` is a backend's name or ``auto``; ``compile_blocks`` is True (torch.compile), False (eager), or
    None for the default: on CUDA fused where that can be (see :mod:`fused`), else compiled. ``fused_blocks`` True or
    False overrides it.
    """

    def __init__(self, config: BlockConfig, num_layers: int) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.attention_backend = "auto"
        self.compile_blocks: bool | None = None
        self.fused_blocks: bool | None = None
        self.ran_as: str | None = None  # how the last call ran the blocks, for reports
        self.config = config
        self.layers = nn.ModuleList(EncoderBlock(config) for _ in range(num_layers))
        # The two names that transformers' gradient_checkpointing_enable() looks for and sets.
        self.gradient_checkpointing = False
        self._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        segments: PackedSegments,
        rotary: Rotary | None,
        keep: Iterable[int],
    ) -> tuple[torch.Tensor, ...]:
        """Run as many blocks as ``keep`` asks for and return the wanted states.

        Args:
            hidden_states: ``[N, hidden]`` input of block 0.
            segments: metadata of the packed sequence.
            rotary: cosines and sines ``[N, 1, head_dim]``, or None.
            keep: indices of the states to return; 0 is the input of block 0, i the output of block i.

        Returns:
            ``[N, hidden]`` for each index of ``keep``, in its order: a tuple, because the hooks of DeepSpeed's ZeRO-3
            look for tensors in tuples and not in a dict by number. Blocks above the highest index are not run.
        """
        keep, device = tuple(keep), hidden_states.device
        dtype = compute_dtype(hidden_states)
        if traced(hidden_states):
            state = Snapshot(list(self.parameters()), False, "traced", 0)
        else:
            state = state_of(self).snapshot()
        # (The copies that DataParallel makes hold no parameters.)
        trained = hidden_states.requires_grad or not state.weights or any(p.requires_grad for p in state.weights)
        grad = torch.is_grad_enabled() and trained
        backend = resolve_backend(
            self.attention_backend, device, dtype, self.head_dim, lengths=segments.lengths, needs_grad=grad
        )
        how = self.ran_as = self.how(hidden_states, dtype, backend, state)
        if state.foreign != "traced":
            _log_how(how, state.foreign)
        run = functools.partial(self.run, how=how)
        still = how != "eager" and not state.hooked
        with torch.set_grad_enabled(grad), constant_floats(how == "compiled"):
            if still and graphs_wanted(device, hidden_states.shape[0], grad):
                place = hash((addresses(state.weights), state.version, how))
                states = run_graphed(self, run, hidden_states, segments, rotary, keep, backend, place)
            else:
                states = run(hidden_states, segments, rotary, keep, backend)
        return tuple(states[index].to(device) for index in keep)  # (the blocks may lie on several)

    def fresh_block(self) -> EncoderBlock:
        """What each block was when it was made, without values (see :func:`module_state.foreign_part`)."""
        return _fresh_block(self.config)

    def how(self, hidden_states: torch.Tensor, dtype: torch.dtype, backend: str, state: Snapshot) -> str:
        """How the blocks are run: ``fused``, ``compiled`` or ``eager``.

        The hooks of DeepSpeed's ZeRO-3 and FSDP gather the weights of a block when it is called, which compiled code
        would not see. Blocks with a part that is not plainly ours are called, whatever was asked for.
        """
        if not backend_module(backend).VARLEN:
            return "eager"
        choice = self.fused_blocks
        if choice is None and (self.compile_blocks is not None or not compile_wanted(None, hidden_states.device)):
            choice = False
        if state.foreign is not None or not state.weights:
            return "eager"
        if fused_wanted(choice, self.config, hidden_states, state.weights[0], dtype):
            return "fused"
        return "compiled" if compile_wanted(self.compile_blocks, hidden_states.device) and not state.hooked else "eager"

    def run(
        self,
        hidden_states: torch.Tensor,
        segments: PackedSegments,
        rotary: Rotary | None,
        keep: Sequence[int],
        backend: str,
        how: str,
    ) -> dict[int, torch.Tensor]:
        """The blocks, one after the other; see :meth:`forward` and :meth:`how`. The states are returned by index."""
        states = {0: hidden_states} if 0 in keep else {}
        pending = None
        body, settle, grad = None, torch.add, torch.is_grad_enabled()
        if how == "fused":
            body, settle = functools.partial(fused_block, kind_of(self.config), grad), functools.partial(settled, grad)
            if not grad:
                hidden_states = hidden_states.clone(memory_format=torch.contiguous_format)  # blocks write into it
        if how == "compiled":
            # The first block gets the same kind of arguments as the others: else it would be compiled on its own.
            pending = torch.zeros_like(hidden_states, requires_grad=hidden_states.requires_grad)
        for index, layer in enumerate(self.layers[: max(keep)], start=1):
            if how == "compiled":
                run = functools.partial(call_compiled, self.config, layer)
            else:
                run = layer if body is None else functools.partial(layer, body=body)
            if self.gradient_checkpointing and self.training:
                hidden_states = checkpoint_input(layer, hidden_states)
                if hidden_states.requires_grad:  # else there is nothing to compute again
                    run = functools.partial(self._gradient_checkpointing_func, run)
            hidden_states, pending = run(hidden_states, pending, segments, rotary, backend)
            if index in keep:
                states[index] = settle(hidden_states, pending)
        return states
