"""Activations: transformers' own, and faster forms of the two GELUs for compiled half-precision code."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn
from transformers.activations import ACT2FN

HALF = (torch.float16, torch.bfloat16)

# erfc(z) = t * (a1 + t * (a2 + ...)) * exp(-z^2), t = 1 / (1 + p * z), z >= 0, absolute error below 1.5e-7:
# Abramowitz and Stegun, Handbook of Mathematical Functions (1964), 7.1.26.
_P = 0.3275911
_A = (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429)


def normal_cdf(x: torch.Tensor) -> torch.Tensor:
    """Standard normal distribution function of float32 ``x``, error below 3e-7."""
    t = 1.0 / (x.abs() * (_P / math.sqrt(2)) + 1.0)
    series = t * (_A[0] + t * (_A[1] + t * (_A[2] + t * (_A[3] + t * _A[4]))))
    tail = 0.5 * series * torch.exp(x * x * -0.5)
    return torch.where(x > 0, 1.0 - tail, tail)


def fast_gelu(x: torch.Tensor) -> torch.Tensor:
    """``x * Phi(x)``, the exact GELU; half the arithmetic of ``erf`` where a compiler fuses it into one kernel.

    Its own derivative is that of the GELU to 6e-7.
    """
    x32 = x.float()
    return (x32 * normal_cdf(x32)).to(x.dtype)


class Gelu(nn.Module):
    """The exact GELU (Hendrycks and Gimpel 2016)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling() and x.dtype in HALF:
            return fast_gelu(x)
        return nn.functional.gelu(x)


class GeluTanh(nn.Module):
    """The tanh form of GELU; compiled as the equal ``x * sigmoid(2u)``, ``u = sqrt(2/pi) * (x + 0.044715 x^3)``."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling() and x.dtype in HALF:
            x32 = x.float()
            u = math.sqrt(8 / math.pi) * (x32 + 0.044715 * x32 * x32 * x32)
            return (x32 * torch.sigmoid(u)).to(x.dtype)
        return nn.functional.gelu(x, approximate="tanh")


_OWN: dict[str, type[nn.Module]] = {"gelu": Gelu, "gelu_pytorch_tanh": GeluTanh}


def activation(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """The activation of that name: ours for the GELUs, else transformers'."""
    return _OWN[name]() if name in _OWN else ACT2FN[name]
