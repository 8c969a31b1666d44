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
    """Not partitioned by ZeRO-3 or FSDP: those run the same schedule on every rank, idle weights or not."""
    return not hasattr(parameter, "ds_id") and not getattr(parameter, "_fsdp_flattened", False)


def join_idle(model: Any, states: Sequence[torch.Tensor], layers_run: int) -> tuple[torch.Tensor, ...]:
    """``states``, tied to the trained weights of ``model`` that they do not depend on, whose gradients become zeros.

    LLaVA selects a hidden state below the top: the blocks above it, the final norm and a pooling head are not run.
    Without a gradient of theirs DDP stops at the second step, and an optimizer has no state to save for them.

    model: with ``encoder.layers``, of which ``layers_run`` have run. (Weights outside the blocks are few: all of them
    are tied, and those that were used get nothing more than a zero added.)
    """
    if not torch.is_grad_enabled():
        return tuple(states)
    parts = [m for m in model.children() if m is not model.encoder] + list(model.encoder.layers[layers_run:])
    weights = list(model.parameters(recurse=False)) + [p for m in parts for p in state_of(m).snapshot().weights]
    idle = [p for p in weights if p.requires_grad and is_whole(p)]
    first, *rest = states
    return (_ZeroGradients.apply(first, *idle) if idle else first, *rest)


def checkpoint_input(block: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """The input of a block that is checkpointed: it asks for a gradient where the block is trained above frozen ones.

    The weights of a block are no inputs of its checkpoint. A reentrant one (the default of transformers before 5) gives
    them gradients only if an input asks for one.
    """
    if hidden_states.requires_grad or not torch.is_grad_enabled():
        return hidden_states
    if any(p.requires_grad for p in state_of(block).snapshot().weights):
        return hidden_states.detach().requires_grad_()
    return hidden_states
