"""Activations and column sums in Triton: see :func:`reference.act`, :func:`reference.act_backward`."""

import torch
import triton
import triton.language as tl

from .launching import PARTS, on

CODES = {"gelu": 0, "gelu_pytorch_tanh": 1, "silu": 2}


@triton.jit
def _activation(x, CODE: tl.constexpr):
    """The activation of float32 x and its derivative."""
    if CODE == 0:
        # Normal distribution function by Abramowitz and Stegun 7.1.26, error below 3e-7, as in activations.normal_cdf.
        density = tl.exp(x * x * -0.5)
        t = 1.0 / (tl.abs(x) * 0.23164188 + 1.0)
        series = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
        tail = 0.5 * series * density
        share = tl.where(x > 0, 1.0 - tail, tail)
        slope = share + x * density * 0.3989422804
    elif CODE == 1:
        # x * sigmoid(2u) with u = sqrt(2/pi) * (x + 0.044715 x^3).
        square = x * x
        share = 1.0 / (1.0 + tl.exp(-1.5957691216 * x * (1.0 + 0.044715 * square)))
        slope = share + x * share * (1.0 - share) * (1.5957691216 + 0.2140644488 * square)
    else:
        share = 1.0 / (1.0 + tl.exp(-x))
        slope = share + x * share * (1.0 - share)
    return x * share, slope


@triton.jit
def _act(inner, factor, out, size, CODE: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    value, _ = _activation(tl.load(inner + place, mask=inside, other=0.0).to(tl.float32), CODE)
    if GATED:
        value *= tl.load(factor + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place, value.to(out.dtype.element_ty), mask=inside)


def act(name: str, inner: torch.Tensor, factor: torch.Tensor | None) -> torch.Tensor:
    """See :func:`reference.act`."""
    out, size = torch.empty_like(inner), inner.numel()
    with on(inner):
        _act[(triton.cdiv(size, 2048),)](inner, factor, out, size, CODES[name], factor is not None, 2048, num_warps=4)
    return out


@triton.jit(do_not_specialize=["rows"])
def _act_backward(
    inner,
    factor,
    grad,
    of_inner,
    of_factor,
    partials,
    rows,
    width,
    columns,
    CODE: tl.constexpr,
    GATED: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """ROWS tokens and BLOCK columns at a time, every PARTS-th group of tokens."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    part = tl.program_id(1)
    inside = column < width
    kind = inner.dtype.element_ty
    sum_inner = tl.zeros((ROWS, BLOCK), tl.float32)
    sum_factor = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(part * ROWS, rows, PARTS * ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & inside[None, :]
        place = row[:, None].to(tl.int64) * width + column[None, :]
        value, slope = _activation(tl.load(inner + place, mask=mask, other=0.0).to(tl.float32), CODE)
        upstream = tl.load(grad + place, mask=mask, other=0.0).to(tl.float32)
        if GATED:
            times = tl.load(factor + place, mask=mask, other=0.0).to(tl.float32)
            second = (upstream * value).to(kind)
            tl.store(of_factor + place, second, mask=mask)
            sum_factor += second.to(tl.float32)
            upstream *= times
        first = (upstream * slope).to(kind)
        tl.store(of_inner + place, first, mask=mask)
        sum_inner += first.to(tl.float32)
    target = partials + part * columns + column
    tl.store(target, tl.sum(sum_inner, axis=0), mask=inside)
    if GATED:
        tl.store(target + width, tl.sum(sum_factor, axis=0), mask=inside)


def act_backward(
    name: str,
    inner: torch.Tensor,
    factor: torch.Tensor | None,
    grad: torch.Tensor,
    partials: torch.Tensor,
    offset: int,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """See :func:`reference.act_backward`."""
    rows, width = inner.shape
    gated = factor is not None
    of_inner, of_factor = torch.empty_like(inner), torch.empty_like(inner) if gated else None
    with on(inner):
        _act_backward[(triton.cdiv(width, 256), PARTS)](
            inner, factor, grad, of_inner, of_factor, partials[:, offset:], rows, width, partials.shape[1],
            CODES[name], gated, PARTS, 8, 256, num_warps=4,
        )  # fmt: skip
    return of_inner, of_factor


@triton.jit(do_not_specialize=["rows"])
def _column_sums(x, partials, rows, width, columns, PARTS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    part = tl.program_id(1)
    inside = column < width
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(part * ROWS, rows, PARTS * ROWS):
        row = start + tl.arange(0, ROWS)
        place = row[:, None].to(tl.int64) * width + column[None, :]
        total += tl.load(x + place, mask=(row < rows)[:, None] & inside[None, :], other=0.0).to(tl.float32)
    tl.store(partials + part * columns + column, tl.sum(total, axis=0), mask=inside)


def column_sums(x: torch.Tensor, partials: torch.Tensor, offset: int) -> None:
    """See :func:`reference.column_sums`."""
    rows, width = x.shape
    x = x.contiguous()
    with on(x):
        _column_sums[(triton.cdiv(width, 256), PARTS)](
            x, partials[:, offset:], rows, width, partials.shape[1], PARTS, 16, 256, num_warps=4
        )
