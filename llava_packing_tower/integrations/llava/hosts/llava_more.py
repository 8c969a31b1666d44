"""LLaVA-MORE: LLaVA 1.x with newer decoders and encoders, imported as ``src.llava``."""

from __future__ import annotations

from pathlib import Path

from ..host import Host


def recognises(root: Path) -> bool:
    return (root / "model" / "llava_arch.py").is_file()


HOST = Host(
    name="llava_more",
    title="LLaVA-MORE",
    package="src.llava",
    recognises=recognises,
    install="git clone https://github.com/aimagelab/LLaVA-MORE and set LLAVA_DIR to the clone",
    trainers=(),
)
