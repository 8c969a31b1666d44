"""LLaVA-MORE: LLaVA 1.x with newer decoders and encoders, imported as ``src.llava``."""

from __future__ import annotations

from ..host import Host

HOST = Host(
    name="llava_more",
    title="LLaVA-MORE",
    package="src.llava",
    install="git clone https://github.com/aimagelab/LLaVA-MORE and set LLAVA_DIR to the clone",
    trainers=(),
)
