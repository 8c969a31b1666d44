"""266 odd image files, made in a second: what each is, and what every way of reading it must give.

Most are one picture of four quarters, saved in every way that there is; the others must be refused.
"""

from __future__ import annotations

import gzip
import io
import os
import random
import socket
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, PngImagePlugin

COLORS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255))
SIZE = (48, 32)
EXACT, LOSSY, ROUGH = 2, 40, 90
READ, LONG, REFUSED = "read", "long", "refused"
"""LONG: read, but refused at native resolution."""


class Odd(NamedTuple):
    """A file. quarters: the colors ``[4, 3]`` of the picture, row by row, to within ``slack``; None if not looked at.

    by_path: whether only a path can be given (a pipe, a folder), not what it holds.
    """

    path: Path
    outcome: str
    quarters: np.ndarray | None = None
    slack: int = EXACT
    by_path: bool = False


def picture(colors=COLORS, size=SIZE) -> Image.Image:
    width, height = size
    pixels = np.zeros((height, width, 3), np.uint8)
    for number, color in enumerate(colors):
        top, left = (height // 2) * (number // 2), (width // 2) * (number % 2)
        pixels[top : top + height // 2, left : left + width // 2] = color
    return Image.fromarray(pixels)


GRAY = np.array([[0.299 * r + 0.587 * g + 0.114 * b] * 3 for r, g, b in COLORS])
BITS = (GRAY > 127) * 255
# What a camera stores so that a viewer, which undoes it, shows the picture upright.
TURNS = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, data: bytes, *more: bytes, color: int = 2, packed: bool = True) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, color, 0, 0, 0)
    data = zlib.compress(data) if packed else data
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(more) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


