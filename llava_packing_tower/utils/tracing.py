"""Whether the current call is traced: its tensors then stand for others, and must not be cached or read."""

from __future__ import annotations

import torch

PLAIN = (torch.nn.Parameter, torch.Tensor)


def is_plain(*tensors: torch.Tensor | None) -> bool:
    """Whether all of these are plain tensors: no quantized weight, no shard, nothing of a trace."""
    return all(x is None or type(x) in PLAIN for x in tensors)


def traced(*tensors: torch.Tensor) -> bool:
    """Whether torch.compile, torch.export, torch.jit or a mode that makes other tensors (``FakeTensorMode``) is at
    work, or one of these tensors is not a plain one."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined]  # it is documented
        return True
    return not is_plain(torch.empty(0), *tensors)
