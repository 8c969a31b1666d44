"""Activations by the names of transformers' configs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from transformers.activations import ACT2FN

HALF = (torch.float16, torch.bfloat16)


def activation(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """The elementwise activation of that name, a key of transformers' ``ACT2FN``."""
    if name == "gelu":
        return nn.GELU()
    return nn.GELU(approximate="tanh") if name == "gelu_pytorch_tanh" else ACT2FN[name]
