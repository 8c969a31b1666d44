"""The metadata of one batch, made in a first pass and handed out again, in the same order, in a second.

A pass that is recorded as a CUDA graph must not copy from the host, and what it reads must live as long as the graph:
the tape of the pass before it provides both.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

_thread = threading.local()  # .active: the tape that this thread makes or plays


def _active() -> Tape | None:
    return getattr(_thread, "active", None)


class Tape:
    """What :func:`taped` returned while it was :meth:`making`, given again while :meth:`playing`."""

    def __init__(self) -> None:
        self._made: list[object] = []
        self._next: int | None = None

    @contextlib.contextmanager
    def making(self) -> Iterator[None]:
        with self._as_active(None):
            yield

    @contextlib.contextmanager
    def playing(self) -> Iterator[None]:
        """Raises ``ValueError`` at the end if the second pass asked for less than the first."""
        with self._as_active(0):
            yield
        if self._next != len(self._made):
            raise ValueError(f"the first pass asked for {len(self._made)} values, the second for {self._next}")

    @contextlib.contextmanager
    def _as_active(self, start: int | None) -> Iterator[None]:
        before, _thread.active, self._next = _active(), self, start
        try:
            yield
        finally:
            _thread.active = before

    def take(self, make: Callable, arguments: tuple) -> object:
        if self._next is not None:
            if self._next == len(self._made):
                raise ValueError(f"the second pass asks for more than the {len(self._made)} values of the first")
            self._next += 1
            return self._made[self._next - 1]
        _thread.active = None  # what the value itself is made of does not count
        try:
            self._made.append(make(*arguments))
        finally:
            _thread.active = self
        return self._made[-1]


def taped(make: Callable, *arguments: object) -> object:
    """``make(*arguments)``, or that value of the active tape."""
    active = _active()
    return make(*arguments) if active is None else active.take(make, arguments)
