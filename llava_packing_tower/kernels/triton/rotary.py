"""Rotary positions in Triton: see :func:`reference.rotate_` and :func:`reference.qkv_backward`."""

import torch
import triton
import triton.language as tl

from .launcher import PARTS, block_for, kernel, launch

if not hasattr(tl, "join"):
    raise ImportError(f"the fused kernels need Triton 3, this is {triton.__version__}")


@kernel
def _rotate(qkv, cos, sin, WIDTH: tl.constexpr, HEAD: tl.constexpr, PAIRS: tl.constexpr, BLOCK: tl.constexpr):
    """One token and one of q and k per program; a thread holds both partners of what it turns: it is done in place."""
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start = qkv + (token * 3 + part) * WIDTH
    kind = qkv.dtype.element_ty
    if PAIRS:
        column = tl.arange(0, BLOCK)[None, :]
        inside = column < WIDTH
        table = token * HEAD + column % HEAD
        a, b = _split(tl.load(start + column, mask=inside, other=0.0).to(tl.float32), 1, BLOCK)
        cos_a, cos_b = _split(tl.load(cos + table, mask=inside, other=0.0), 1, BLOCK)
        sin_a, sin_b = _split(tl.load(sin + table, mask=inside, other=0.0), 1, BLOCK)
        turned = tl.join(a * cos_a - b * sin_a, b * cos_b + a * sin_b)
        tl.store(start + column, tl.reshape(turned, [1, BLOCK]).to(kind), mask=inside)
    else:
        pair = tl.arange(0, BLOCK // 2)
        inside = pair < WIDTH // 2
        lane = pair % (HEAD // 2)
        place = start + pair // (HEAD // 2) * HEAD + lane
        table = token * HEAD + lane
        a = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(place + HEAD // 2, mask=inside, other=0.0).to(tl.float32)
        cos_a, sin_a = tl.load(cos + table, mask=inside, other=0.0), tl.load(sin + table, mask=inside, other=0.0)
        cos_b = tl.load(cos + table + HEAD // 2, mask=inside, other=0.0)
        sin_b = tl.load(sin + table + HEAD // 2, mask=inside, other=0.0)
        tl.store(place, (a * cos_a - b * sin_a).to(kind), mask=inside)
        tl.store(place + HEAD // 2, (b * cos_b + a * sin_b).to(kind), mask=inside)


@triton.jit
def _split(x, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of (x0, x1, x2, x3, ...) to rows of (x0, x2, ...) and of (x1, x3, ...)."""
    return tl.split(tl.reshape(x, [ROWS, BLOCK // 2, 2]))


def rotate_(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, kind: str) -> None:
    """See :func:`reference.rotate_`."""
    tokens, _, heads, head_dim = qkv.shape
    width = heads * head_dim
    constants = (width, head_dim, kind == "interleaved", block_for(width))
    launch(_rotate, (tokens, 2, 1), (qkv, cos, sin), (), constants, 4)


@kernel
def _qkv_backward(
    grad_q,
    grad_k,
    grad_v,
    cos,
    sin,
    out,
    partials,
    n_tokens,
    n_columns,
    n_offset,
    STRIDE_Q: tl.constexpr,
    STRIDE_K: tl.constexpr,
    STRIDE_V: tl.constexpr,
    WIDTH: tl.constexpr,
    HEAD: tl.constexpr,
    PAIRS: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One of q, k, v per program, and ROWS tokens at a time, every PARTS-th group of them."""
    part, piece = tl.program_id(0), tl.program_id(1)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    lane = column % HEAD
    leads = lane < HEAD // 2
    across = tl.where(leads, HEAD // 2, -(HEAD // 2))
    sign = tl.where(leads, 1.0, -1.0)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(part * ROWS, n_tokens, PARTS * ROWS):
        token = start + tl.arange(0, ROWS)
        mask = (token < n_tokens)[:, None] & inside[None, :]
        row = token[:, None].to(tl.int64)
        if piece == 0:
            source = grad_q + row * STRIDE_Q + column[None, :]
        elif piece == 1:
            source = grad_k + row * STRIDE_K + column[None, :]
        else:
            source = grad_v + row * STRIDE_V + column[None, :]
        value = tl.load(source, mask=mask, other=0.0).to(tl.float32)
        if cos is not None:  # noqa: SIM102 - decided when compiled, what follows when run
            if piece < 2:
                # The forward is y = x * cos + rotate(x) * sin, with minus the second of two partners for the first.
                table = row * HEAD + lane[None, :]
                cosine = tl.load(cos + table, mask=mask, other=0.0)
                if PAIRS:
                    a, b = _split(value, ROWS, BLOCK)
                    cos_a, cos_b = _split(cosine, ROWS, BLOCK)
                    sin_a, sin_b = _split(tl.load(sin + table, mask=mask, other=0.0), ROWS, BLOCK)
                    value = tl.reshape(tl.join(a * cos_a + b * sin_b, b * cos_b - a * sin_a), [ROWS, BLOCK])
                else:
                    other = tl.load(source + across[None, :], mask=mask, other=0.0).to(tl.float32)
                    sine = tl.load(sin + table + across[None, :], mask=mask, other=0.0)
                    value = value * cosine + sign[None, :] * other * sine
        value = value.to(out.dtype.element_ty)
        tl.store(out + (row * 3 + piece) * WIDTH + column[None, :], value, mask=mask)
        total += value.to(tl.float32)
    tl.store(partials + part * n_columns + n_offset + piece * WIDTH + column, tl.sum(total, axis=0), mask=inside)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """``x`` if each token's numbers lie together, else a copy."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


def qkv_backward(
    grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    rotary: tuple[torch.Tensor, torch.Tensor] | None,
    kind: str | None,
    partials: torch.Tensor,
    offset: int,
) -> torch.Tensor:
    """See :func:`reference.qkv_backward`."""
    tokens, heads, head_dim = grads[0].shape
    width = heads * head_dim
    grads = tuple(map(_rows, grads))
    out = torch.empty(tokens, 3 * width, dtype=grads[0].dtype, device=grads[0].device)
    cos, sin = rotary or (None, None)
    strides = tuple(x.stride(0) for x in grads)  # constants, so that the compiler sees how rows are aligned
    constants = (*strides, width, head_dim, kind == "interleaved", PARTS, 1, block_for(width))
    numbers = (tokens, partials.shape[1], offset)
    launch(_qkv_backward, (PARTS, 3, 1), (*grads, cos, sin, out, partials), numbers, constants, 2)
    return out
