"""Which weights a checkpoint holds, as one short word."""

from __future__ import annotations

import hashlib
from pathlib import Path

from ..utils.files import CONFIG_NAME

SUFFIXES = (".safetensors", ".bin", ".model", ".json")
# Written by trainings beside a model; they say nothing about what it answers.
NOT_THE_MODEL = ("training_args.bin", "trainer_state.json", "packing_tower.json")


def identity(checkpoint: str | Path, base: str | Path | None = None) -> str:
    """ "w" and 16 hex digits over every byte of the configuration, tokenizer and weights (about a second per GB).

    Raises ``ValueError`` for a folder without ``config.json``.
    """
    digest = hashlib.sha256()
    for folder in (Path(f) for f in (checkpoint, base) if f):
        if not (folder / CONFIG_NAME).is_file():
            raise ValueError(f"{folder} is not a checkpoint: it has no {CONFIG_NAME}")
        files = (f for f in folder.iterdir() if f.suffix in SUFFIXES and f.name not in NOT_THE_MODEL)
        for file in sorted(files):
            digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
            with file.open("rb") as stream:
                while chunk := stream.read(1 << 22):
                    digest.update(chunk)
    return f"w{digest.hexdigest()[:16]}"
