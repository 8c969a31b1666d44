"""FlashAttention-4 (https://github.com/Dao-AILab/flash-attention, package ``flash-attn-4``): forward and backward for
Hopper and Blackwell, built by CuTe's compiler when first called: there is nothing to build when it is installed."""

from __future__ import annotations

import inspect

import torch

from ..data.segments import VarlenMetadata

VARLEN = CHECKED = True
INSTALL = 'pip install --pre "flash-attn-4[cu13]" (without [cu13] for CUDA 12)'
RIGHT_BACKWARD = (64, 96, 128)  # 4.0.0b36 on Hopper: the gradient of q is wrong for heads of 72
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
    if needs_grad and head_dim not in RIGHT_BACKWARD:
        return f"its gradients are known to be right for heads of {', '.join(map(str, RIGHT_BACKWARD))} only"
    return missing_package


@torch.compiler.disable
def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    segments: VarlenMetadata,
    scale: float,
    causal: bool = False,
) -> torch.Tensor:
    out = flash_attn_varlen_func(
        *(q, k, v),
        cu_seqlens_q=segments.cu_seqlens,
        cu_seqlens_k=segments.cu_seqlens,
        max_seqlen_q=segments.max_seqlen,
        max_seqlen_k=segments.max_seqlen,
        softmax_scale=scale,
        causal=causal,
    )
    return out[0] if isinstance(out, tuple) else out
