"""Activations and column sums in Triton: see :func:`reference.act`, :func:`reference.act_backward`."""

import torch
import triton
import triton.language as tl

from .launcher import PARTS, kernel, launch

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


@kernel
def _act(
    inner,
    inner_bias,
    factor,
    factor_bias,
    out,
    n_rows,
    WIDTH: tl.constexpr,
    ACROSS: tl.constexpr,
    CODE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """ROWS tokens and BLOCK columns per program; all on the first axis of the grid, the only one without a limit."""
    column = tl.program_id(0) % ACROSS * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(0) // ACROSS * ROWS + tl.arange(0, ROWS)
    inside = column < WIDTH
    mask = (row < n_rows)[:, None] & inside[None, :]
    place = row[:, None].to(tl.int64) * WIDTH + column[None, :]
    source = tl.load(inner + place, mask=mask, other=0.0).to(tl.float32)
    if inner_bias is not None:
        source += tl.load(inner_bias + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    value, _ = _activation(source, CODE)
    if factor is not None:
        times = tl.load(factor + place, mask=mask, other=0.0).to(tl.float32)
        if factor_bias is not None:
            times += tl.load(factor_bias + column, mask=inside, other=0.0).to(tl.float32)[None, :]
        value *= times
    tl.store(out + place, value.to(out.dtype.element_ty), mask=mask)


def act(
    name: str,
    inner: torch.Tensor,
    inner_bias: torch.Tensor | None,
    factor: torch.Tensor | None = None,
    factor_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """See :func:`reference.act`."""
    out = torch.empty_like(inner)
    rows, width = inner.shape
    across = -(-width // 512)
    grid, constants = (across * -(-rows // 4), 1, 1), (width, across, CODES[name], 4, 512)
    launch(_act, grid, (inner, inner_bias, factor, factor_bias, out), (rows,), constants, 4)
    return out


@kernel
def _act_backward(
    inner,
    inner_bias,
    factor,
    factor_bias,
    grad,
    of_inner,
    of_factor,
    active,
    partials,
    n_rows,
    n_columns,
    n_offset,
    WIDTH: tl.constexpr,
    CODE: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """ROWS tokens and BLOCK columns at a time, every PARTS-th group of tokens."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    part = tl.program_id(1)
    inside = column < WIDTH
    kind = inner.dtype.element_ty
    sum_inner = tl.zeros((ROWS, BLOCK), tl.float32)
    sum_factor = tl.zeros((ROWS, BLOCK), tl.float32)
    if inner_bias is not None:
        added = tl.load(inner_bias + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    if factor_bias is not None:
        added_to_factor = tl.load(factor_bias + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    for start in range(part * ROWS, n_rows, PARTS * ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < n_rows)[:, None] & inside[None, :]
        place = row[:, None].to(tl.int64) * WIDTH + column[None, :]
        source = tl.load(inner + place, mask=mask, other=0.0).to(tl.float32)
        if inner_bias is not None:
            source += added
        value, slope = _activation(source, CODE)
        upstream = tl.load(grad + place, mask=mask, other=0.0).to(tl.float32)
        if factor is not None:
            times = tl.load(factor + place, mask=mask, other=0.0).to(tl.float32)
            if factor_bias is not None:
                times += added_to_factor
            second = (upstream * value).to(kind)
            tl.store(of_factor + place, second, mask=mask)
            sum_factor += tl.where(mask, second, 0.0).to(tl.float32)
            upstream *= times
            value *= times
        tl.store(active + place, value.to(kind), mask=mask)
        first = (upstream * slope).to(kind)
        tl.store(of_inner + place, first, mask=mask)
        sum_inner += first.to(tl.float32)
    target = partials + part * n_columns + n_offset + column
    tl.store(target, tl.sum(sum_inner, axis=0), mask=inside)
    if factor is not None:
        tl.store(target + WIDTH, tl.sum(sum_factor, axis=0), mask=inside)


def act_backward(
    name: str,
    inner: torch.Tensor,
    inner_bias: torch.Tensor | None,
    factor: torch.Tensor | None,
    factor_bias: torch.Tensor | None,
    grad: torch.Tensor,
    partials: torch.Tensor,
    offset: int,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """See :func:`reference.act_backward`."""
    rows, width = inner.shape
    of_inner, of_factor = grad, None if factor is None else torch.empty_like(inner)  # each program writes what it read
    active = torch.empty_like(inner)
    tensors = (inner, inner_bias, factor, factor_bias, grad, of_inner, of_factor, active, partials)
    numbers = (rows, partials.shape[1], offset)
    launch(_act_backward, (-(-width // 1024), PARTS, 1), tensors, numbers, (width, CODES[name], PARTS, 1, 1024), 4)
    return of_inner, of_factor, active


@kernel
def _column_sums(
    x,
    partials,
    n_rows,
    n_columns,
    n_offset,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    part = tl.program_id(1)
    inside = column < WIDTH
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(part * ROWS, n_rows, PARTS * ROWS):
        row = start + tl.arange(0, ROWS)
        place = row[:, None].to(tl.int64) * WIDTH + column[None, :]
        total += tl.load(x + place, mask=(row < n_rows)[:, None] & inside[None, :], other=0.0).to(tl.float32)
    tl.store(partials + part * n_columns + n_offset + column, tl.sum(total, axis=0), mask=inside)


def column_sums(x: torch.Tensor, partials: torch.Tensor, offset: int) -> None:
    """See :func:`reference.column_sums`."""
    rows, width = x.shape
    numbers = (rows, partials.shape[1], offset)
    launch(_column_sums, (-(-width // 256), PARTS, 1), (x.contiguous(), partials), numbers, (width, PARTS, 16, 256), 4)
