"""What the kernels of this package share: the parts that sums over tokens are made of, and the current device."""

import contextlib

import torch
import triton
import triton.language as tl

PARTS = 256


def on(x: torch.Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device: makes that the one of ``x`` where it is another."""
    if not x.is_cuda or x.device.index == torch.cuda.current_device():  # (not CUDA: Triton's interpreter)
        return contextlib.nullcontext()
    return torch.cuda.device(x.device)


def partials(columns: int, like: torch.Tensor) -> torch.Tensor:
    """See :func:`reference.partials`."""
    return torch.empty(PARTS, columns, dtype=torch.float32, device=like.device)


@triton.jit
def _finish(partials, out, columns, PARTS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, PARTS, ROWS):
        row = start + tl.arange(0, ROWS)
        total += tl.load(partials + row[:, None] * columns + column[None, :], mask=inside[None, :], other=0.0)
    tl.store(out + column, tl.sum(total, axis=0).to(out.dtype.element_ty), mask=inside)


def finish(partials: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """See :func:`reference.finish`."""
    columns = partials.shape[1]
    out = torch.empty(columns, dtype=dtype, device=partials.device)
    with on(out):
        _finish[(triton.cdiv(columns, 32),)](partials, out, columns, PARTS, 64, 32, num_warps=4)
    return out
