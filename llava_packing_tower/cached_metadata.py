"""Metadata of batches (segment borders, positions, tables) that is kept for the next batch of the same shapes."""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import fields, is_dataclass

import torch

from .tape import taped
from .tracing import traced


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


def kept(maxsize: int) -> Callable[[Callable], Callable]:
    """A least-recently-used cache for functions that make tensors on a device, of hashable arguments.

    What is kept serves every later call: it is made outside of inference mode, for training may need it, and neither
    made nor asked for while something is traced or captured. Threads and CUDA streams may share it. The functions name
    every device and dtype, for the user may have other defaults.

    ``__wrapped__`` of the result makes without keeping.
    """

    def decorate(function: Callable) -> Callable:
        entries: OrderedDict[tuple[Hashable, ...], _Made] = OrderedDict()
        lock = threading.Lock()

        @functools.wraps(function)
        def make(*arguments):
            if traced():
                return function(*arguments)
            with torch.inference_mode(False), torch.no_grad():
                return function(*arguments)

        def find(*arguments):
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
        def call(*arguments):
            return function(*arguments) if traced() else taped(find, *arguments)

        call.__wrapped__, call.cache_clear = make, entries.clear
        return call

    return decorate
