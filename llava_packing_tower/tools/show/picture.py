"""The picture of what a tower sees, as a PNG or as text."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ...utils.files import write_aside
from .look import Seen

WIDTH, HEIGHT, MARGIN, LINE = 420, 300, 12, 18
FRAMES = 8
"""Frames of a video that are drawn, evenly spaced."""
COLORS = ((31, 119, 180), (255, 127, 14), (44, 160, 44), (214, 39, 40), (148, 103, 189), (140, 86, 75), (23, 190, 207))
GRAY = (235, 235, 235)
SHADES = " .:-=+*#%@"
COLUMNS = 60


def chosen(seen: Seen) -> list[int]:
    """The frames that are drawn."""
    count = len(seen.pixels)
    return sorted({round(i * (count - 1) / max(1, min(count, FRAMES) - 1)) for i in range(min(count, FRAMES))})


def with_grid(pixels: np.ndarray, patch: int) -> Image.Image:
    """Pixels ``[H, W, 3]`` with thin white lines between the patches."""
    image = pixels.copy()
    image[patch::patch] = 255
    image[:, patch::patch] = 255
    return Image.fromarray(image)


def kept_on_frames(seen: Seen, patch: int) -> list[tuple[str, Image.Image]]:
    """The patches of a codec sample at their rows and columns, one picture for each frame; the rest is gray."""
    rows, columns = seen.grid[1:]
    places = np.rint(seen.positions).astype(int)
    height, width = (places[:, axis].max() + 1 for axis in (1, 2))
    cut = seen.pixels[0].reshape(rows, patch, columns, patch, 3).transpose(0, 2, 1, 3, 4).reshape(-1, patch, patch, 3)
    found = []
    for frame in np.unique(places[:, 0])[:FRAMES]:
        canvas = np.full((height * patch, width * patch, 3), GRAY, np.uint8)
        here = np.flatnonzero(places[:, 0] == frame)
        for index in here:
            row, column = places[index, 1:]
            canvas[row * patch : (row + 1) * patch, column * patch : (column + 1) * patch] = cut[index]
        found.append((f"frame {frame}: {len(here)} patches kept", Image.fromarray(canvas)))
    return found


def panels(seen: Seen, patch: int, colors: np.ndarray | None) -> list[tuple[str, Image.Image]]:
    """The pictures of one image, with their titles."""
    t, rows, columns = seen.grid
    found = []
    for frame in chosen(seen):
        if seen.indices is None:
            title = f"{seen.pixels.shape[2]} x {seen.pixels.shape[1]} pixels, {rows} x {columns} patches"
        else:
            title = f"frame {seen.indices[frame]} of {seen.total}, position {int(seen.positions[frame])}"
        found.append((title, with_grid(seen.pixels[frame], patch)))
        step = min(frame * t // len(seen.pixels), t - 1)
        if colors is not None:
            large = Image.fromarray(colors[step]).resize((columns * patch, rows * patch), Image.Resampling.NEAREST)
            found.append(("features: first three components", large))
    if seen.indices is None and seen.positions is not None:
        found += kept_on_frames(seen, patch)
    return found


def draw(
    path: Path, images: Sequence[Seen], patch: int, lines: Sequence[str], colors: Sequence[np.ndarray] | None
) -> None:
    """Write the PNG: a row for each image, then the packed row with the borders of its segments, then the lines."""
    rows = [panels(seen, patch, None if colors is None else colors[i]) for i, seen in enumerate(images)]
    wide = max(len(row) for row in rows) * (WIDTH + MARGIN) + MARGIN
    tall = len(rows) * (HEIGHT + 3 * LINE + MARGIN) + 5 * LINE + len(lines) * LINE + MARGIN
    canvas = Image.new("RGB", (wide, tall), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default()
    top = MARGIN
    for number, (seen, row) in enumerate(zip(images, rows)):
        pen.text((MARGIN, top), headline(number, seen), fill=COLORS[number % len(COLORS)], font=font)
        for column, (title, picture) in enumerate(row):
            left = MARGIN + column * (WIDTH + MARGIN)
            pen.text((left, top + LINE), title, fill="black", font=font)
            scale = min(WIDTH / picture.width, HEIGHT / picture.height)
            size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
            canvas.paste(picture.resize(size, Image.Resampling.LANCZOS), (left, top + 2 * LINE))
        top += HEIGHT + 3 * LINE + MARGIN
    _draw_pack(pen, images, (MARGIN, top), wide - 2 * MARGIN, font)
    for number, line in enumerate(lines):
        pen.text((MARGIN, top + (4 + number) * LINE), line, fill="black", font=font)
    write_aside(path, partial(canvas.save, format="PNG"))


def _draw_pack(
    pen: ImageDraw.ImageDraw, images: Sequence[Seen], corner: tuple[int, int], width: int, font: object
) -> None:
    """The packed row: a box for each segment, as wide as its share of the patches, with ``cu_seqlens`` below."""
    left, top = corner
    total, start = sum(seen.patches for seen in images), 0
    for number, seen in enumerate(images):
        for length in seen.segments:
            first, last = (left + width * at // total for at in (start, start + length))
            pen.rectangle((first, top, last, top + LINE), fill=COLORS[number % len(COLORS)], outline="white")
            pen.text((first, top + LINE + 2), str(start), fill="black", font=font)
            start += length
    pen.text((left + width - 6 * len(str(total)), top + LINE + 2), str(total), fill="black", font=font)
    said = f"one packed row of {total} patches; numbers: cu_seqlens"
    pen.text((left, top + 2 * LINE + 4), said, fill="black", font=font)


def headline(number: int, seen: Seen) -> str:
    t, rows, columns = seen.tokens
    frames = "" if seen.indices is None else f"{len(seen.pixels)} of {seen.total} frames, "
    return (
        f"{number}: {seen.name}, {seen.size[0]} x {seen.size[1]} pixels, {frames}"
        f"{' x '.join(map(str, seen.grid))} = {seen.patches} patches, {t * rows * columns} tokens"
    )


def as_text(seen: Seen, patch: int) -> list[str]:
    """The first frame in characters, a line for each row of patches and two characters for each patch (fewer for wide
    ones), from dark to light."""
    gray = Image.fromarray(seen.pixels[0]).convert("L")
    columns = min(seen.grid[2], COLUMNS)
    rows = max(1, round(seen.grid[1] * columns / seen.grid[2]))
    small = np.asarray(gray.resize((columns, rows), Image.Resampling.BOX)).astype(int)
    return ["".join(SHADES[value * len(SHADES) // 256] * 2 for value in row) for row in small]


def pack_as_text(images: Sequence[Seen], width: int = 2 * COLUMNS) -> str:
    """The packed row in characters: ``|`` at the borders, the number of the image in its segment."""
    total, line = sum(seen.patches for seen in images), "|"
    for number, seen in enumerate(images):
        for length in seen.segments:
            line += str(number).center(max(1, width * length // total - 1), "-") + "|"
    return line
