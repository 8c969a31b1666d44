"""The image preprocessing of timm's config.json, with the keys of a preprocessor_config.json."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from ..utils.files import CONFIG_NAME, read_json

_FILTERS = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}


def timm_part(raw: Mapping, name: str) -> Mapping:
    """``pretrained_cfg`` or ``model_args`` of timm's config.json; empty where it has none. Raises ``ValueError`` for
    anything but a mapping."""
    found = raw.get(name) or {}
    if not isinstance(found, Mapping):
        raise ValueError(f"{name} of timm's config.json must be a mapping, got {found!r:.80}")
    return found


def timm_content(folder: str | os.PathLike) -> dict | None:
    """Mean, standard deviation, filter, size and crop; None for a folder without timm's config.json. The size of a
    NaFlex model, which takes any, is left out.

    timm resizes the short edge to ``size / crop_pct`` and cuts the center out (``crop_mode`` "center"), or stretches
    ("squash"). Raises ``ValueError`` for another mode or an unknown filter.
    """
    file = Path(folder) / CONFIG_NAME
    whole = read_json(file) if file.is_file() else {}
    if "architecture" not in whole:
        return None
    try:
        said = timm_part(whole, "pretrained_cfg") or whole
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    filter_name, mode = said.get("interpolation"), said.get("crop_mode", "center")
    if filter_name is not None and not (isinstance(filter_name, str) and filter_name in _FILTERS):
        raise ValueError(f"{file}: interpolation {filter_name!r:.80} is none of {', '.join(_FILTERS)}")
    if mode not in ("center", "squash"):
        raise ValueError(f"{file}: crop_mode {mode!r:.80} is neither center nor squash")
    content = {
        "image_mean": said.get("mean"),
        "image_std": said.get("std"),
        "resample": _FILTERS.get(filter_name or ""),
    }
    size, share = said.get("input_size"), said.get("crop_pct") or 1.0
    if "naflex" not in str(whole["architecture"]) and isinstance(size, (list, tuple)) and len(size) == 3:
        height, width = size[1:]
        if type(height) is not int or type(width) is not int or min(height, width) < 1:
            raise ValueError(f"{file}: input_size must be channels, height and width in pixels, got {size!r:.80}")
        if type(share) not in (int, float) or not 0.01 <= share <= 1:
            raise ValueError(f"{file}: crop_pct must be a share from 0.01 to 1, got {share!r:.80}")
        shortest = int(min(height, width) / share)
        square = {"height": height, "width": width}
        content["size"] = square if mode == "squash" else {"shortest_edge": shortest}
        content["crop_size"] = square
    return {name: value for name, value in content.items() if value is not None}
