"""LLaVA-Med 1.5: LLaVA 1.x without its training code, and with Mistral alone."""

from __future__ import annotations

from pathlib import Path

from ..host import Host


def recognises(root: Path) -> bool:
    return (root / "model" / "llava_arch.py").is_file() and not (root / "train").is_dir()


HOST = Host(
    name="llava_med",
    title="LLaVA-Med",
    package="llava",
    recognises=recognises,
    install="git clone https://github.com/microsoft/LLaVA-Med and set LLAVA_DIR to the clone",
    trainers=(),
)
