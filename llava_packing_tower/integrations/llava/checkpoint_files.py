"""The files of a LLaVA checkpoint: which tensors they hold, and under which names."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from ...checkpoint.hub import resolve_folder
from ...checkpoint.weights import WeightFiles, open_weights

ADAPTER = "adapter_config.json"
PROJECTOR = "mm_projector.bin"
LORA_EXTRAS = "non_lora_trainables.bin"
ADAPTER_PREFIX = "base_model.model."
OUTER_TOWER = re.compile(r"(?:^|\.)(?:vision|image)_tower\.(.+)")
"""The tower's place in a LLaVA, and the name that a tensor has in the tower."""


def tensors_of(file: Path) -> Mapping[str, torch.Tensor]:
    """Raises ``ValueError`` that names the file for anything but tensors by name."""
    content = open_weights(file)
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold tensors by name, found {type(content).__name__}")
    return content


def names_in_files(*folders: str | Path | None) -> set[str]:
    """The names of all tensors of a LLaVA checkpoint and of what it is built on, as the model calls them."""
    names: set[str] = set()
    for folder in (resolve_folder(f, more=(PROJECTOR, LORA_EXTRAS)) for f in folders if f):
        if has_weights(folder):
            names |= WeightFiles(folder).shapes().keys()
        for extra in (LORA_EXTRAS, PROJECTOR):
            if (folder / extra).is_file():
                names |= tensors_of(folder / extra).keys()
    return {name.removeprefix(ADAPTER_PREFIX) for name in names}


def refuse(problems: Mapping[str, list[str]], sentence: str) -> None:
    """Raises ``ValueError``: the sentence, then how many and which names have each problem; nothing if none has any."""
    lines = [
        f"  {len(names)} {what}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
        for what, names in problems.items()
        if names
    ]
    if lines:
        raise ValueError(f"{sentence}:\n" + "\n".join(lines))


class _TowerTensors(Mapping):
    """The tower's tensors of one weight file or folder, under the names they have in the tower."""

    def __init__(self, names: Mapping[str, str], source: object) -> None:
        self._names, self._source = names, source

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._source[self._names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def tower_tensors(model_path: str, model_base: str | None) -> Mapping[str, torch.Tensor]:
    """The tensors of the tower by their names in it, read when they are asked for; empty if there are none.

    They come from the first that has them: what LoRA training saved beside its adapter, the model's own files, the
    base's files.
    """
    for folder in filter(None, (model_path, model_base)):
        folder = resolve_folder(folder, more=(LORA_EXTRAS,))
        extras = folder / LORA_EXTRAS
        sources: list[tuple[object, list[str]]] = []
        if extras.is_file():
            tensors = tensors_of(extras)
            sources.append((tensors, list(tensors)))
        if has_weights(folder):
            files = WeightFiles(folder)
            sources.append((files, list(files.shapes())))
        for source, keys in sources:
            names = {found[1]: key for key in keys if (found := OUTER_TOWER.search(key))}
            if names:
                return _TowerTensors(names, source)
    return {}


def has_weights(folder: Path) -> bool:
    """Whether a folder holds the weights of a whole model."""
    bases = ("model.safetensors", "pytorch_model.bin")
    return any((folder / base).is_file() or (folder / f"{base}.index.json").is_file() for base in bases)
