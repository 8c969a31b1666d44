"""What Pillow does not look at in a PNG file: whether its pixels are whole, and EXIF data behind them. No torch here.

Chunks and their order: PNG specification, sections 5 and 11.
"""

from __future__ import annotations

import contextlib
import os
import zlib
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
from PIL import Image

from ..utils.files import reading

_SIGNATURE, _CHECKSUM = b"\x89PNG\r\n\x1a\n", 4
_EXIF = (b"eXIf", b"iTXt", b"tEXt", b"zTXt")
"""Chunks that may hold an orientation; of the texts, under the names that Pillow reads."""


@contextlib.contextmanager
def _chunks(file: str | os.PathLike | BinaryIO) -> Iterator[tuple[BinaryIO, Iterator[tuple[bytes, int]]]]:
    """The stream, and kind and length of each chunk; the stream is where the data of the chunk begin."""
    with reading(file) as data:
        yield data, _heads(data)


def _heads(data: BinaryIO) -> Iterator[tuple[bytes, int]]:
    at = len(_SIGNATURE)
    data.seek(at)
    while len(head := data.read(8)) == 8 and head[4:] != b"IEND":
        length = int.from_bytes(head[:4], "big")
        yield head[4:], length
        at += 8 + length + _CHECKSUM
        data.seek(at)


def has_late_exif(file: str | os.PathLike | BinaryIO) -> bool:
    """Whether an orientation may stand behind the pixels; only the heads of chunks are read."""
    with _chunks(file) as (_, heads):
        kinds = [kind for kind, _ in heads]
    behind = kinds[kinds.index(b"IDAT") :] if b"IDAT" in kinds else []
    return any(kind in _EXIF for kind in behind)


def check_pixel_data(image: Image.Image, file: str | os.PathLike | BinaryIO) -> None:
    """Raises ``ValueError`` where the pixel data of a PNG end early: Pillow silently leaves the rest at zero.

    Only an image whose last row is zero (or that is interlaced) is checked: decompressing twice costs time.
    """
    last_row = image.crop((0, image.height - 1, image.width, image.height))
    if not image.info.get("interlace") and np.asarray(last_row).any():
        return
    stream, count, need = zlib.decompressobj(), 0, 0
    with _chunks(file) as (data, heads):
        for kind, length in heads:
            if kind not in (b"IHDR", b"IDAT"):
                continue
            part = data.read(length)
            if kind == b"IHDR":
                need = _decompressed_bytes(part)
            while kind == b"IDAT" and (part or stream.unconsumed_tail) and not stream.eof:
                out = stream.decompress(part or stream.unconsumed_tail, 1 << 20)  # in pieces: the image is in memory
                count, part = count + len(out), b""
    count += len(stream.flush())
    if count < need:
        raise ValueError(f"its pixel data end early: {count} of {need} bytes")


def _decompressed_bytes(header: bytes) -> int:
    """Bytes of the decompressed pixel data of a PNG: each row has one more, for its filter (section 7.2)."""
    width, height = (int.from_bytes(header[at : at + 4], "big") for at in (0, 4))
    depth, color, interlaced = header[8], header[9], header[12]
    bits = depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[color]
    # Start and step of columns and rows of each pass; one pass without interlacing (8.2, Adam7).
    adam7 = ((0, 8, 0, 8), (4, 8, 0, 8), (0, 4, 4, 8), (2, 4, 0, 4), (0, 2, 2, 4), (1, 2, 0, 2), (0, 1, 1, 2))
    total = 0
    for left, right, top, down in adam7 if interlaced else ((0, 1, 0, 1),):
        columns, rows = -(-(width - left) // right), -(-(height - top) // down)
        if columns > 0 and rows > 0:
            total += rows * (1 + -(-columns * bits // 8))
    return total
