"""Every way to an image file gives the picture that a viewer shows, or a refusal that names the file."""

from __future__ import annotations

import io
import os
import random
import resource
import struct
import sys
import threading
import zlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import warm
from PIL import Image, ImageFile

from llava_packing_tower.data.image_processor import PackingImageProcessor
from llava_packing_tower.data.images import (
    AS_BEFORE,
    HostImage,
    ImageReading,
    UnreadableImage,
    open_image,
    read_size,
    reading_as,
    reading_of,
    to_rgb,
    with_keys,
)
from llava_packing_tower.data.native_config import NativeSettings
from llava_packing_tower.data.native_image_processor import NativeImageProcessor
from llava_packing_tower.data.smart_resize import SmartResize

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def photo(width: int = 48, height: int = 32) -> Image.Image:
    """Four quarters that tell every turn and mirror image apart: red, green; blue, white."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[: height // 2, : width // 2] = RED
    pixels[: height // 2, width // 2 :] = GREEN
    pixels[height // 2 :, : width // 2] = BLUE
    pixels[height // 2 :, width // 2 :] = 255
    return Image.fromarray(pixels)


def corners(image: Image.Image) -> list[str]:
    """The names of the quarters, row by row."""
    w, h = image.size
    names = {RED: "red", GREEN: "green", BLUE: "blue", (255, 255, 255): "white", (0, 0, 0): "black"}

    def name(x: float, y: float) -> str:
        found = image.getpixel((int(w * x), int(h * y)))
        return names[min(names, key=lambda known: sum(abs(a - b) for a, b in zip(known, found)))]

    return [name(x, y) for y in (0.25, 0.75) for x in (0.25, 0.75)]


UPRIGHT = ["red", "green", "blue", "white"]


def saved(image: Image.Image, kind: str, **options: object) -> io.BytesIO:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    stream.seek(0)
    return stream


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_orientation(orientation, kind):
    # What a camera stores so that a viewer, which undoes it, shows the picture upright.
    turned = {1: [], 2: [0], 3: [3], 4: [1], 5: [5], 6: [2], 7: [6], 8: [4]}[orientation]
    stored = photo()
    for operation in turned:
        stored = stored.transpose(operation)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    stream = saved(stored, kind, exif=exif, **options)
    seen = open_image(stream)
    assert seen.size == (48, 32) and corners(seen) == UPRIGHT
    stream.seek(0)
    if kind != "TIFF":  # which Pillow turns by itself
        assert open_image(stream, AS_BEFORE).size == stored.size  # as LLaVA itself has it
    assert to_rgb(seen).size == (48, 32)  # and not turned a second time


def test_modes_become_the_same_picture():
    picture = photo()
    for kind, mode, options in (
        ("PNG", "P", {}),
        ("GIF", "P", {}),
        ("TIFF", "CMYK", {}),
        ("JPEG", "CMYK", {"quality": 95}),
        ("PNG", "RGBA", {}),
        ("BMP", "RGB", {}),
        ("PPM", "RGB", {}),
    ):
        assert corners(open_image(saved(picture.convert(mode), kind, **options))) == UPRIGHT, (kind, mode)


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (np.linspace(0, 65535, 48 * 32).astype(np.uint16), "PNG"),
        (np.linspace(0, 65535, 48 * 32).astype(np.uint16), "TIFF"),
        (np.linspace(0, 65535, 48 * 32).astype(np.int32), "TIFF"),
        (np.linspace(0, 2**31 - 1, 48 * 32).astype(np.int32), "TIFF"),
        (np.linspace(0, 1, 48 * 32).astype(np.float32), "TIFF"),
        (np.linspace(0, 255, 48 * 32).astype(np.float32), "TIFF"),
    ],
)
def test_grey_values_of_any_width_are_scaled(values, kind):
    seen = np.asarray(open_image(saved(Image.fromarray(values.reshape(32, 48)), kind)))
    wanted = np.linspace(0, 255, 48 * 32).reshape(32, 48, 1)
    assert seen.shape == (32, 48, 3) and np.abs(seen - wanted).max() <= 1


@pytest.mark.parametrize("values", [[-1.0, 0.5], [0.0, 256.0], [0.0, np.nan], [0.0, np.inf]])
def test_grey_values_without_a_meaning_are_refused(values):
    image = Image.fromarray(np.array([values] * 4, np.float32))
    with pytest.raises(UnreadableImage, match=r"cannot be read as an image: its values reach"):
        open_image(saved(image, "TIFF"))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_laid_on_the_background(mode):
    """A black logo on clear ground, whose clear pixels are black too: without a background all of it is black."""
    alpha = np.zeros((32, 48), np.uint8)
    alpha[8:24, 12:36] = 255
    logo = Image.merge("LA", [Image.new("L", (48, 32)), Image.fromarray(alpha)])
    if mode == "P":
        indices = Image.fromarray((alpha > 0).astype(np.uint8), "P")
        indices.putpalette([0, 0, 0, 0, 0, 0])
        stream = saved(indices, "PNG", transparency=0)
    else:
        stream = saved(logo.convert(mode), "PNG")
    for background, colour in (("white", (255, 255, 255)), ("#102030", (16, 32, 48)), ("none", (0, 0, 0))):
        stream.seek(0)
        seen = open_image(stream, ImageReading(background=background))
        assert seen.getpixel((1, 1)) == colour and seen.getpixel((24, 16)) == (0, 0, 0)
    half = Image.new("RGBA", (4, 4), (0, 0, 0, 128))
    assert to_rgb(half).getpixel((0, 0)) == (127, 127, 127)


def test_the_clear_value_of_16_bit_gray_is_laid_on_the_background():
    header, rows = struct.pack(">IIBBBBB", 2, 1, 16, 0, 0, 0, 0), b"\0" + struct.pack(">HH", 500, 40_000)
    parts = (b"IHDR", header), (b"tRNS", struct.pack(">H", 500)), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")
    content = b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)
    assert np.asarray(open_image(io.BytesIO(content)))[0, :, 0].tolist() == [255, 156]
    assert np.asarray(open_image(io.BytesIO(content), AS_BEFORE))[0, :, 0].tolist() == [2, 156]


@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_a_tiff_in_which_zero_is_white(dtype):
    """Pillow inverts it for 8 bits and fewer alone."""
    values = np.array([[0, 1, 2, 5]] * 3) * (13107 if dtype == np.uint16 else 0.2)
    plain = saved(Image.fromarray(values.astype(dtype)), "TIFF").getvalue()
    is_black, is_white = (struct.pack("<HHIH", 262, 3, 1, value) for value in (1, 0))
    assert plain.count(is_black) == 1
    seen = [
        np.asarray(open_image(io.BytesIO(content)))[0, :, 0] for content in (plain, plain.replace(is_black, is_white))
    ]
    assert seen[0].tolist() == [0, 51, 102, 255] and (seen[0] + seen[1] == 255).all()


def test_the_layers_of_a_psd_are_no_frames():
    pixels, layers = np.asarray(photo()).transpose(2, 0, 1).tobytes(), b""
    channels = b"".join(struct.pack(">HI", number, 2 + 48 * 32) for number in range(3))
    extra = bytes(8) + b"\3abc"
    for _ in range(2):
        layers += struct.pack(">IIIIH", 0, 0, 32, 48, 3) + channels + b"8BIMnorm\xff\0\0\0"
        layers += struct.pack(">I", len(extra)) + extra
    layers = struct.pack(">h", 2) + layers + bytes(6 * (2 + 48 * 32))
    section = struct.pack(">I", len(layers)) + layers + bytes(4)
    content = b"8BPS" + struct.pack(">H6xHIIHH", 1, 3, 32, 48, 8, 3) + bytes(8)
    content += struct.pack(">I", len(section)) + section + bytes(2) + pixels
    assert Image.open(io.BytesIO(content)).n_frames == 2
    assert corners(open_image(io.BytesIO(content))) == UPRIGHT


def test_an_orientation_behind_the_pixels_of_a_png_counts_in_its_header_too(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    plain = saved(photo(), "PNG").getvalue()
    (tmp_path / "a.png").write_bytes(
        plain[:-12] + chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0")) + plain[-12:]
    )
    (tmp_path / "b.png").write_bytes(plain)
    for name, size in (("a.png", (32, 48)), ("b.png", (48, 32))):
        assert read_size(tmp_path / name, exif=True) == open_image(tmp_path / name).size == size
    assert read_size(tmp_path / "a.png") == open_image(tmp_path / "a.png", AS_BEFORE).size == (48, 32)


LARGE = """
import resource, sys
from PIL import Image
from llava_packing_tower.data.images import open_image
side = 4000
Image.new("P", (side, side)).save(sys.argv[1] + ".gif", transparency=0)
Image.new("F", (side, side)).save(sys.argv[1] + ".tif", compression="packbits")
for kind in (".gif", ".tif"):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert open_image(sys.argv[1] + kind).size == (side, side)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def test_the_memory_of_a_large_image_is_its_own_and_that_of_the_result(tmp_path):
    """16 million pixels, of 1 and 4 bytes, become RGB (4 bytes each, in Pillow); whole copies would be 64 MB each."""
    command = [sys.executable, "-c", LARGE, str(tmp_path / "large")]
    result = warm.execute(command, {**os.environ, "PYTHONPATH": str(warm.REPOSITORY)})
    assert result.returncode == 0, result.stderr
    assert max(map(float, result.stdout.split())) < 110, result.stdout


