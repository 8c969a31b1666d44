"""A JPEG that is too short for the size in its header is no picture: libjpeg would fill it with gray."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from PIL import Image

from llava_packing_tower.data.images import UnreadableImage, open_image


def jpeg(size, mode="RGB", **options):
    stream = io.BytesIO()
    Image.new(mode, size, 9).save(stream, "JPEG", **options)
    return stream.getvalue()


@pytest.mark.parametrize("side", [9_000, 700])
def test_a_header_that_claims_more_than_the_data_can_hold(tmp_path, side):
    content = jpeg((8, 8), optimize=True)
    at = content.index(b"\xff\xc0") + 5
    file = tmp_path / "a.jpg"
    file.write_bytes(content[:at] + struct.pack(">HH", side, side) + content[at + 4 :])
    for source in (file, io.BytesIO(file.read_bytes())):
        with pytest.raises(UnreadableImage, match=r"its pixel data end early: [0-9]+ of at least "):
            open_image(source)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", [{"progressive": True}, {"optimize": True}, {"quality": 1}, {"subsampling": 2}])
def test_a_picture_of_one_color_is_as_short_as_they_come(mode, options):
    """In bytes for a pixel; nothing else in these files is of note."""
    content = jpeg((2400, 1700), mode, **{"optimize": True, **options})
    assert open_image(io.BytesIO(content)).size == (2400, 1700)
    assert 8 * len(content) < 4 * 2400 * 1700 / 64 * (4 if mode == "CMYK" else 2)


LAYOUTS = (
    {},
    {"subsampling": 0, "quality": 30},
    {"optimize": True},
    {"restart_marker_blocks": 7},
    {"restart_marker_rows": 2},
    {"progressive": True},
)


def encoded(picture, mode, **layout):
    stream = io.BytesIO()
    picture.convert(mode).save(stream, "JPEG", **layout)
    return stream.getvalue()


def cut(content, share):
    """The file with a share of its scans and an end marker."""
    start = content.index(b"\xff\xda")
    return content[: start + 14 + int((len(content) - start - 14) * share)].rstrip(b"\xff") + b"\xff\xd9"


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_data_that_end_before_the_last_rows(mode, layout):
    noise = np.random.default_rng(7).integers(0, 255, (27, 38, 3), dtype=np.uint8)
    photo = Image.fromarray(noise).resize((301, 211), Image.Resampling.BICUBIC)
    content = encoded(photo, mode, **layout)
    open_image(io.BytesIO(content))
    for share in (0.03, 0.01) if "progressive" in layout else (0.99, 0.9, 0.5, 0.05):
        with pytest.raises(UnreadableImage, match="its pixel data end early: the rest would be gray"):
            open_image(io.BytesIO(cut(content, share)))
    for size in ((301, 224), (16, 32), (48, 64)):  # whole, and gray at its end
        gray = photo.resize(size)
        gray.paste((128, 128, 128), (0, size[1] // 2, *size))
        for rest in (b"", b"rest\xff\xd9"):
            file = io.BytesIO(encoded(gray, mode, **layout) + rest)
            assert open_image(file).getpixel((size[0] - 1, size[1] - 1))[0] in (127, 128)
