"""266 odd image files through what needs no host: reading, the check before training, conversion, probing.

The datasets of the hosts and evaluation read them in ``tests/helpers/odd_images_checks.py``.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from odd_images import LONG, READ, REFUSED, make_corpus
from odd_images_checks import peak, read_all
from PIL import Image

from llava_packing_tower.convert.test_images import Photographer
from llava_packing_tower.data.image_processor import PackingImageProcessor, raw_pixels
from llava_packing_tower.data.images import (
    AS_BEFORE,
    MIDDLE,
    NATIVE,
    SQUARE,
    STRIP,
    ImageReading,
    UnreadableImage,
    fitted,
    open_image,
    read_size,
)
from llava_packing_tower.data.media_check import MediaCheck
from llava_packing_tower.data.native_config import NativeSettings
from llava_packing_tower.data.native_image_processor import NativeImageProcessor
from llava_packing_tower.data.smart_resize import SmartResize
from llava_packing_tower.eval import probe

pytestmark = pytest.mark.newest


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    made = make_corpus(tmp_path_factory.mktemp("odd"))
    assert [sum(odd.outcome == outcome for odd in made) for outcome in (READ, LONG, REFUSED)] == [155, 8, 103]
    return made


def native() -> NativeImageProcessor:
    settings = NativeSettings(1, 40, "frames")
    return NativeImageProcessor(PackingImageProcessor(size=56), SmartResize(14, (1, 1), 1, 40), settings)


def refusal(function, odd) -> torch.Tensor | str:
    try:
        with raw_pixels():
            return function(odd.path)
    except ValueError as error:
        assert str(odd.path) in str(error) or repr(str(odd.path)) in str(error)
        return str(error)


def corners(image: Image.Image) -> np.ndarray:
    width, height = image.size
    return np.array([image.getpixel((int(width * x), int(height * y))) for y in (0.25, 0.75) for x in (0.25, 0.75)])


def test_read(files):
    before, wrong = peak(), []
    for odd in files:
        try:
            image = open_image(odd.path)
        except UnreadableImage as error:
            assert odd.outcome == REFUSED and error.file == str(odd.path), error
            continue
        assert odd.outcome != REFUSED, odd
        if odd.quarters is not None and np.abs(corners(image) - odd.quarters).max() > odd.slack:
            wrong.append(odd.path.name)
    assert wrong == [] and peak() - before < 100
    # The test can tell: without what the reading does, a tenth of the pictures are others.
    own = [odd for odd in files if odd.outcome == READ and odd.quarters is not None]
    others = sum(np.abs(corners(open_image(odd.path, AS_BEFORE)) - odd.quarters).max() > odd.slack for odd in own)
    assert others > len(own) // 10


def test_a_large_image_is_converted_in_bands_and_is_the_same(files, monkeypatch):
    read = [odd for odd in files if odd.outcome == READ]
    whole = [open_image(odd.path).tobytes() for odd in read]
    monkeypatch.setattr("llava_packing_tower.data.images._BAND_PIXELS", 100)
    assert [odd.path.name for odd, pixels in zip(read, whole) if open_image(odd.path).tobytes() != pixels] == []


def test_headers_agree_with_the_pixels(files):
    for odd in files:
        if odd.outcome != REFUSED:
            assert read_size(odd.path, exif=True) == open_image(odd.path).size, odd


def test_check_before_training(files):
    samples = [{"id": odd.path.name, "image": str(odd.path)} for odd in files]
    media = MediaCheck({}, False, native=True, all_of_it=True)
    media.look(samples)
    wanted = [odd for odd in files if odd.outcome != READ]
    assert len(media.unreadable) == len(wanted) and media.looked_at == 266
    for line, odd in zip(media.unreadable, wanted):
        assert line.startswith(f"sample {odd.path.name}: ")
    quick = MediaCheck({}, False, native=True)
    quick.look(samples)
    assert set(quick.unreadable) <= set(media.unreadable) and len(quick.unreadable) > 40


def test_conversion(files):
    processor = PackingImageProcessor(size=56)

    def read(odd):
        return refusal(lambda path: Photographer([path], processor, 14, 3).image(0, 56).pixels[:, 0], odd)

    read_all("convert", files, read)


@pytest.mark.parametrize("shape", ["native", "square"])
def test_probing(files, shape):
    processor = native() if shape == "native" else PackingImageProcessor(size=56)

    def read(odd):
        found = refusal(lambda path: next(probe._batches(processor, [path], 1))[0], odd)
        if isinstance(found, str):
            return found
        factor, mean, std = processor.pixel_scale  # (its threads read normalized pixels)
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))
        return ((found * std + mean) / factor).round().to(torch.uint8)

    read_all(f"probe, {shape}", files, read)


# ---------------------------------------------------------------- properties


sides = st.integers(1, 3000)


@given(width=sides, height=sides, fit=st.sampled_from([SQUARE, MIDDLE, NATIVE, None]), limit=st.integers(400, 10**7))
@settings(max_examples=120, deadline=None)
def test_what_a_host_pads_or_crops_is_bounded_and_others_are_left_alone(width, height, fit, limit):
    image, reading = Image.new("L", (width, height)), ImageReading(max_pixels=limit)
    found = fitted(image, reading, fit)
    longest, shortest = max(found.size), min(found.size)
    if fit == MIDDLE:
        assert longest <= STRIP * shortest and shortest == min(width, height)
    if fit == SQUARE:
        assert longest**2 <= max(limit, STRIP * width * height)
    ordinary = max(width, height) <= STRIP * min(width, height) and max(width, height) ** 2 <= limit
    if ordinary or fit in (NATIVE, None):
        assert found is image


@given(width=st.integers(1, 900), height=st.integers(1, 900), edge=st.integers(1, 12), crop=st.booleans())
@settings(max_examples=120, deadline=None)
def test_every_size_becomes_the_size_that_is_asked_for(width, height, edge, crop):
    """With a crop exactly that; without one whole patches, near the aspect ratio."""
    image = Image.effect_noise((width, height), 50).convert("RGB")
    processor = PackingImageProcessor(size=14 * edge, do_center_crop=crop, patch_size=14)
    if not crop and max(width, height) > 20 * min(width, height):
        return
    with raw_pixels():
        pixels = processor(image, return_tensors="pt")["pixel_values"][0]
    assert pixels.dtype == torch.uint8
    rows, columns = pixels.shape[1] // 14, pixels.shape[2] // 14
    assert pixels.shape[1:] == (14 * rows, 14 * columns)
    if crop:
        assert rows == columns == edge
    else:
        assert min(rows, columns) == edge
        assert abs(max(rows, columns) - edge * max(width, height) / min(width, height)) <= 1


@given(values=st.lists(st.integers(0, 255), min_size=12, max_size=12), scale=st.sampled_from([257, 8421504]))
def test_gray_values_of_any_width_are_those_of_eight_bits(values, scale):
    """16 bits and 32 bits of one picture are the picture."""
    grid = np.array(values).reshape(3, 4)
    if scale > 257:
        grid[0, 0] = 255  # something above 65535: else the range of 32 bits is not known
    from llava_packing_tower.data.images import to_rgb

    seen = np.asarray(to_rgb(Image.fromarray((grid * scale).astype(np.int32))))[..., 0]
    assert np.abs(seen.astype(int) - grid).max() <= 1
