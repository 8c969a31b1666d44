"""FlashAttention-2's kernel: what it takes, and flash-attn 2.7 and 2.8 without torch's custom operators around it.

Each call of a custom operator costs the host more than the launch of the kernel inside: 0.6 ms per block and training
step on a slow CPU, a quarter of a step of 8 ragged images. The functions inside of them have no public name. Where they
are not found, or take other parameters, flash-attn's public function is called.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ..data.segments import VarlenMetadata

PARAMETERS = frozenset({"cu_seqlens_q", "max_seqlen_q", "window_size_left", "softcap"})


def unsupported_tensors(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why the kernel of FlashAttention-2, of its own package or inside PyTorch, does not take such tensors, or None."""
    if device.type != "cuda":
        return "needs a CUDA GPU"
    if dtype not in (torch.float16, torch.bfloat16):
        return "needs float16 or bfloat16"
    if head_dim % 8 or head_dim > 256:
        return "head width must be a multiple of 8 and at most 256"
    if torch.cuda.get_device_capability() < (8, 0):
        return "needs an Ampere GPU or newer"
    return None


def functions(interface: ModuleType) -> tuple[Callable | None, Callable | None]:
    """Forward and backward of ``flash_attn.flash_attn_interface``; (None, None) where they are not as expected."""
    operators = (
        getattr(interface, name, None) for name in ("_flash_attn_varlen_forward", "_flash_attn_varlen_backward")
    )
    forward, backward = (getattr(operator, "_init_fn", None) for operator in operators)
    known = all(
        function and inspect.signature(function).parameters.keys() >= PARAMETERS for function in (forward, backward)
    )
    return (forward, backward) if known else (None, None)


def make_attention(forward: Callable, backward: Callable) -> type[torch.autograd.Function]:
    """The autograd function of :func:`functions`: ``apply(q, k, v, segments, scale, causal)``."""

    class Attention(torch.autograd.Function):
        """flash-attn's kernels, without dropout, window, or anything else that is not used here."""

        @staticmethod
        def forward(
            ctx: Any,
            q: torch.Tensor,
            k: torch.Tensor,
            v: torch.Tensor,
            segments: VarlenMetadata,
            scale: float,
            causal: bool = False,
        ) -> torch.Tensor:
            cu, longest = segments.cu_seqlens, segments.max_seqlen
            out, logsumexp, _, state = forward(q, k, v, cu, cu, longest, longest, 0.0, scale, causal)
            ctx.save_for_backward(q, k, v, out, logsumexp, cu, state)
            ctx.longest, ctx.scale, ctx.causal = longest, scale, causal
            return out

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
            q, k, v, out, logsumexp, cu, state = ctx.saved_tensors
            grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)]
            backward(
                *(*grad_outputs, q, k, v, out, logsumexp, *grads, cu, cu, ctx.longest, ctx.longest),
                *(0.0, ctx.scale, ctx.causal, -1, -1, 0.0, None, torch.are_deterministic_algorithms_enabled(), state),
            )
            return *grads, None, None, None

    return Attention
