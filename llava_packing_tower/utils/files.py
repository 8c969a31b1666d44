"""Files that are either complete or not there."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from .scratch import content_of, scratch_beside, stays


def write_aside(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file beside `path` (same suffix), then rename it: a reader never sees half of it.

    Into a pipe, a device or /dev/stdout the content is written instead: nothing takes their place. Of a link, what it
    leads to is written.
    """
    if is_stream(path):
        with tempfile.TemporaryDirectory() as folder:
            aside = Path(folder) / f"content{path.suffix}"
            write(aside)
            # Not to wait for whoever opens a pipe to read it.
            descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK)
            os.set_blocking(descriptor, True)
            with aside.open("rb") as content, open(descriptor, "wb") as stream:
                shutil.copyfileobj(content, stream)
        return
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        write(aside)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def is_stream(path: Path) -> bool:
    """Whether there is a pipe, a device, or a link to what this process has open."""
    try:
        is_link = path.is_symlink() and path.absolute().parts[1] in ("dev", "proc")
        return path.exists() and (is_link or not (path.is_file() or path.is_dir()))
    except OSError:  # a name that is too long, a folder that cannot be looked into: writing says so
        return False


def write_text(path: Path, text: str) -> None:
    write_aside(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def check_target(path: Path, is_folder: bool) -> None:
    """Raises ``ValueError`` where a file or folder of this name cannot be written."""
    path = user_path(path).absolute()
    try:
        if path.exists() and path.is_dir() != is_folder:
            raise ValueError(f"{path} is {'not ' if is_folder else ''}a folder")
        if is_stream(path) and os.access(path, os.W_OK):
            return
        parent = next(each for each in (path, *path.parents) if each.exists() and (is_folder or each != path))
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            reason = "is not a folder" if not parent.is_dir() else "cannot be written into"
            raise ValueError(f"{path} cannot be written: {parent} {reason}")
    except OSError as error:
        raise ValueError(f"{str(path)[:200]} cannot be written: {error.strerror}") from error


def user_path(name: str | os.PathLike) -> Path:
    """A path with ``~`` and ``~user`` replaced. (``Path.expanduser`` raises for a user that there is not.)"""
    return Path(os.path.expanduser(name))


CONFIG_NAME = "config.json"


def once(pairs: Sequence[tuple[str, object]]) -> dict[str, object]:
    """The ``object_pairs_hook`` of JSON whose objects have no key twice; the last one would count, silently."""
    content = dict(pairs)
    if len(content) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)} is given twice")
    return content


def read_json(file: Path, hook: Callable[[Sequence[tuple[str, object]]], object] | None = once) -> dict:
    """Raises ``ValueError`` if the file is missing, no regular file, or holds no JSON object, or a key twice."""
    if not file.exists():
        raise ValueError(f"{file.parent} has no {file.name}")
    content = read_json_value(file, hook)
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a JSON object, found {type(content).__name__}")
    return content


def read_json_value(file: Path, hook: Callable[[Sequence[tuple[str, object]]], object] | None = None) -> object:
    """What a JSON file holds. Raises ``ValueError`` that names it where it cannot be read."""
    if not file.is_file():  # a pipe would block, a device never ends
        raise ValueError(f"{file} is not a regular file")
    try:
        return json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=hook)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from error


def open_to_others(folder: Path) -> None:
    """The permissions that files made in the usual way have: temporary ones are for their owner alone."""
    umask = os.umask(0)
    os.umask(umask)
    for path in (folder, *folder.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


@contextlib.contextmanager
def reading(file: str | os.PathLike | BinaryIO) -> Iterator[BinaryIO]:
    """A file, opened; a stream that was given stays open, and where it is."""
    if isinstance(file, str | os.PathLike):
        with open(file, "rb") as opened:
            yield opened
        return
    here = file.tell()
    try:
        yield file
    finally:
        file.seek(here)


def check_free(folder: Path) -> None:
    """Raises ``ValueError`` unless a new folder can be made here, or an empty one is there already."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
    if not there.is_dir():
        raise ValueError(f"{there} exists and is not a folder")
    if there == folder.absolute() and content_of(Path(os.path.realpath(folder))):
        raise ValueError(f"{folder} exists and is not empty")
    if not os.access(there, os.W_OK):
        raise ValueError(f"{there} is not writable")


def put(made: Path, folder: Path) -> None:
    """Give a finished folder its name, by one rename; file by file, config.json last, where the other one stays."""
    if stays(folder):
        _put_files(made, folder)
    else:
        os.replace(made, folder)


def _put_files(made: Path, folder: Path) -> None:
    """File by file; what makes the others of a checkpoint readable comes last."""
    for file in sorted(made.iterdir(), key=lambda f: (f.name == CONFIG_NAME, f.name.endswith(".index.json"))):
        os.replace(file, folder / file.name)


@contextlib.contextmanager
def atomic_folder(
    folder: str | os.PathLike, replaces: Callable[[str], bool] = lambda name: False, is_new: bool = False
) -> Iterator[Path]:
    """Yield an empty folder beside ``folder``; on success its files appear in ``folder`` by rename, else nothing does.

    A file of the same name is replaced; other files of an existing folder stay, but those whose names ``replaces`` is
    true of are removed. (Where several files make up a save the old ones go before the new ones come: what is left by
    an interruption cannot be read, and is never of two saves.) A folder that does not exist yet, or is empty, appears
    whole in one step, unless it stays (``scratch.stays``). ``is_new``: raises ``ValueError`` for one that has files, or
    that another process is writing.
    """
    folder = Path(os.path.realpath(folder))
    made = [parent for parent in folder.parents if not parent.exists()]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _written_beside(folder, replaces, is_new) as aside:
            yield aside
    finally:
        for parent in made:
            with contextlib.suppress(OSError):  # not empty: the folder is in it
                parent.rmdir()


@contextlib.contextmanager
def _written_beside(folder: Path, replaces: Callable[[str], bool], is_new: bool) -> Iterator[Path]:
    with contextlib.ExitStack() as stack:
        try:
            scratch = stack.enter_context(scratch_beside(folder, alone=is_new))
        except BlockingIOError as error:
            raise ValueError(str(error)) from error
        if is_new:
            check_free(folder)
        aside = scratch / "content"
        aside.mkdir()
        yield aside
        open_to_others(aside)
        if folder.is_dir() and content_of(folder):
            old = {file.name for file in folder.iterdir() if replaces(file.name)}
            new = {file.name for file in aside.iterdir()}
            if len(old | {name for name in new if replaces(name)}) == 1:
                old -= new
            for name in sorted(old, key=lambda n: not n.endswith(".index.json")):
                (folder / name).unlink()
            _put_files(aside, folder)
        else:
            put(aside, folder)


def write_for_program(file: Path | None, content: object) -> None:
    """What ``--json`` asks for: the content as JSON, complete or not there; nothing without a file."""
    if file is not None:
        write_text(file, json.dumps(content, indent=1, default=str) + "\n")


def write_json(content: dict, file: Path) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
