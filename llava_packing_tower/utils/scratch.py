"""Temporary folders beside a result: held by a lock while they are written, and removed by the next run if nobody does.

A process that is killed leaves its folder behind, and no lock: the kernel drops that with the process.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

MARK = ".llava_packing_scratch"
"""The file that says that a folder is one of these; its lock is held while the folder is in use."""


@contextlib.contextmanager
def scratch_beside(folder: Path, alone: bool = False) -> Iterator[Path]:
    """A folder ``.<name>.<random>`` beside ``folder``, on the same disk, that holds the mark; gone afterwards.

    It is in ``folder`` itself where that stays (see :func:`stays`). What earlier processes left of such folders is
    removed. ``alone``: raises ``BlockingIOError`` where another process has one now, for it writes the same result.
    """
    with _in_turn(folder.parent):
        for old in _marks(folder):
            if not _remove(old) and alone:
                raise BlockingIOError(f"another process is writing {folder}: wait for it, or choose another folder")
        place = folder if stays(folder) else folder.parent
        made = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=place))
        held = os.open(made / MARK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        _lock(held)
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)
        os.close(held)


def stays(folder: Path) -> bool:
    """Whether a folder cannot be replaced by another: where a disk is mounted, where whoever looks at it is now, or in
    a folder that may not be written."""
    if not folder.is_dir():
        return False
    is_here = os.path.realpath(os.curdir) == os.path.realpath(folder)
    return is_here or os.path.ismount(folder) or not os.access(folder.parent, os.W_OK | os.X_OK)


def content_of(folder: Path) -> list[Path]:
    """What is in a folder, without temporary folders of this module."""
    scratch = {mark.parent for mark in _marks(folder)}
    return [path for path in folder.iterdir() if path not in scratch]


def _marks(folder: Path) -> list[Path]:
    """Those of the temporary folders of a result: beside it and, where it is there, in it."""
    pattern = f".{glob.escape(folder.name)}.*/{MARK}"
    return [mark for place in (folder.parent, folder) if place.is_dir() for mark in place.glob(pattern)]


@contextlib.contextmanager
def _in_turn(folder: Path) -> Iterator[None]:
    """One process at a time looks for old folders and makes its own."""
    try:
        place = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    except PermissionError:  # then nothing is made there
        yield
        return
    try:
        with contextlib.suppress(OSError):  # a file system without locks on folders
            fcntl.flock(place, fcntl.LOCK_EX)
        yield
    finally:
        os.close(place)


def _remove(mark: Path) -> bool:
    """Remove the folder of a mark that nobody holds; False where somebody does."""
    try:
        file = os.open(mark, os.O_RDWR | os.O_CLOEXEC)
    except OSError:  # it has just gone, or is another user's
        return not mark.exists()
    try:
        if not _lock(file):
            return False
        shutil.rmtree(mark.parent, ignore_errors=True)
        return True
    finally:
        os.close(file)


def _lock(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError:
        return False
