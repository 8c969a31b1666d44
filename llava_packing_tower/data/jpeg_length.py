"""JPEG files that are too short for the size in their header: libjpeg silently fills the rest with gray."""

from __future__ import annotations

import io
import os
import re
from typing import BinaryIO

from PIL import Image, JpegImagePlugin

from ..utils.files import reading

_ARITHMETIC = (b"\xff\xc9", b"\xff\xca", b"\xff\xcb", b"\xff\xcd", b"\xff\xce", b"\xff\xcf")
"""Markers of frames in arithmetic coding, which may take less than a bit for a block and leave out zeros at its end
(T.81, table B.1 and annex D)."""
_MARKER = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])")
"""What ends a scan: any marker but a restart; 0xff 0x00 is a byte of the data."""
_END = b"\xd9"
_MORE = bytes(range(1, 255)) + b"".join(bytes((0xFF, 0xD0 + n, *range(1, 255, 7))) for n in range(8))
"""Bits that decode to something, also after each restart marker."""
_GRAY = (127, 128)
"""What libjpeg fills with; 127 where it is inverted (CMYK)."""


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
    if not _is_arithmetic(content):
        raise ValueError(f"its pixel data end early: {length} of at least {blocks // 8} bytes")


def check_jpeg_end(image: Image.Image, file: str | os.PathLike | BinaryIO) -> None:
    """Raises ``ValueError`` where a decoded JPEG ends in gray for lack of data, in spite of its end marker.

    Where the last pixel has that gray, more data are put in front of the end marker: they change the picture if
    the decoder was still waiting for some, and are passed over if it had them all. (In a progressive file this tells of
    the first scan and the last: one that lacks later scans is coarse, not gray.)
    """
    last = image.getpixel((image.width - 1, image.height - 1))
    if not all(value in _GRAY for value in (last if isinstance(last, tuple) else (last,))):
        return
    with reading(file) as data:
        data.seek(0)
        content = data.read()
    end = None if _is_arithmetic(content) else _end_of_scans(content)
    if end is not None and _small(content[:end] + _MORE + content[end:]) != _small(content):
        raise ValueError("its pixel data end early: the rest would be gray")


def _is_arithmetic(content: bytes) -> bool:
    return any(marker in content for marker in _ARITHMETIC)


def _end_of_scans(content: bytes) -> int | None:
    """Where the end marker of the first picture of a file is, behind its segments and scans."""
    at = 2
    while (found := _MARKER.search(content, at)) is not None:
        if found[1] == _END:
            return found.start()
        at = found.end() + int.from_bytes(content[found.end() : found.end() + 2], "big")
    return None


def _small(content: bytes) -> bytes:
    """The gray values of a JPEG that was opened before, at an eighth of its size."""
    with JpegImagePlugin.JpegImageFile(io.BytesIO(content)) as image:
        image.draft("L", (1, 1))
        return image.convert("L").tobytes()
