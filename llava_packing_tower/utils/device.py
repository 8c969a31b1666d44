"""The device that a user names."""

from __future__ import annotations

import torch


def resolve_device(name: str | None, option: str = "--device") -> torch.device:
    """``cpu``, ``cuda`` or ``cuda:N``; ``auto`` and None are a GPU where there is one.

    Raises ``ValueError`` for one that is not there, and for any other kind.
    """
    if name in (None, "auto"):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(str(name))
    except RuntimeError as error:
        raise ValueError(f"{option} {name}: must be auto, cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"{option} {name}: must be auto, cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"{option} {name}: this machine has no CUDA device, or this torch was built without CUDA")
    if device.type == "cuda" and device.index is not None and device.index >= torch.cuda.device_count():
        raise ValueError(f"{option} {name}: this machine has {torch.cuda.device_count()} GPUs")
    return device
