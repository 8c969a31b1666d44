"""Whether the files of a training's data are still those that they were. No torch here."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from ..data.samples import data_files
from ..utils.files import user_path

WHOLE = 64 << 20
"""Bytes up to which a file is hashed from its beginning to its end."""
BLOCKS, BLOCK = 64, 1 << 20
"""Larger ones: so many blocks of so many bytes, evenly spread from the first to the last."""


def note_of(data_path: str) -> list[list[str]]:
    """The files that ``data_path`` names, each with how it is sampled, its size and a hash; not there: "missing".

    In a file above :data:`WHOLE` a change that keeps its size is seen if it reaches one of the blocks, as another
    order does. Raises ``ValueError`` for a YAML that names no data.
    """
    return [[str(file.path), _signature(user_path(str(file.path)), file.strategy)] for file in data_files(data_path)]


def _signature(file: Path, strategy: str) -> str:
    if not file.is_file():
        return "missing"
    size, digest = file.stat().st_size, hashlib.blake2b(digest_size=16)
    with file.open("rb") as stream:
        if size <= WHOLE:
            digest.update(stream.read())
        else:
            for number in range(BLOCKS):
                stream.seek(number * (size - BLOCK) // (BLOCKS - 1), os.SEEK_SET)
                digest.update(stream.read(BLOCK))
    return f"{strategy} {size} {digest.hexdigest()}"


def changed_since(was: Sequence[Sequence[str]], now: Sequence[Sequence[str]]) -> str | None:
    """What differs between two notes, in words; None if the files have the same content, wherever they are."""
    before, after = ([signature for _, signature in note] for note in (was, now))
    if before == after:
        return None
    if others := [path for path, signature in now if signature not in before]:
        return f"{', '.join(others[:3])}{f' and {len(others) - 3} more' if len(others) > 3 else ''} changed"
    return "the order or number of its files changed"
