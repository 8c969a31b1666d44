"""The language model's head on supervised positions only.

A head of 152k words makes 152k logits for each visual token, of which none is trained. Rows that no label asks for add
nothing to the cross entropy, so leaving them out changes neither the loss nor a gradient.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.functional import cross_entropy, pad

from ..data.segments import to_device

IGNORE = -100


def next_labels(labels: torch.Tensor) -> torch.Tensor:
    """The label that each position predicts, ``[B, L]``: that of its right neighbor in the row; none for the last."""
    return pad(labels[:, 1:], (0, 1), value=IGNORE)


def supervised_loss(
    hidden_states: torch.Tensor,
    targets: torch.Tensor,
    head: Callable[[torch.Tensor], torch.Tensor],
    num_items: torch.Tensor | int | None = None,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Cross entropy of the next words, as transformers' ``ForCausalLMLoss`` computes it.

    Args:
        hidden_states: ``[N, hidden]``.
        targets: ``[N]`` from :func:`next_labels`; ``-100`` where nothing is predicted. On the host nothing has to wait
            for a GPU.
        head: from ``[n, hidden]`` to ``[n, words]``. It is called in every case, for no row at all if need be: under
            ZeRO-3 and FSDP other ranks may be waiting in it.
        num_items: what the sum is divided by; the number of supervised positions if left out.
        weights: ``[N]``, where ``targets`` are, what each position counts: the weighted sum is divided by ``num_items``
            alone.

    Returns:
        A scalar in float32, or in float64 for a head in float64. Without a supervised position it is NaN with
        gradients of zero, as transformers' is (0 if ``num_items`` or ``weights`` are given).
    """
    kept = (targets != IGNORE).nonzero().squeeze(1)
    logits = head(hidden_states[to_device(kept, hidden_states.device)])
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    chosen = to_device(targets[kept], logits.device)
    if weights is not None:
        losses = cross_entropy(logits, chosen, reduction="none")
        total = (losses * to_device(weights[kept].to(losses.dtype), losses.device)).sum()
    elif num_items is None:
        return cross_entropy(logits, chosen)
    else:
        total = cross_entropy(logits, chosen, reduction="sum")
    if isinstance(num_items, torch.Tensor):
        num_items = num_items.to(logits.device)
    return total if num_items is None else total / num_items
