"""LLaVA 1.x, the official repository up to LLaVA-1.6, on PyPI as llava-torch. Open-LLaVA-NeXT has its files."""

from __future__ import annotations

from pathlib import Path

from ..host import Host


def recognises(root: Path) -> bool:
    return (root / "model" / "llava_arch.py").is_file() and not (root / "model" / "multimodal_resampler").is_dir()


HOST = Host(
    name="llava_v1",
    title="LLaVA",
    package="llava",
    recognises=recognises,
    install="pip install --no-deps llava-torch==1.2.2.post1, or clone it and set LLAVA_DIR to the clone",
    distribution="llava-torch",
    joins_on_host=True,
)
