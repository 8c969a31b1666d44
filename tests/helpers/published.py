"""A hub cache, as downloads leave it, with the golden checkpoints under published names."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

GOLDEN = Path(__file__).parents[1] / "golden"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
HUB_IDS = {
    "siglip2": "google/siglip2-so400m-patch16-naflex",
    "aimv2_native": "apple/aimv2-large-patch14-native",
    "aimv2_learned": "apple/aimv2-large-patch14-224",
    "qwen3_vl": "Qwen/Qwen3-VL-4B-Instruct",
    "qwen2_5_vl": "Qwen/Qwen2.5-VL-7B-Instruct",
    "dinov3": "facebook/dinov3-vitl16-pretrain-lvd1689m",
}


def make_hub(folder: Path, more: Mapping[str, Callable[[Path], object]] | None = None) -> None:
    """Fill ``folder``; ``more``: hub ids, and what writes their checkpoint into a folder."""
    makers = {hub_id: lambda to, name=name: shutil.copytree(GOLDEN / name, to) for name, hub_id in HUB_IDS.items()}
    for hub_id, make in {**makers, **(more or {})}.items():
        cached = folder / f"models--{hub_id.replace('/', '--')}"
        (cached / "refs").mkdir(parents=True)
        (cached / "refs" / "main").write_text(COMMIT)
        make(cached / "snapshots" / COMMIT)
