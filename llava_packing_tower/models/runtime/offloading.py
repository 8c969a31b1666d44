"""Weights that accelerate keeps elsewhere: they are on the meta device until the module that holds them is called."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


def _hooks(module: nn.Module) -> tuple[Any, ...]:
    """accelerate's hooks of a module (``_hf_hook`` is its documented attribute; one hook may be a sequence of them)."""
    hook = getattr(module, "_hf_hook", None)
    return () if hook is None else tuple(getattr(hook, "hooks", (hook,)))


def offloaded_weights(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and value of every weight of ``model`` that a hook of it will load, from wherever it lies, one by one."""
    for prefix, module in model.named_modules():
        for hook in _hooks(module):
            if not getattr(hook, "offload", False) or getattr(hook, "weights_map", None) is None:
                continue
            for name, _ in module.named_parameters(recurse=hook.place_submodules):
                yield f"{prefix}.{name}" if prefix else name, hook.weights_map[name]


def execution_device(model: nn.Module) -> torch.device | None:
    """The device on which accelerate's hooks run ``model`` (its first module that has one), or None."""
    for module in model.modules():
        for hook in _hooks(module):
            device = getattr(hook, "execution_device", None)
            if device is not None:
                return torch.device(device)
    return None
