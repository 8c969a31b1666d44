"""What a LLaVA checkpoint remembers of its tower, ``mm_packing_config``, and what a tower is rebuilt from with it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from ..checkpoint.hashing import folder_fingerprint
from ..checkpoint.hub import resolve_path
from ..data.image_processor import PackingImageProcessor
from ..models.registry import part_of
from ..utils.files import CONFIG_NAME, read_json, user_path
from .names import strip_prefix


def saved_tower(args: object) -> dict[str, Any]:
    """What a LLaVA checkpoint says about its tower, ``mm_packing_config``; empty where it says nothing.

    Raises ``ValueError`` for one that ``packing_config()`` of a tower cannot have written.
    """
    saved = getattr(args, "mm_packing_config", None)
    saved = {} if saved is None else saved
    if not isinstance(saved, Mapping) or saved.get("weights", "folder") not in ("checkpoint", "folder"):
        raise ValueError(
            f"mm_packing_config must be a mapping with weights 'checkpoint' or 'folder', got {saved!r:.80}"
        )
    for key in ("config", "image_processor"):
        if not isinstance(saved.get(key, None if saved.get("weights") == "checkpoint" else {}), Mapping):
            raise ValueError(f"mm_packing_config.{key} must be a mapping, got {saved.get(key)!r:.80}")
    for key in ("folder", "fingerprint"):
        if not isinstance(saved.get(key, ""), str):
            raise ValueError(f"mm_packing_config.{key} must be a text, got {saved[key]!r:.80}")
    return dict(saved)


def saved_in(file: Path, content: Mapping) -> dict[str, Any]:
    """:func:`saved_tower` of the content of a config.json. Raises ``ValueError`` that names the file."""
    try:
        return saved_tower(SimpleNamespace(mm_packing_config=content.get("mm_packing_config")))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def hollow(shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """An uninitialized weight that is to be loaded. Its first element is NaN, which shows if it was not loaded.

    (Memory that has not been written to costs nothing.) Raises ``ValueError`` for a shape that cannot be allocated.
    """
    try:
        weight = torch.empty(shape, dtype=dtype)
    except RuntimeError as error:
        raise ValueError(f"mm_packing_config.config asks for a weight of {list(shape)}: {error}") from error
    weight.view(-1)[:1] = torch.nan
    return weight


def tower_fingerprint(path: Path) -> str:
    """sha256 of what a tower is made of: the files of its folder, its file or, in a larger checkpoint, its tensors."""
    config = path / CONFIG_NAME
    return folder_fingerprint(path, part_of(read_json(config)) if config.is_file() else None)


def frozen_folder(name: str, note: Mapping) -> Path | None:
    """The folder of a frozen tower: what its name is from here, else where it was in training; None for neither.

    note: ``mm_packing_config``. A relative name may be another tower's from here: where training noted the folder, that
    one comes first, and a fingerprint that differs counts as absent.
    """
    typed, noted = strip_prefix(name), note.get("folder")
    relative = not user_path(typed).is_absolute()
    places = [user_path(place) for place in ((noted, typed) if relative else (typed, noted)) if place]
    there = [place for place in places if place.exists()]
    if not there and relative and note.get("folder") is None:
        try:
            return resolve_path(typed, part=part_of)  # a hub id
        except ValueError:
            return None
    if not relative or (expected := note.get("fingerprint")) is None:
        return next(iter(there), None)
    return next((place for place in there if tower_fingerprint(place) == expected), None)


def device_of(device_map: Any) -> torch.device:
    """Where the weights go for what LLaVA passes as ``device_map``."""
    if isinstance(device_map, dict):
        hits = [value for key, value in device_map.items() if key == "" or key.endswith("vision_tower")]
        device_map = hits[0] if hits else None
    if device_map is None:
        return torch.device("cpu")
    if device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    return torch.device(device_map if not isinstance(device_map, int) else f"cuda:{device_map}")


def wants_loading(args: object) -> bool:
    """Whether LLaVA's arguments say that the tower is trained (then it is loaded even if loading may be delayed)."""
    parts = getattr(args, "mm_tunable_parts", None) or ""
    return bool(getattr(args, "unfreeze_mm_vision_tower", False)) or "mm_vision_tower" in parts


def fitting_processor(processor: PackingImageProcessor, patch_size: int) -> PackingImageProcessor:
    """The processor, or one like it whose images have sides of whole patches (384 pixels and patch 14: 378)."""
    if getattr(processor, "patch_size", None) is not None:
        return processor
    sides = processor.crop_size if processor.do_center_crop else processor.size
    if all(side % patch_size == 0 for name, side in sides.items() if name != "shortest_edge"):
        return processor
    fitting = type(processor).from_dict({**processor.to_dict(), "patch_size": patch_size})
    fitting.image_reading = processor.image_reading
    return fitting
