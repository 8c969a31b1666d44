"""A JPEG that is too short for the size in its header is no picture: libjpeg would fill it with gray."""

from __future__ import annotations

import io
import struct

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
