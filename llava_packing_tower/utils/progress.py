"""A progress bar on the terminal, for whatever takes long."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def progress(title: str, in_bytes: bool = False) -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error, with the time left; yields what moves it: called with what is done, and all there is."""
    from rich.console import Console
    from rich.progress import DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    amount = DownloadColumn() if in_bytes else MofNCompleteColumn()
    columns = (TextColumn("{task.description}"), amount, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, count: bar.update(task, completed=done, total=count)


Bar = Callable[[str], AbstractContextManager[Callable[[int, int], None]]]
"""What :func:`progress` is, with its other arguments given: for functions that show nothing by themselves."""


@contextmanager
def silent(title: str) -> Iterator[Callable[[int, int], None]]:
    """No bar."""
    yield lambda done, count: None


def counted(tensors: Iterable[tuple[str, Any]], moved: Callable[[int, int], None], nbytes: int) -> Iterator:
    """Named tensors as they are, and the bytes of those that were taken to a bar."""
    done = 0
    for name, tensor in tensors:
        yield name, tensor
        done += tensor.nbytes
        moved(done, nbytes)


@contextmanager
def growing(folder: Path, moved: Callable[[int, int], None], nbytes: int) -> Iterator[None]:
    """The bytes of the weight files in a folder to a bar, twice a second, while a library writes them."""
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(0.5):
            moved(min(nbytes, sum(file.stat().st_size for file in folder.glob("*.safetensors"))), nbytes)

    thread = threading.Thread(target=look, name="progress", daemon=True)
    thread.start()
    try:
        yield
        moved(nbytes, nbytes)
    finally:
        ended.set()
        thread.join()
