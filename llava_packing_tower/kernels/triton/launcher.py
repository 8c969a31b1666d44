"""How the kernels of this package are launched, and the sums over tokens that they share.

Triton looks at every argument of every launch to find the code compiled for such arguments, which costs the host more
than the launch. Here the kernels take their arguments in an order that makes this cheap: tensors, numbers that nothing
is compiled for, constants.
"""

import functools
import subprocess

import torch
import triton
import triton.language as tl
from triton.errors import TritonError

PARTS = 256
_ALIGNED = 16
_compiled: dict[tuple, tuple] = {}
# The versions whose compiled kernels are known to take what is passed below; others are launched by Triton itself.
_DIRECT = (3, 3) <= tuple(map(int, triton.__version__.split(".")[:2])) <= (3, 6)

# What is raised where a kernel cannot be built or run: no C compiler, another version of Triton, another chip.
ERRORS = (TritonError, RuntimeError, OSError, ValueError, AttributeError, TypeError, subprocess.SubprocessError)

Tensors = tuple[torch.Tensor | None, ...]


@functools.cache  # (Triton's own takes some microseconds)
def block_for(width: int) -> int:
    """The power of two that holds so many columns."""
    return triton.next_power_of_2(width)


def kernel(function):
    """``triton.jit`` for kernels that :func:`launch` can launch: arguments ``n_...`` and ``f_...`` are its numbers."""
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    return triton.jit(function, do_not_specialize=[name for name in names if name.startswith(("n_", "f_"))])


def launch(kernel, grid: tuple[int, int, int], tensors: Tensors, numbers: tuple, constants: tuple, warps: int) -> None:
    """Run ``kernel(*tensors, *numbers, *constants)`` on the device of the first tensor."""
    aligned, places, kinds = 0, [], []
    for x in tensors:
        if x is None:
            places.append(None)
            kinds.append(None)
        else:
            places.append(place := x.data_ptr())
            aligned |= place
            kinds.append(x.dtype)
    device = tensors[0].device.index
    if device is not None and device != torch.cuda.current_device():  # (None: Triton's interpreter, on the CPU)
        with torch.cuda.device(device):
            return launch(kernel, grid, tensors, numbers, constants, warps)
    direct = _DIRECT and device is not None and aligned % _ALIGNED == 0
    key = (id(kernel), device, constants, warps, *kinds)
    if direct and key in _compiled:
        run, function, metadata = _compiled[key]
        stream = triton.runtime.driver.active.get_current_stream(device)
        # (Numbers in place of tensors: Triton would ask the driver about each.)
        run(*grid, stream, function, metadata, None, None, None, *places, *numbers, *constants)
        return None
    compiled = kernel[grid](*tensors, *numbers, *constants, num_warps=warps)
    if direct:
        _compiled[key] = compiled.run, compiled.function, compiled.packed_metadata
    return None


def partials(columns: int, like: torch.Tensor) -> torch.Tensor:
    """See :func:`reference.partials`."""
    return torch.empty(PARTS, columns, dtype=torch.float32, device=like.device)


@kernel
def _finish(partials, out, n_columns, PARTS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < n_columns
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, PARTS, ROWS):
        row = start + tl.arange(0, ROWS)
        total += tl.load(partials + row[:, None] * n_columns + column[None, :], mask=inside[None, :], other=0.0)
    tl.store(out + column, tl.sum(total, axis=0).to(out.dtype.element_ty), mask=inside)


def finish(partials: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """See :func:`reference.finish`."""
    columns = partials.shape[1]
    out = torch.empty(columns, dtype=dtype, device=partials.device)
    launch(_finish, (-(-columns // 32), 1, 1), (partials, out), (columns,), (PARTS, 64, 32), 4)
    return out
