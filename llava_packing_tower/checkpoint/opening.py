"""What a user names as a checkpoint: a folder, a hub id or a weight file, with or without a config.json."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..utils.files import CONFIG_NAME, read_json, user_path
from .hub import Part, resolve_path
from .namings import recognized, refusal
from .single_file import open_file
from .weights import WeightFiles

SHARD = re.compile(r".*-\d+-of-\d+\.(safetensors|bin)")


@dataclass
class Checkpoint:
    """An opened checkpoint: ``path`` is its folder or file, ``raw`` the content of its config.json (empty without
    one), with the ``model_type`` that its weights have where it says none. ``ignored``: what a file holds besides the
    weights, with the reason why it is left out.
    """

    path: Path
    raw: dict
    files: WeightFiles
    ignored: dict[str, str] = field(default_factory=dict)

    @property
    def where(self) -> Path:
        """For messages about the config: its config.json, or the weights that stand for it."""
        config = self.path / CONFIG_NAME
        return config if config.is_file() else self.path


def open_files(
    name: str | os.PathLike,
    subfolder: str = "",
    use_safetensors: bool | None = None,
    part: Part = lambda raw: None,
    **hub: Any,
) -> Checkpoint:
    """A folder, hub id or file as it is, whatever it holds; of a folder or hub id, its ``part`` (see :mod:`.hub`).
    ``hub`` goes to huggingface_hub.

    Raises ``ValueError`` if nothing is there, or it cannot be read.
    """
    path = resolve_path(name, subfolder=subfolder, part=part, **hub)
    given = user_path(os.fspath(name))
    if given.is_file():
        if subfolder:
            raise ValueError(f"{given} is a file, which has no subfolder {subfolder!r}")
        if SHARD.fullmatch(given.name):
            raise ValueError(f"{given} is one shard of a checkpoint: give its folder, {given.parent}")
        if path == given:
            files = open_file(path)
            return Checkpoint(path, {}, files, files.ignored)
        use_safetensors = given.suffix.lower() == ".safetensors"
    described = (path / CONFIG_NAME).is_file()
    raw = read_json(path / CONFIG_NAME) if described else {}
    try:
        found = WeightFiles(path, use_safetensors, part(raw))
        return Checkpoint(path, raw, found, dict.fromkeys(found.left, "not the tower's: left where it is"))
    except ValueError as error:
        if described and raw.get("model_type") is not None:
            raise
        if described:
            raise ValueError(f"{path / CONFIG_NAME} names no model_type, and {error}") from error
        raise ValueError(f"{path} has no {CONFIG_NAME}; {error}") from error


def identify(checkpoint: Checkpoint) -> bool:
    """Give a checkpoint without ``model_type`` the one of its naming, and the small values that belong to it; whether
    it has one then."""
    if checkpoint.raw.get("model_type"):  # (NVIDIA's RADIO has an empty one)
        return True
    naming = recognized(checkpoint.raw, checkpoint.files.shapes(), checkpoint.where)
    if naming is None:
        return False
    values = {name: checkpoint.files[name].tolist() for name in naming.values}
    checkpoint.raw = {**checkpoint.raw, **values, "model_type": naming.model_type}
    return True


def open_checkpoint(
    name: str | os.PathLike,
    subfolder: str = "",
    use_safetensors: bool | None = None,
    part: Part = lambda raw: None,
    **hub: Any,
) -> Checkpoint:
    """A folder, hub id or file whose ``model_type`` is known, from its config.json or from its weights.

    Raises ``ValueError`` where it is not, with what the weights look like.
    """
    checkpoint = open_files(name, subfolder, use_safetensors, part, **hub)
    if not identify(checkpoint):
        nameless = f"{checkpoint.where} has no model_type, and " if checkpoint.where != checkpoint.path else ""
        raise ValueError(nameless + refusal(checkpoint.files.shapes(), checkpoint.path))
    return checkpoint


def blocks_of(shapes: Mapping[str, tuple[int, ...]], rule: str) -> int:
    """How many blocks there are, from tensors whose number the group of ``rule`` takes. Raises ``ValueError`` for
    none."""
    numbers = [int(match[1]) for name in shapes if (match := re.fullmatch(rule, name))]
    if not numbers:
        raise ValueError(f"no blocks found (tensors named like {rule})")
    return max(numbers) + 1