def test_an_animation_is_its_first_frame(caplog):
    frames = [photo(), Image.new("RGB", (48, 32), RED)]
    for kind in ("GIF", "WEBP", "PNG", "TIFF"):
        seen = open_image(saved(frames[0], kind, save_all=True, append_images=frames[1:]))
        assert corners(seen) == UPRIGHT, kind
    assert sum("first frame" in r.message for r in caplog.records if r.levelname == "WARNING") <= 1


# ---------------------------------------------------------------- what is refused


def test_only_regular_files(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")  # opening it would wait for a writer
    for name, reason in (("pipe.png", "not a regular file"), (".", "not a regular file"), ("no.png", "No such file")):
        with pytest.raises(UnreadableImage, match=reason) as caught:
            open_image(tmp_path / name)
        assert str(tmp_path) in str(caught.value)
    with pytest.raises(UnreadableImage, match="not a regular file"):
        open_image("/dev/zero")


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, data: bytes, interlace: int = 0) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, interlace)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def test_the_header_is_enough_to_refuse_what_is_too_large(tmp_path):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for size in ((50_000, 50_000), (13_400, 13_400), (65_535, 65_535)):
        file = tmp_path / "bomb.png"
        file.write_bytes(png(*size, b""))
        with pytest.raises(UnreadableImage, match=r"bomb\.png cannot be read"):
            open_image(file)
    saved_file = tmp_path / "photo.png"
    photo(100, 60).save(saved_file)
    with pytest.raises(UnreadableImage, match=r"100 x 60 pixels, more than mm_packing_max_pixels 5999"):
        open_image(saved_file, ImageReading(max_pixels=5999))
    assert open_image(saved_file, ImageReading(max_pixels=6000)).size == (100, 60)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < 100


