"""Which weights a checkpoint holds, as one short word."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from ..utils.files import CONFIG_NAME
from .hashing import hash_files

SUFFIXES = (".safetensors", ".bin", ".model", ".json")
# Written by trainings beside a model; they say nothing about what it answers.
NOT_THE_MODEL = ("training_args.bin", "trainer_state.json", "packing_tower.json")


def identity(
    checkpoint: str | Path,
    base: str | Path | None = None,
    progress: Callable[[int, int], None] = lambda done, count: None,
) -> str:
    """ "w" and 16 hex digits over every byte of the configuration, tokenizer and weights (about a second per GB).

    progress: called with the bytes that are read, and all there are.
    Raises ``ValueError`` for a file that cannot be read, and for a folder without ``config.json``.
    """
    files: list[Path] = []
    for folder in (Path(f) for f in (checkpoint, base) if f):
        if not (folder / CONFIG_NAME).is_file():
            raise ValueError(f"{folder} is not a checkpoint: it has no {CONFIG_NAME}")
        found = (f for f in folder.iterdir() if f.suffix in SUFFIXES and f.name not in NOT_THE_MODEL)
        files += sorted(file for file in found if not file.is_dir())
    digest = hashlib.sha256()
    hash_files(digest, files, progress)
    return f"w{digest.hexdigest()[:16]}"
