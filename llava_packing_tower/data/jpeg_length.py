"""JPEG files that are too short for the size in their header: libjpeg silently fills the rest with gray."""

from __future__ import annotations

import os
from typing import BinaryIO

from PIL import Image

_ARITHMETIC = (b"\xff\xc9", b"\xff\xca", b"\xff\xcb", b"\xff\xcd", b"\xff\xce", b"\xff\xcf")
"""Markers of frames in arithmetic coding, which may take less than a bit for a block (T.81, table B.1)."""


def check_jpeg_length(image: Image.Image, file: str | os.PathLike | BinaryIO) -> None:
    """Raises ``ValueError`` where a JPEG has fewer bits than blocks of 8 x 8 pixels: a Huffman code has at least one.

    (The component that is sampled most has a block for each; a file that ends early in the usual way lacks its end
    marker, and Pillow raises for it.)
    """
    bits, blocks = 8 * _length(file), -(-image.width // 8) * -(-image.height // 8)
    if bits < blocks and not any(marker in _start(file, bits // 8) for marker in _ARITHMETIC):
        raise ValueError(f"its pixel data end early: {bits // 8} of at least {blocks // 8} bytes")


def _length(file: str | os.PathLike | BinaryIO) -> int:
    if isinstance(file, str | os.PathLike):
        return os.path.getsize(file)
    here = file.tell()
    length = file.seek(0, os.SEEK_END)
    file.seek(here)
    return length


def _start(file: str | os.PathLike | BinaryIO, length: int) -> bytes:
    if isinstance(file, str | os.PathLike):
        with open(file, "rb") as opened:
            return opened.read(length)
    here = file.tell()
    file.seek(0)
    content = file.read(length)
    file.seek(here)
    return content
