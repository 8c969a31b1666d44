"""Norms in Triton: see :func:`reference.add_norm`, :func:`reference.row_norm`, :func:`reference.norm_backward`."""

import torch
import triton
import triton.language as tl

from .launcher import PARTS, block_for, kernel, launch


@triton.jit
def _normed(value, weight, bias, column, inside, f_eps, WIDTH: tl.constexpr, RMS: tl.constexpr, KIND: tl.constexpr):
    """The norm of one token, float32, with its mean and the reciprocal of its deviation."""
    if RMS:
        mean = 0.0
        centred = value
    else:
        mean = tl.sum(value, axis=0) / WIDTH
        centred = tl.where(inside, value - mean, 0.0)
    deviation = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / WIDTH + f_eps)
    out = centred * deviation
    if RMS:
        out = out.to(KIND).to(tl.float32)
    out = out * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        out += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    return out, mean, deviation


@kernel
def _add_norm(
    x,
    pending,
    pending_bias,
    weight,
    bias,
    total,
    normed,
    stats,
    n_rows,
    f_eps,
    WIDTH: tl.constexpr,
    RMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One token per program."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    place = row * WIDTH + column
    kind = x.dtype.element_ty
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    if pending is not None:
        value += tl.load(pending + place, mask=inside, other=0.0).to(tl.float32)
        if pending_bias is not None:
            value += tl.load(pending_bias + column, mask=inside, other=0.0).to(tl.float32)
        value = value.to(kind).to(tl.float32)
        tl.store(total + place, value.to(kind), mask=inside)
    out, mean, deviation = _normed(value, weight, bias, column, inside, f_eps, WIDTH, RMS, kind)
    tl.store(normed + place, out.to(kind), mask=inside)
    tl.store(stats + row, mean)
    tl.store(stats + n_rows + row, deviation)


def add_norm(
    x: torch.Tensor,
    pending: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    rms: bool,
    pending_bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See :func:`reference.add_norm`."""
    rows, width = x.shape
    x = x.contiguous()
    pending = None if pending is None else pending.contiguous()
    total = x if pending is None else torch.empty_like(x)
    normed = torch.empty_like(x)
    stats = torch.empty(2, rows, dtype=torch.float32, device=x.device)
    tensors = (x, pending, pending_bias, weight, bias, total, normed, stats)
    launch(_add_norm, (rows, 1, 1), tensors, (rows, eps), (width, rms, block_for(width)), 4)
    return total, normed, stats


@kernel
def _row_norm(
    x,
    row,
    row_bias,
    weight,
    bias,
    normed,
    row_out,
    f_eps,
    WIDTH: tl.constexpr,
    RMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One token per program; the first also makes the next row."""
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    place = tl.program_id(0).to(tl.int64) * WIDTH + column
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    if row is not None:
        added = tl.load(row + column, mask=inside, other=0.0)
        value += added
    if row_out is not None:  # noqa: SIM102 - decided when compiled, what follows when run
        if tl.program_id(0) == 0:
            more = tl.load(row_bias + column, mask=inside, other=0.0).to(tl.float32)
            if row is not None:
                more += added
            tl.store(row_out + column, more, mask=inside)
    out, _, _ = _normed(value, weight, bias, column, inside, f_eps, WIDTH, RMS, x.dtype.element_ty)
    tl.store(normed + place, out.to(x.dtype.element_ty), mask=inside)


def row_norm(
    x: torch.Tensor,
    row: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    rms: bool,
    row_bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """See :func:`reference.row_norm`."""
    rows, width = x.shape
    normed = torch.empty_like(x)
    following = None if row_bias is None else torch.empty(width, dtype=torch.float32, device=x.device)
    tensors = (x, row, row_bias, weight, bias, normed, following)
    block = block_for(width)
    launch(_row_norm, (rows, 1, 1), tensors, (eps,), (width, rms, block), 2 if block == width else 1)
    return normed, row if following is None else following


@kernel
def _norm_backward(
    total,
    stats,
    grad,
    residual,
    weight,
    bias,
    out,
    normed,
    partials,
    n_rows,
    n_columns,
    n_offset,
    WIDTH: tl.constexpr,
    RMS: tl.constexpr,
    PASSING: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """ROWS tokens at a time per program, every PARTS-th group of them."""
    part = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    kind = total.dtype.element_ty
    scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        added = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    of_weight = tl.zeros((ROWS, BLOCK), tl.float32)
    of_bias = tl.zeros((ROWS, BLOCK), tl.float32)
    of_total = tl.zeros((ROWS, BLOCK), tl.float32)
    if PASSING:
        of_residual = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(part * ROWS, n_rows, PARTS * ROWS):
        row = start + tl.arange(0, ROWS)
        there = row < n_rows
        mask = there[:, None] & inside[None, :]
        place = row[:, None].to(tl.int64) * WIDTH + column[None, :]
        mean = tl.load(stats + row, mask=there, other=0.0)[:, None]
        deviation = tl.load(stats + n_rows + row, mask=there, other=0.0)[:, None]
        unit = (tl.load(total + place, mask=mask, other=0.0).to(tl.float32) - mean) * deviation
        upstream = tl.load(grad + place, mask=mask, other=0.0).to(tl.float32)
        unit = tl.where(mask, unit, 0.0)
        weighted = upstream * scale
        inner = weighted - unit * (tl.sum(unit * weighted, axis=1) / WIDTH)[:, None]
        if not RMS:
            inner -= (tl.sum(weighted, axis=1) / WIDTH)[:, None]
        result = inner * deviation
        if residual is not None:
            passed = tl.load(residual + place, mask=mask, other=0.0).to(tl.float32)
            result += passed
            if PASSING:
                of_residual += passed
        result = tl.where(mask, result, 0.0).to(kind)
        tl.store(out + place, result, mask=mask)
        if RMS:
            unit = unit.to(kind).to(tl.float32)
        again = unit * scale
        if bias is not None:
            again += added
        tl.store(normed + place, again.to(kind), mask=mask)
        of_weight += upstream * unit
        of_bias += upstream
        of_total += result.to(tl.float32)
    target = partials + part * n_columns + n_offset + column
    tl.store(target, tl.sum(of_weight, axis=0), mask=inside)
    tl.store(target + WIDTH, tl.sum(of_bias, axis=0), mask=inside)
    tl.store(target + 2 * WIDTH, tl.sum(of_total, axis=0), mask=inside)
    if PASSING:
        tl.store(target + 3 * WIDTH, tl.sum(of_residual, axis=0), mask=inside)


def norm_backward(
    total: torch.Tensor,
    stats: torch.Tensor,
    grad: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    rms: bool,
    partials: torch.Tensor,
    offset: int,
    passing: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`reference.norm_backward`."""
    rows, width = total.shape
    residual = None if residual is None else residual.contiguous()
    out, normed = grad, torch.empty_like(total)  # each program writes what it has read
    block = block_for(width)
    tensors = (total, stats, grad, residual, weight, bias, out, normed, partials)
    numbers = (rows, partials.shape[1], offset)
    # 4096 numbers at a time: more would not fit the registers.
    constants = (width, rms, passing, PARTS, max(1, 4096 // block), block)
    launch(_norm_backward, (PARTS, 1, 1), tensors, numbers, constants, 4)
    return out, normed
