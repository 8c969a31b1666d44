"""FlashAttention-4 (https://github.com/Dao-AILab/flash-attention, package ``flash-attn-4``): forward and backward for
Hopper and Blackwell, built by CuTe's compiler when first called: there is nothing to build when it is installed."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ..data.segments import VarlenMetadata

VARLEN = CHECKED = True
INSTALL = 'pip install --pre "flash-attn-4[cu13]" (without [cu13] for CUDA 12)'
# 4.0.0b36 on Hopper: the gradient of q is wrong for heads of 72. In training heads are padded to the next of these.
RIGHT_BACKWARD = (64, 96, 128)
WORTH_PADDING = 40  # flash-attn 2 has kernels for heads of 32, and pads wider ones as well
_NEEDED = {"cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "softmax_scale"}

missing_package = None
try:
    from flash_attn.cute import flash_attn_varlen_func

    if not set(inspect.signature(flash_attn_varlen_func).parameters) >= _NEEDED:
        missing_package = (  # flash-attn 2 comes with an early copy of it
            "attention backend 'flash_attention_4' needs a flash-attn-4 that takes max_seqlen, this one does not. "
            f"Install it: {INSTALL}"
        )
except Exception as error:  # whatever a wrong mix of versions raises: it must not take the other backends down
    reason = f"{type(error).__name__}: {error}"
    missing_package = f"attention backend 'flash_attention_4' needs the flash-attn-4 package ({reason}): {INSTALL}"


def unsupported_reason(device: torch.device, dtype: torch.dtype, head_dim: int, needs_grad: bool = False) -> str | None:
    if device.type != "cuda":
        return "needs a CUDA GPU"
    if torch.cuda.get_device_capability()[0] < 9:
        return "needs a Hopper or Blackwell GPU"
    if dtype not in (torch.float16, torch.bfloat16):
        return "needs float16 or bfloat16"
    if head_dim % 8 or head_dim > 128:
        return "head width must be a multiple of 8 and at most 128"
    if needs_grad and head_dim < WORTH_PADDING:
        return f"in training heads narrower than {WORTH_PADDING} would be padded to {RIGHT_BACKWARD[0]}"
    return missing_package


def _resized(x: torch.Tensor, width: int) -> torch.Tensor:
    """A copy of ``[N, heads, head_dim]`` with the last dimension cut, or padded with zeros, to ``width``.

    Both widths are multiples of 8. Four numbers of half precision are copied as one, which needs fewer instructions.
    """
    if x.stride(-1) != 1 or any(step % 4 for step in (*x.stride()[:-1], x.storage_offset())):
        x = x.contiguous()
    out = x.new_empty(*x.shape[:-1], width)
    both = min(width, x.shape[-1])
    out[..., :both].view(torch.int64).copy_(x[..., :both].view(torch.int64))
    out[..., both:].zero_()
    return out


class _Resize(torch.autograd.Function):
    """:func:`_resized`; its gradient is resized back."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, width: int) -> torch.Tensor:
        ctx.width = x.shape[-1]
        return _resized(x, width)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _resized(grads[0], ctx.width), None


@torch.compiler.disable
def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    segments: VarlenMetadata,
    scale: float,
    causal: bool = False,
) -> torch.Tensor:
    """``[N, heads, head_dim]`` in and out. Heads of widths with wrong gradients are padded with zeros while training.

    Zeros appended to q and k do not change their products, and the result is cut back to ``head_dim``.
    """
    head_dim = q.shape[-1]
    width = next((w for w in RIGHT_BACKWARD if w >= head_dim), head_dim)
    padded = width > head_dim and torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    heads = [_Resize.apply(x, width) for x in (q, k, v)] if padded else (q, k, v)
    out = flash_attn_varlen_func(
        *heads,
        cu_seqlens_q=segments.cu_seqlens,
        cu_seqlens_k=segments.cu_seqlens,
        max_seqlen_q=segments.max_seqlen,
        max_seqlen_k=segments.max_seqlen,
        softmax_scale=scale,
        causal=causal,
    )
    out = out[0] if isinstance(out, tuple) else out
    return _Resize.apply(out, head_dim) if padded else out
