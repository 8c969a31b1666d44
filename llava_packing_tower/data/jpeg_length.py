"""JPEG files that are too short for the size in their header: libjpeg silently fills the rest with gray."""

from __future__ import annotations

import os
from typing import BinaryIO

from PIL import Image

from ..utils.files import reading

_ARITHMETIC = (b"\xff\xc9", b"\xff\xca", b"\xff\xcb", b"\xff\xcd", b"\xff\xce", b"\xff\xcf")
"""Markers of frames in arithmetic coding, which may take less than a bit for a block (T.81, table B.1)."""


def check_jpeg_length(image: Image.Image, file: str | os.PathLike | BinaryIO) -> None:
    """Raises ``ValueError`` where a JPEG has fewer bits than blocks of 8 x 8 pixels: a Huffman code has at least one.

    (The component that is sampled most has a block for each; a file that ends early in the usual way lacks its end
    marker, and Pillow raises for it.)
    """
    blocks = -(-image.width // 8) * -(-image.height // 8)
    with reading(file) as data:
        length = data.seek(0, os.SEEK_END)
        if 8 * length >= blocks:
            return
        data.seek(0)
        content = data.read(length)
    if not any(marker in content for marker in _ARITHMETIC):
        raise ValueError(f"its pixel data end early: {length} of at least {blocks // 8} bytes")
