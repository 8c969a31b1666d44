"""The backward of :func:`rotation.rotated` on a GPU, in Triton (https://triton-lang.org)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _kernel(
    grad_q,
    grad_k,
    grad_v,
    cos,
    sin,
    out,
    WIDTH: tl.constexpr,
    HEAD: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One token and one of q, k, v per program."""
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    target = out + (token * 3 + part) * WIDTH + column
    if part == 2:
        tl.store(target, tl.load(grad_v + token * WIDTH + column, mask=inside), mask=inside)
    else:
        lane = column % HEAD
        if PAIRS:
            first, step = lane % 2 == 0, 1
        else:
            first, step = lane < HEAD // 2, HEAD // 2
        # The forward is y = x * cos + rotate(x) * sin, with minus the second in the place of the first of two partners.
        across = tl.where(first, step, -step)
        source = token * WIDTH + column
        if part == 0:
            own = tl.load(grad_q + source, mask=inside)
            other = tl.load(grad_q + source + across, mask=inside)
        else:
            own = tl.load(grad_k + source, mask=inside)
            other = tl.load(grad_k + source + across, mask=inside)
        table = token * HEAD + lane
        cosine = tl.load(cos + table, mask=inside)
        sine = tl.load(sin + table + across, mask=inside)
        turned = other.to(tl.float32) * sine
        value = own.to(tl.float32) * cosine + tl.where(first, turned, -turned)
        tl.store(target, value.to(out.dtype.element_ty), mask=inside)


def backward(
    grad_q: torch.Tensor,
    grad_k: torch.Tensor,
    grad_v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    pairs: bool,
) -> torch.Tensor:
    """Gradient of qkv ``[N, 3, heads, head_dim]`` from those of rotated q, of rotated k and of v."""
    tokens, heads, head_dim = grad_v.shape
    out = grad_v.new_empty(tokens, 3, heads, head_dim)
    inputs = [x.contiguous() for x in (grad_q, grad_k, grad_v, cos, sin)]
    width = heads * head_dim
    with torch.cuda.device(out.device):
        _kernel[(tokens, 3)](*inputs, out, width, head_dim, pairs, triton.next_power_of_2(width))
    return out
