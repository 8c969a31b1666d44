"""The fork of LLaVA-NeXT in the repository of OneVision-Encoder: Qwen2 and Qwen3, and towers that take positions.

It passes ``grid_thw`` and, for each sample, ``patch_positions`` to the tower. Its images keep one size of several
(``anyres``), or their own (``native``).
"""

from __future__ import annotations

from pathlib import Path

from ..host import Host, Part


def recognises(root: Path) -> bool:
    return (root / "model" / "multimodal_encoder" / "onevision_encoder.py").is_file()


HOST = Host(
    name="onevision",
    title="OneVision-Encoder's LLaVA-NeXT",
    package="llava",
    folder="llava_next",
    recognises=recognises,
    install="git clone https://github.com/EvolvingLMMs-Lab/OneVision-Encoder and set LLAVA_DIR to the clone",
    reads_videos=True,
    joins_on_host=True,
    gridded_images=(
        Part("mm_utils", "process_native_image", ("image", "processor")),
        Part("mm_utils", "process_anyres_image", ("image", "processor")),
    ),
)
