"""A reloaded LLaVA is whole: every tensor came from a file, none is left on the meta device."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from ..loading import WeightFiles, resolve_folder
from .tuning import LORA_EXTRAS, check_tower_weights, has_weights, refuse

PROJECTOR = "mm_projector.bin"
ADAPTER_PREFIX = "base_model.model."
# transformers 5 stores the experts of a layer in one tensor, whatever the file calls them.
RENAMED_BY_TRANSFORMERS = (".experts.",)


def names_in_files(*folders: str | Path | None) -> set[str]:
    """The names of all tensors of a LLaVA checkpoint and of what it is built on, as the model calls them."""
    names: set[str] = set()
    for folder in (resolve_folder(f) for f in folders if f):
        if has_weights(folder):
            names |= WeightFiles(folder).shapes().keys()
        for extra in (LORA_EXTRAS, PROJECTOR):
            if (folder / extra).is_file():
                names |= torch.load(folder / extra, map_location="cpu", weights_only=True, mmap=True).keys()
    return {name.removeprefix(ADAPTER_PREFIX) for name in names}


def check_loaded(model: nn.Module, model_path: str, model_base: str | None = None) -> None:
    """Raises ``ValueError`` where a loaded LLaVA, or its tower, would not have the weights of its checkpoint."""
    check_tower_weights(model.get_vision_tower(), model.config, model_path, model_base)
    check_whole(model, model_path, model_base)


def check_whole(model: nn.Module, model_path: str, model_base: str | None = None) -> None:
    """Raises ``ValueError`` with the names of tensors that no file has (they would be random), or that are on meta.

    The vision tower is not looked at, it has a check of its own; nor what the caller had offloaded to disk or CPU.
    """
    placed = getattr(model, "hf_device_map", None) or {}
    offloaded = any(place in ("cpu", "disk") for place in placed.values()) and len(set(placed.values())) > 1
    found = names_in_files(model_path, model_base)
    named = dict(model.named_parameters(remove_duplicate=False))
    known = {id(parameter) for name, parameter in named.items() if name in found}  # a tied tensor is in the file once
    problems = {"in no file": [], "on the meta device": []}
    for name, parameter in named.items():
        if "vision_tower." in name:
            continue
        if parameter.is_meta and not offloaded:
            problems["on the meta device"].append(name)
        if name not in found and id(parameter) not in known and not any(w in name for w in RENAMED_BY_TRANSFORMERS):
            problems["in no file"].append(name)
    where = model_path if model_base is None else f"{model_path} and {model_base}"
    refuse(problems, f"the model is not whole after loading {where}")
