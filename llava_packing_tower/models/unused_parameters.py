"""Every trained weight gets a gradient in every step, because data-parallel training waits for each of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .runtime.module_state import state_of


class _ZeroGradients(torch.autograd.Function):
    """The first tensor unchanged; the others get gradients of zeros, without being read."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        ctx.others = [(p.shape, p.dtype, p.device) for p in others]
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, ...]:
        (gradient,) = gradients
        return gradient, *(torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.others)


def is_whole(parameter: torch.Tensor) -> bool:
    """Whether a weight is not partitioned. (ZeRO-3 and FSDP run the same schedule on every rank, with unused weights or
    without.)"""
    return not hasattr(parameter, "ds_id") and not getattr(parameter, "_fsdp_flattened", False)


def join_idle(model: Any, states: Sequence[torch.Tensor], layers_run: int) -> tuple[torch.Tensor, ...]:
    """``states`` (any shapes), connected to the trained weights of ``model`` that they do not depend on: those get
    gradients of zeros.

    LLaVA selects a hidden state below the top, so the blocks above it, the final norm and a pooling head are not run.
    If their weights got no gradient, DDP would stop at the second step, and the optimizer would have no state to save.

    model: with ``encoder.layers``, of which ``layers_run`` have run. (Weights outside the blocks are few: all of them
    are connected, which adds zeros to the gradients of those that were used.)
    """
    if not torch.is_grad_enabled():
        return tuple(states)
    parts = [m for m in model.children() if m is not model.encoder] + list(model.encoder.layers[layers_run:])
    weights = list(model.parameters(recurse=False)) + [p for m in parts for p in state_of(m).snapshot().weights]
    idle = [p for p in weights if p.requires_grad and is_whole(p)]
    first, *rest = states
    return (_ZeroGradients.apply(first, *idle) if idle else first, *rest)


def checkpoint_input(block: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """The input ``[N, hidden]`` of a checkpointed block; it requires a gradient if the block is trained.

    The weights of a block are not inputs of its checkpoint. A reentrant checkpoint (the default of transformers before
    5) gives them gradients only if an input requires one, which it does not above frozen blocks.
    """
    if hidden_states.requires_grad or not torch.is_grad_enabled():
        return hidden_states
    if any(p.requires_grad for p in state_of(block).snapshot().weights):
        return hidden_states.detach().requires_grad_()
    return hidden_states
