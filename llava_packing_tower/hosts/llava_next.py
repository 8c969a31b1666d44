"""LLaVA-NeXT (git only). Same package name as LLaVA 1.x; it alone has resamplers."""

from __future__ import annotations

from pathlib import Path

from .base import Host


def recognises(root: Path) -> bool:
    return (root / "model" / "llava_arch.py").is_file() and (root / "model" / "multimodal_resampler").is_dir()


HOST = Host(
    name="llava_next",
    title="LLaVA-NeXT",
    package="llava",
    recognises=recognises,
    install="git clone https://github.com/LLaVA-VL/LLaVA-NeXT and set LLAVA_NEXT_DIR to the clone",
)
