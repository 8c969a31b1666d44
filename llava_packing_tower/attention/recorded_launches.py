"""Compiled kernels of another package, launched without that package's Python in front of them.

flash-attn-4 looks at every argument of every call and searches its table of compiled kernels: 0.16 ms on the host for a
forward and as much for a backward (flash-attn 2: 0.03), which is longer than the kernels take for a small batch. Here
one call is watched; from then on the same compiled kernels are launched with the tensors at hand.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

BLOCKS = (64, 80, 96, 112, 128, 160, 192, 256)


class _Table:
    """In place of a table of compiled kernels: what this thread launches from it is noted down."""

    def __init__(self, table: object, seen: list[tuple[Callable, tuple]]) -> None:
        self.table, self.seen, self.thread = table, seen, threading.get_ident()

    def __contains__(self, key: object) -> bool:
        return key in self.table

    def __setitem__(self, key: object, kernel: Callable) -> None:
        self.table[key] = kernel

    def __getitem__(self, key: object) -> Callable:
        kernel = self.table[key]
        if threading.get_ident() != self.thread:
            return kernel

        def launch(*arguments: object) -> object:
            self.seen.append((kernel, arguments))
            return kernel(*arguments)

        return launch


@contextlib.contextmanager
def watched(module: object) -> Iterator[list[tuple[Callable, tuple]]]:
    """The launches (kernel, arguments) that functions of ``module`` make in here from their ``compile_cache``; by one
    thread at a time."""
    functions = [f for f in vars(module).values() if hasattr(f, "compile_cache")]
    tables, seen = [f.compile_cache for f in functions], []
    try:
        for function, table in zip(functions, tables):
            function.compile_cache = _Table(table, seen)
        yield seen
    finally:
        for function, table in zip(functions, tables):
            function.compile_cache = table


@dataclass(frozen=True)
class _Scratch:
    """A tensor that the package made for itself: ``[rows, padded tokens * factor]``."""

    rows: int
    factor: int
    dtype: torch.dtype


def padded_tokens(tokens: int, segments: int, block: int) -> int:
    """Rows for all tokens if each segment starts at a multiple of ``block`` (flash-attn-4's scratch tensors)."""
    return (tokens + (segments + 1) * block - 1) // block * block


class Launches:
    """The launches of one watched call, to be made again with other tensors.

    Args:
        seen: the launches.
        tensors: the tensors of that call that its caller knows, in the order in which they will be given again; the
            first has a row per token.
        segments: how many segments that call had.

    Raises ``ValueError`` if an argument is a tensor that is neither one of these nor scratch of a known shape.
    """

    def __init__(self, seen: Sequence[tuple[Callable, tuple]], tensors: Sequence[torch.Tensor], segments: int) -> None:
        known = {_place(x): index for index, x in enumerate(tensors)}
        others: dict[tuple, torch.Tensor] = {}
        for _, arguments in seen:
            for x in arguments:
                if isinstance(x, torch.Tensor) and _place(x) not in known:
                    others.setdefault(_place(x), x)
        self.block, self.scratch = _scratch(list(others.values()), tensors[0].shape[0], segments)
        known |= {place: len(tensors) + index for index, place in enumerate(others)}
        self.launches = [
            (kernel, [(known[_place(x)], None) if isinstance(x, torch.Tensor) else (-1, x) for x in arguments])
            for kernel, arguments in seen
        ]

    def __call__(self, tensors: Sequence[torch.Tensor], segments: int) -> None:
        first = tensors[0]
        if self.scratch:
            padded, device = padded_tokens(first.shape[0], segments, self.block), first.device
            made = [torch.empty(x.rows, padded * x.factor, dtype=x.dtype, device=device) for x in self.scratch]
            tensors = [*tensors, *made]
        for kernel, places in self.launches:
            kernel(*[constant if index < 0 else tensors[index] for index, constant in places])


def _place(x: torch.Tensor) -> tuple:
    return x.data_ptr(), x.dtype, x.shape, x.stride()


def _scratch(tensors: list[torch.Tensor], tokens: int, segments: int) -> tuple[int, list[_Scratch]]:
    """The block that explains the shapes of all scratch tensors, and what they are."""
    for block in BLOCKS:
        padded = padded_tokens(tokens, segments, block)
        if all(x.dim() == 2 and x.is_contiguous() and x.shape[1] % padded == 0 for x in tensors):
            return block, [_Scratch(x.shape[0], x.shape[1] // padded, x.dtype) for x in tensors]
    shapes = [tuple(x.shape) for x in tensors]
    raise ValueError(f"scratch tensors {shapes} for {tokens} tokens fit no block of {BLOCKS}")
