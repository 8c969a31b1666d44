"""What LLaVA's arguments say about loading a tower: whether now, and where to."""

from __future__ import annotations

from typing import Any

import torch


def wants_loading(args: object) -> bool:
    """Whether LLaVA's arguments say that the tower is trained (then it is loaded even if loading may be delayed)."""
    parts = getattr(args, "mm_tunable_parts", None) or ""
    return bool(getattr(args, "unfreeze_mm_vision_tower", False)) or "mm_vision_tower" in parts


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