@pytest.mark.parametrize("pillow_fills", [True, False])
def test_truncated_files_are_refused_whatever_pillow_was_told(tmp_path, monkeypatch, pillow_fills):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 96, 3), np.uint8))
    for kind in ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM"):
        whole = saved(noise, kind).getvalue()
        assert open_image(io.BytesIO(whole)).size == (96, 64)
        for part in (0, 3, 20, len(whole) // 2, len(whole) * 9 // 10):
            monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", pillow_fills)
            file = tmp_path / "cut"
            file.write_bytes(whole[:part])
            with pytest.raises(UnreadableImage, match=r"/cut cannot be read as an image"):
                open_image(file)


@pytest.mark.parametrize("interlace", [0, 1])
def test_pixel_data_that_end_early_are_refused(interlace):
    """The chunks are whole, the rows in them are not: Pillow leaves the rest black, in some cases without a word."""
    rows = bytes(64 * (1 + 96 * 3))
    if not interlace:
        assert open_image(io.BytesIO(png(96, 64, rows))).size == (96, 64)  # black, and whole
    with pytest.raises(UnreadableImage, match=r"pixel data end early|truncated"):
        open_image(io.BytesIO(png(96, 64, rows[: len(rows) // 3], interlace)))


def test_random_damage_ends_in_an_image_or_a_refusal():
    draw = random.Random(0)
    for kind in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "ICO", "TGA", "SGI", "PCX"):
        whole = bytearray(saved(photo(), kind).getvalue())
        for _ in range(60):
            damaged = bytearray(whole)
            for _ in range(draw.randint(1, 8)):
                damaged[draw.randrange(len(damaged))] = draw.randrange(256)
            try:
                assert open_image(
                    io.BytesIO(bytes(damaged[: draw.choice([len(damaged), draw.randrange(len(damaged))])]))
                )
            except UnreadableImage as error:
                assert "cannot be read as an image: " in str(error)


# ---------------------------------------------------------------- the processors


STRIPS = """
import resource, sys
from PIL import Image
from llava_packing_tower.data.images import open_image
from llava_packing_tower.data.image_processor import PackingImageProcessor
processor = PackingImageProcessor(size=448)
for way in ("crop", "pad"):
    for size in ((1000, 1), (1, 65_500), (60_000, 2), (1, 1)):
        Image.new("RGB", size, (9, 99, 199)).save(sys.argv[1])
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        image = open_image(sys.argv[1], fit="square" if way == "pad" else None)
        if way == "pad":
            side = max(image.size)
            canvas = Image.new("RGB", (side, side))
            canvas.paste(image, (0, 0))
            image = canvas
        pixels = processor(image, return_tensors="np").pixel_values
        assert pixels.shape == (1, 3, 448, 448), pixels.shape
        print(way, size, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_strips_take_memory_for_what_comes_out(tmp_path):
    command = [sys.executable, "-c", STRIPS, str(tmp_path / "strip.png")]
    result = warm.execute(command, {**os.environ, "PYTHONPATH": str(warm.REPOSITORY)})
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("\n") == 8
    for line in result.stdout.splitlines():
        assert int(line.split()[-1]) < 150, result.stdout


def test_only_the_part_that_is_kept_is_enlarged_and_it_is_the_same(monkeypatch):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 700, 3), np.uint8))
    processor = PackingImageProcessor(size=112, crop_size={"height": 112, "width": 98}, do_normalize=False)
    whole = processor(image, return_tensors="np").pixel_values
    monkeypatch.setattr("llava_packing_tower.data.image_processor.LARGEST_ENLARGED", 1)
    part = processor(image, return_tensors="np").pixel_values
    assert whole.shape == part.shape and np.abs(whole - part).max() <= 1.01 / 255


def native(**reading: object) -> NativeImageProcessor:
    settings = NativeSettings(4, 64, "frames", 128)
    processor = NativeImageProcessor(PackingImageProcessor(size=112), SmartResize(14, (1, 1), 4, 64), settings)
    processor.image_reading = ImageReading(**reading)
    return processor


def test_native_refuses_a_strip_by_its_numbers():
    with pytest.raises(ValueError, match=r"2010 x 10 pixels is longer than mm_packing_max_aspect 200"):
        native().preprocess(Image.new("RGB", (2010, 10)))
    assert native().preprocess(Image.new("RGB", (2000, 10)), return_tensors="pt").pixel_values.shape[1] == 3
    with pytest.raises(ValueError, match="mm_packing_max_aspect 3 times"):
        native(max_aspect=3).preprocess(Image.new("RGB", (10, 31)))


def test_processors_keep_nothing_of_a_call():
    """Images and videos from several threads: each gets the size that it gets alone."""
    processor = native()
    jobs = [np.zeros((frames, 40 + 30 * frames, 90, 3), np.uint8) for frames in (2, 8)]
    jobs += [Image.new("RGB", (300, 200)), Image.new("RGB", (90, 400))]
    alone = [processor.preprocess(job, return_tensors="pt").pixel_values.shape for job in jobs]
    frames = [[Image.new("RGB", (300, 200))] * n for n in (4, 16)]
    with processor.reading(video=True):
        alone += [processor.preprocess(job, return_tensors="pt").pixel_values.shape for job in frames]
    wrong = []

    def work(seed: int) -> None:
        draw = random.Random(seed)
        for _ in range(60):
            index = draw.randrange(len(alone))
            if index < len(jobs):
                shape = processor.preprocess(jobs[index], return_tensors="pt").pixel_values.shape
            else:
                with processor.reading(video=True):
                    shape = processor.preprocess(frames[index - len(jobs)], return_tensors="pt").pixel_values.shape
            if shape != alone[index]:
                wrong.append((index, shape))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# ---------------------------------------------------------------- keys and hosts


def test_what_a_checkpoint_says():
    assert reading_of(SimpleNamespace(), is_checkpoint=False) == ImageReading()
    assert reading_of(SimpleNamespace(), is_checkpoint=True) == AS_BEFORE
    args = SimpleNamespace(mm_packing_exif=True, mm_packing_background="#010203", mm_packing_max_pixels=None)
    assert reading_of(args, True) == ImageReading(exif=True, background="#010203")
    assert reading_of(SimpleNamespace(**ImageReading(max_aspect=9).items()), True) == ImageReading(max_aspect=9)
    later = with_keys(AS_BEFORE, SimpleNamespace(mm_packing_exif=True, mm_packing_max_aspect=None))
    assert later == replace(AS_BEFORE, exif=True)  # a training that starts from a checkpoint without keys
    for wrong, message in (
        ({"mm_packing_background": "nocolour"}, "mm_packing_background"),
        ({"mm_packing_max_pixels": 0}, "mm_packing_max_pixels must be at least 1, got 0"),
        ({"mm_packing_max_aspect": -2}, "mm_packing_max_aspect must be at least 1, got -2"),
        ({"mm_packing_max_pixels": 10**9}, "Pillow decodes at most"),
    ):
        with pytest.raises(ValueError, match=message):
            reading_of(SimpleNamespace(**wrong), False)


def test_a_host_that_opens_images_itself(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    photo().save(tmp_path / "a.jpg", exif=exif)
    image = HostImage()
    assert image.new("RGB", (2, 3)).size == (2, 3) and image.Resampling is Image.Resampling
    assert image.open(tmp_path / "a.jpg").size == (48, 32)  # outside: Pillow's own
    with reading_as(ImageReading()):
        assert image.open(Path(tmp_path) / "a.jpg").convert("RGB").size == (32, 48)
        with pytest.raises(UnreadableImage, match=r"no\.jpg"):
            image.open(tmp_path / "no.jpg")
    with reading_as(None):
        assert image.open(tmp_path / "a.jpg").size == (48, 32)


def test_no_other_module_opens_images():
    package = Path(open_image.__code__.co_filename).parents[1]
    found = [
        str(file.relative_to(package))
        for file in package.rglob("*.py")
        if "Image.open(" in file.read_text(encoding="utf-8") and file.name != "images.py"
    ]
    assert found == []