class Corpus:
    """Collects the files of a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.files = folder, []
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, name: str, content: bytes, outcome: str = READ, quarters=None, slack: int = EXACT) -> None:
        path = self.folder / name
        path.write_bytes(content)
        self.files.append(Odd(path, outcome, None if quarters is None else np.asarray(quarters, float), slack))

    def add_path(self, name: str, make: Callable[[Path], object], outcome: str = REFUSED, quarters=None) -> None:
        path = self.folder / name
        make(path)
        self.files.append(Odd(path, outcome, None if quarters is None else np.asarray(quarters, float), by_path=True))


def orientations(corpus: Corpus) -> None:
    for kind, options, slack in (
        ("JPEG", {"quality": 95}, LOSSY),
        ("PNG", {}, EXACT),
        ("TIFF", {}, EXACT),
        ("WEBP", {"lossless": True}, EXACT),
    ):
        for orientation, turn in TURNS.items():
            exif = Image.Exif()
            exif[0x0112] = orientation
            stored = picture() if turn is None else picture().transpose(turn)
            corpus.add(
                f"turned{orientation}.{kind.lower()}", encoded(stored, kind, exif=exif, **options), READ, COLORS, slack
            )


MODES = {
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA"),
    "JPEG": ("L", "RGB", "CMYK"),
    "TIFF": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK"),
    "WEBP": ("RGB", "RGBA"),
    "GIF": ("L", "P", "RGB"),
    "BMP": ("1", "L", "P", "RGB"),
    "PPM": ("1", "L", "RGB"),
    "TGA": ("L", "LA", "P", "RGB", "RGBA"),
    "PCX": ("1", "L", "P", "RGB"),
    "SGI": ("L", "RGB", "RGBA"),
    "DDS": ("L", "RGB", "RGBA"),
    "IM": ("1", "L", "P", "RGB"),
    "DIB": ("RGB",),
    "ICO": ("RGBA",),
    "JPEG2000": ("L", "RGB", "RGBA"),
}


def modes(corpus: Corpus) -> None:
    for kind, names in MODES.items():
        for mode in names:
            image = picture(size=(48, 48) if kind == "ICO" else SIZE).convert(mode, dither=Image.Dither.NONE)
            options = {"quality": 95} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
            options |= {"sizes": [(48, 48)]} if kind == "ICO" else {}
            quarters = BITS if mode == "1" else GRAY if mode in ("L", "LA") else COLORS
            slack = LOSSY if kind == "JPEG" else 6 if kind == "GIF" else EXACT
            corpus.add(f"{kind.lower()}_{mode}.{kind.lower()}", encoded(image, kind, **options), READ, quarters, slack)


def grays(corpus: Corpus) -> None:
    unit = np.kron(np.array([[0.0, 0.25], [0.5, 1.0]]), np.ones((16, 24)))
    wanted = [[round(255 * value)] * 3 for value in (0, 0.25, 0.5, 1)]
    for name, values in {
        "uint16.png": (unit * 65535).astype(np.uint16),
        "uint16.tif": (unit * 65535).astype(np.uint16),
        "int32_small.tif": (unit * 65535).astype(np.int32),
        "int32.tif": (unit * (2**31 - 1)).astype(np.int32),
        "float.tif": unit.astype(np.float32),
        "float255.tif": (unit * 255).astype(np.float32),
    }.items():
        corpus.add(name, encoded(Image.fromarray(values), "PNG" if name.endswith("png") else "TIFF"), READ, wanted)
    dark = [[0] * 3, [4] * 3, [8] * 3, [16] * 3]  # 12 bits in 16: as a viewer shows them
    corpus.add("uint12.png", encoded(Image.fromarray((unit * 4095).astype(np.uint16)), "PNG"), READ, dark)
    corpus.add("pgm16.pgm", b"P5 2 2 65535\n" + np.array([0, 16384, 32768, 65535], ">u2").tobytes(), READ)
    for name, values in {
        "negative.tif": unit - 0.5,
        "beyond.tif": unit * 300,
        "nan.tif": np.where(unit == 1, np.nan, unit),
        "inf.tif": np.where(unit == 1, np.inf, unit),
    }.items():
        corpus.add(name, encoded(Image.fromarray(values.astype(np.float32)), "TIFF"), REFUSED)
    corpus.add("negative32.tif", encoded(Image.fromarray((unit * 9 - 4).astype(np.int32)), "TIFF"), REFUSED)


def clear(corpus: Corpus) -> None:
    """The first quarter, black underneath, is clear: it is white, the default background."""
    image = picture(((0, 0, 0), *COLORS[1:]))
    alpha = Image.new("L", SIZE, 255)
    alpha.paste(0, (0, 0, 24, 16))
    image.putalpha(alpha)
    white = ((255, 255, 255), *COLORS[1:])
    gray = ((255, 255, 255), *GRAY[1:])
    for name, kind, options in (
        ("clear.png", "PNG", {}),
        ("clear.webp", "WEBP", {"lossless": True, "exact": True}),
        ("clear.tif", "TIFF", {}),
        ("clear.tga", "TGA", {}),
    ):
        corpus.add(name, encoded(image, kind, **options), READ, white)
    corpus.add("clear_LA.png", encoded(image.convert("LA"), "PNG"), READ, gray)
    palette = picture(((0, 0, 0), *COLORS[1:])).quantize(4)
    index = palette.getpixel((1, 1))
    corpus.add("clear_P.png", encoded(palette, "PNG", transparency=index), READ, white, 6)
    corpus.add("clear.gif", encoded(palette, "GIF", transparency=index), READ, white, 6)
    corpus.add("clear_RGB.png", encoded(image.convert("RGB"), "PNG", transparency=(0, 0, 0)), READ, white)
    corpus.add("clear_L.png", encoded(image.convert("L"), "PNG", transparency=0), READ, gray)


def animations(corpus: Corpus) -> None:
    others = [Image.new("RGB", SIZE, color) for color in ("black", "gray")]
    for kind, options in (("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {}), ("TIFF", {})):
        for count in (1, 2):
            content = encoded(picture(), kind, save_all=True, append_images=others[:count], **options)
            corpus.add(f"animated{count}.{kind.lower()}", content, READ, COLORS, 6)


def strips(corpus: Corpus) -> None:
    for width, height in ((1, 1), (2, 2), (7, 3), (1, 199), (200, 1), (1, 201), (5000, 1), (1, 20_000), (60_000, 2)):
        for kind in ("PNG", "JPEG"):
            outcome = LONG if max(width, height) > 200 * min(width, height) else READ
            content = encoded(Image.new("RGB", (width, height), (9, 99, 199)), kind)
            corpus.add(f"strip_{width}x{height}.{kind.lower()}", content, outcome)


def truncated(corpus: Corpus) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8))
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "TGA", "SGI", "PCX"):
        content = encoded(noise, kind)
        for share in (20, 50, 75, 95):
            corpus.add(f"cut{share}.{kind.lower()}", content[: len(content) * share // 100], REFUSED)


def headers(corpus: Corpus) -> None:
    """A few bytes that say that there are billions of pixels."""
    for side in (13_400, 30_000, 65_535, 2**31 - 1):
        corpus.add(f"bomb{side}.png", png(side, side, b""), REFUSED)
    gif = bytearray(encoded(Image.new("P", (4, 4)), "GIF"))
    gif[6:10] = struct.pack("<HH", 65535, 65535)
    corpus.add("bomb.gif", bytes(gif), REFUSED)
    bmp = bytearray(encoded(Image.new("RGB", (4, 4)), "BMP"))
    bmp[18:26] = struct.pack("<ii", 50_000, 50_000)
    corpus.add("bomb.bmp", bytes(bmp), REFUSED)
    corpus.add("bomb.ppm", b"P6 60000 60000 255\n" + bytes(30), REFUSED)
    jpeg = encoded(Image.new("RGB", (8, 8)), "JPEG")
    at = jpeg.index(b"\xff\xc0") + 5
    corpus.add("bomb.jpg", jpeg[:at] + struct.pack(">HH", 65500, 65500) + jpeg[at + 4 :], REFUSED)


def no_images(corpus: Corpus) -> None:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as zipped:
        zipped.writestr("a.png", encoded(picture(), "PNG"))
    draw = random.Random(0)
    for name, content in {
        "empty.png": b"",
        "text.png": b"this is no image\n",
        "page.jpg": b"<!DOCTYPE html><html>404 Not Found</html>",
        "list.png": b'[{"id": 1}]',
        "pointer.png": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        "archive.png": archive.getvalue(),
        "packed.png": gzip.compress(encoded(picture(), "PNG")),
        "drawing.svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
        "video.png": b"\0\0\0\x18ftypmp42" + bytes(99),
        "program.png": b"\x7fELF" + bytes(99),
        "magic.png": b"\x89PNG\r\n\x1a\n",
        "magic.jpg": b"\xff\xd8\xff",
        "magic.gif": b"GIF89a",
        "magic.webp": b"RIFF\x10\0\0\0WEBPVP8 ",
        "magic.tif": b"II*\0",
        "magic.bmp": b"BM",
        "zeros.png": bytes(5000),
        "document.pdf": b"%PDF-1.4\n%%EOF",
        "script.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",
        **{f"random{number}.png": draw.randbytes(400 + number) for number in range(4)},
    }.items():
        corpus.add(name, content, REFUSED)


def no_files(corpus: Corpus) -> None:
    inside = corpus.folder / "inside"
    inside.mkdir()
    good = corpus.folder / "good.png"
    good.write_bytes(encoded(picture(), "PNG"))
    corpus.add_path("pipe.png", os.mkfifo)
    corpus.add_path("folder.png", os.mkdir)
    corpus.add_path("missing.png", lambda path: None)
    corpus.add_path("broken_link.png", lambda path: path.symlink_to("nowhere.png"))
    corpus.add_path("loop.png", lambda path: path.symlink_to(path))
    corpus.add_path("link_to_folder.png", lambda path: path.symlink_to(inside))
    corpus.add_path("device.png", lambda path: path.symlink_to("/dev/zero"))
    corpus.add_path("null.png", lambda path: path.symlink_to("/dev/null"))
    corpus.add_path("socket.png", bind)
    corpus.add_path("behind_a_file/x.png", lambda path: path.parent.write_bytes(b""))
    corpus.add_path("link.png", lambda path: path.symlink_to(good), READ, COLORS)
    corpus.add_path("link_to_link.png", lambda path: path.symlink_to(corpus.folder / "link.png"), READ, COLORS)


def bind(path: Path) -> None:
    """A socket; its whole path may be too long for one."""
    here = os.getcwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


def names(corpus: Corpus) -> None:
    content = encoded(picture(), "PNG")
    long = "n" * 240 + ".png"
    for name in (
        "with space.png", "ünïcødé 图.png", "100%#?&.png", "-dash.png", "UPPER.PNG", "none", "wrong.jpg", "two.png.txt",
        ".hidden.png", "line\nbreak.png", "quote'\".png", long,
    ):  # fmt: skip
        corpus.add(name, content, READ, COLORS)


def unusual(corpus: Corpus) -> None:
    plain, whole = encoded(picture(), "PNG"), encoded(picture(), "JPEG", quality=95)
    exif = Image.Exif()
    exif[0x010E] = "x" * 50_000
    texts = PngImagePlugin.PngInfo()
    texts.add_text("comment", "y" * 9000, zip=True)
    for name, content, slack in (
        ("progressive.jpg", encoded(picture(), "JPEG", quality=95, progressive=True), LOSSY),
        ("optimized.jpg", encoded(picture(), "JPEG", quality=95, optimize=True), LOSSY),
        ("full_chroma.jpg", encoded(picture(), "JPEG", quality=95, subsampling=0), LOSSY),
        ("rough.jpg", encoded(picture(), "JPEG", quality=10), ROUGH),
        ("restarts.jpg", encoded(picture(), "JPEG", quality=95, restart_marker_blocks=1), LOSSY),
        ("large_exif.jpg", encoded(picture(), "JPEG", quality=95, exif=exif), LOSSY),
        ("damaged_exif.jpg", encoded(picture(), "JPEG", quality=95, exif=b"Exif\0\0MM\0*\0\0\xff\xff"), LOSSY),
        ("profile.jpg", encoded(picture(), "JPEG", quality=95, icc_profile=bytes(300)), LOSSY),
        ("more_behind.jpg", whole + bytes(999), LOSSY),
        ("more_behind.png", plain + b"and more", EXACT),
        ("length.png", plain[:33] + b"\x7f\xff\xff\xff" + plain[37:], EXACT),
        ("texts.png", encoded(picture(), "PNG", pnginfo=texts), EXACT),
        ("stored.png", encoded(picture(), "PNG", compress_level=0), EXACT),
        ("dots.png", encoded(picture(), "PNG", dpi=(1, 1)), EXACT),
        ("lossy.webp", encoded(picture(), "WEBP", quality=90), LOSSY),
        ("rle.tga", encoded(picture(), "TGA", compression="tga_rle"), EXACT),
        ("lzw.tif", encoded(picture(), "TIFF", compression="tiff_lzw"), EXACT),
        ("packbits.tif", encoded(picture(), "TIFF", compression="packbits"), EXACT),
        ("deflate.tif", encoded(picture(), "TIFF", compression="tiff_deflate"), EXACT),
        ("jpeg.tif", encoded(picture(), "TIFF", compression="jpeg", quality=95), ROUGH),
        ("mpo.jpg", encoded(picture(), "MPO", quality=95, save_all=True, append_images=[picture()]), LOSSY),
    ):  # fmt: skip
        corpus.add(name, content, READ, COLORS, slack)
    corpus.add("fax.tif", encoded(picture().convert("1", dither=0), "TIFF", compression="group4"), READ, BITS)


def damaged(corpus: Corpus) -> None:
    plain, rows = bytearray(encoded(picture(), "PNG")), bytes(32 * (1 + 48 * 3))
    bad_header, bad_pixels = plain.copy(), plain.copy()
    bad_header[17] ^= 1
    bad_pixels[plain.index(b"IDAT") + 6] ^= 255
    text = chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(200 << 20), 9))
    jpeg = encoded(picture(), "JPEG")
    gif = encoded(picture(), "GIF")
    for name, content in {
        "checksum.png": bytes(bad_header),
        "pixels.png": bytes(bad_pixels),
        "no_stream.png": png(48, 32, b"no zlib stream", packed=False),
        "no_pixels.png": bytes(plain[: plain.index(b"IDAT") - 4]) + chunk(b"IEND", b""),
        "no_palette.png": png(48, 32, rows[: 32 * 49], color=3, packed=False),
        "short_rows.png": png(48, 32, rows[: len(rows) // 2]),
        "empty_rows.png": png(48, 32, b""),
        "no_size.png": png(0, 0, b""),
        "text_bomb.png": png(48, 32, rows, text),
        "no_scan.jpg": jpeg[: jpeg.index(b"\xff\xda")],
        "no_tables.jpg": jpeg.replace(b"\xff\xdb", b"\xff\xfe"),
        "no_frame.gif": gif[: gif.index(b",")] + b";",
        "self.tif": b"II*\0\x08\0\0\0" + struct.pack("<H", 0) + struct.pack("<I", 8),
        "negative.bmp": encoded(picture(), "BMP")[:18] + struct.pack("<ii", -9, -9) + bytes(40),
        "numbers.ppm": b"P6 12x 9 255\n" + bytes(400),
        "offset.ico": encoded(picture(size=(48, 48)), "ICO")[:18] + b"\xff\xff\xff\x7f" + bytes(50),
        "length.webp": b"RIFF\xff\xff\xff\xffWEBPVP8L" + bytes(60),
    }.items():
        corpus.add(name, content, REFUSED)


PARTS = (
    orientations, modes, grays, clear, animations, strips, truncated, headers, no_images, no_files, names, unusual,
    damaged,
)  # fmt: skip


def make_corpus(folder: Path) -> list[Odd]:
    """Write the files into ``folder``, one subfolder for each kind."""
    files = []
    for part in PARTS:
        corpus = Corpus(folder / part.__name__)
        part(corpus)
        files += corpus.files
    return files
