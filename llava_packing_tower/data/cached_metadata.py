"""Cached metadata of batches (segment borders, positions, tables): for the next batch of the same shapes, and for
as long as a CUDA graph lives that reads it."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import torch

from ..utils.tracing import traced

_thread = threading.local()  # .active: the CachedMetadata that this thread makes or is given again


class CachedMetadata:
    """What :func:`once` returned to a first pass, given again, in the same order, to a second.

    A pass that is captured as a CUDA graph must not copy from the host, and what it reads must live as long as the
    graph: the pass before it provides both.
    """

    def __init__(self) -> None:
        self._made: list[object] = []
        self._next: int | None = None

    @contextlib.contextmanager
    def making(self) -> Iterator[None]:
        """Within it :func:`once` computes its values, which are kept for the second pass."""
        with self._as_active(None):
            yield

    @contextlib.contextmanager
    def giving_again(self) -> Iterator[None]:
        """Within it :func:`once` returns the values of the first pass.

        Raises ``ValueError`` at the end if the second pass asked for fewer of them.
        """
        with self._as_active(0):
            yield
        if self._next != len(self._made):
            raise ValueError(f"the first pass asked for {len(self._made)} values, the second for {self._next}")

    @contextlib.contextmanager
    def _as_active(self, start: int | None) -> Iterator[None]:
        before, _thread.active, self._next = getattr(_thread, "active", None), self, start
        try:
            yield
        finally:
            _thread.active = before

    def take(self, make: Callable, arguments: tuple) -> object:
        """The next value: computed in the first pass, returned again in the second.

        Raises ``ValueError`` if the second pass asks for more values than there are.
        """
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


def once(make: Callable, *arguments: object) -> Any:
    """``make(*arguments)``, or that value of the active :class:`CachedMetadata`."""
    active = getattr(_thread, "active", None)
    return make(*arguments) if active is None else active.take(make, arguments)


def _tensors(value: object) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from _tensors(part)
    elif is_dataclass(value):
        for field in fields(value):
            yield from _tensors(getattr(value, field.name))


class _Made:
    """A value, and the CUDA stream that its tensors are made on: another stream has to wait for them."""

    def __init__(self, value: object) -> None:
        self.value, self.event = value, None
        self.on_gpu = tuple(x for x in _tensors(value) if x.is_cuda)
        if self.on_gpu:
            self.stream = torch.cuda.current_stream(self.on_gpu[0].device)
            self.event = self.stream.record_event()

    def get(self) -> object:
        if self.event is not None and (stream := torch.cuda.current_stream(self.on_gpu[0].device)) != self.stream:
            stream.wait_event(self.event)
            for x in self.on_gpu:
                x.record_stream(stream)
        return self.value


def _captures(arguments: tuple) -> bool:
    """Whether a CUDA graph is being captured, to whose memory new tensors would belong."""
    on_gpu = any(isinstance(x, torch.device) and x.type == "cuda" for x in arguments)
    return on_gpu and torch.cuda.is_current_stream_capturing()


def cached(maxsize: int) -> Callable[[Callable], Any]:
    """A least-recently-used cache for functions that make tensors on a device, of hashable arguments.

    A cached value serves every later call. It is made outside of inference mode, because training may need it, and is
    neither made nor looked up while something is traced or captured. Threads and CUDA streams may share it. The
    functions name every device and dtype, because the user may have other defaults.

    ``__wrapped__`` of the result computes a value without caching it.
    """

    def decorate(function: Callable) -> Any:
        entries: OrderedDict[tuple[Hashable, ...], _Made] = OrderedDict()
        lock = threading.Lock()

        @functools.wraps(function)
        def make(*arguments: Any) -> Any:
            if traced():
                return function(*arguments)
            with torch.inference_mode(False), torch.no_grad():
                return function(*arguments)

        def find(*arguments: Any) -> Any:
            with lock:
                made = entries.get(arguments)
                if made is not None:
                    entries.move_to_end(arguments)
            if _captures(arguments):
                return make(*arguments) if made is None else made.value
            if made is None:
                made = _Made(make(*arguments))
                with lock:
                    entries[arguments] = made
                    if len(entries) > maxsize:
                        entries.popitem(last=False)
            return made.get()

        @functools.wraps(function)
        def call(*arguments: Any) -> Any:
            return function(*arguments) if traced() else once(find, *arguments)

        kept_call: Any = call
        kept_call.__wrapped__, kept_call.cache_clear = make, entries.clear
        return kept_call

    return decorate
