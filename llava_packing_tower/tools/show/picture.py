"""The picture of what a tower sees, as a PNG or as text."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ...utils.files import write_aside
from .look import Seen

WIDTH, HEIGHT, MARGIN, LINE = 420, 300, 12, 18
FRAMES = 8
"""Frames of a video that are drawn, evenly spaced."""
DRAWN = 40
"""Images that are drawn: viewers refuse pictures of more than 32,767 rows, and the packed row has all of them."""
COLORS = ((31, 119, 180), (255, 127, 14), (44, 160, 44), (214, 39, 40), (148, 103, 189), (140, 86, 75), (23, 190, 207))
GRAY = (235, 235, 235)
LIGHT = 170
"""From this mean of a pixel on, a line on it is dark: pages are white."""
SHADES = " .:-=+*#%@"
COLUMNS = 120
"""Characters in a line, where the terminal is not narrower."""
NAME = 80
"""Most characters of a name in a headline: its end."""


def chosen(seen: Seen) -> list[int]:
    """The frames that are drawn."""
    count = len(seen.pixels)
    return sorted({round(i * (count - 1) / max(1, min(count, FRAMES) - 1)) for i in range(min(count, FRAMES))})


def with_grid(pixels: np.ndarray, patch: int) -> Image.Image:
    """Pixels ``[H, W, 3]`` with thin lines between the patches: white ones, and dark ones on what is light."""
    image, lines = pixels.copy(), np.where(pixels.mean(-1, keepdims=True) < LIGHT, 255, 110).astype(np.uint8)
    image[patch::patch] = lines[patch::patch]
    image[:, patch::patch] = lines[:, patch::patch]
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
    drawn = images[:DRAWN]
    if len(drawn) < len(images):
        lines = [f"the first {len(drawn)} of {len(images)} images are drawn", *lines]
    rows = [panels(seen, patch, None if colors is None else colors[i]) for i, seen in enumerate(drawn)]
    wide = max(len(row) for row in rows) * (WIDTH + MARGIN) + MARGIN
    tall = len(rows) * (HEIGHT + 3 * LINE + MARGIN) + 5 * LINE + len(lines) * LINE + MARGIN
    font = ImageFont.load_default()
    texts = [*lines, *(headline(number, seen) for number, seen in enumerate(drawn))]
    wide = max(wide, *(math.ceil(font.getlength(text)) + 2 * MARGIN for text in texts))
    canvas = Image.new("RGB", (wide, tall), "white")
    pen = ImageDraw.Draw(canvas)
    top = MARGIN
    for number, (seen, row) in enumerate(zip(drawn, rows)):
        pen.text((MARGIN, top), headline(number, seen), fill=COLORS[number % len(COLORS)], font=font)
        for column, (title, picture) in enumerate(row):
            left = MARGIN + column * (WIDTH + MARGIN)
            pen.text((left, top + LINE), title, fill="black", font=font)
            scale = min(WIDTH / picture.width, HEIGHT / picture.height)
            size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
            canvas.paste(picture.resize(size, Image.Resampling.LANCZOS), (left, top + 2 * LINE))
            right, bottom = left + size[0], top + 2 * LINE + size[1]
            pen.rectangle((left - 1, top + 2 * LINE - 1, right, bottom), outline=GRAY)
        top += HEIGHT + 3 * LINE + MARGIN
    _draw_pack(pen, images, (MARGIN, top), wide - 2 * MARGIN, font)
    for number, line in enumerate(lines):
        pen.text((MARGIN, top + (4 + number) * LINE), line, fill="black", font=font)
    write_aside(path, partial(canvas.save, format="PNG"))


def _draw_pack(
    pen: ImageDraw.ImageDraw, images: Sequence[Seen], corner: tuple[int, int], width: int, font: Any
) -> None:
    """The packed row: a box for each segment, as wide as its share of the patches, with ``cu_seqlens`` below."""
    left, top = corner
    total, start, free = sum(seen.patches for seen in images), 0, 0
    end = left + width - math.ceil(font.getlength(str(total)))
    for number, seen in enumerate(images):
        for length in seen.segments:
            first, last = (left + width * at // total for at in (start, start + length))
            pen.rectangle((first, top, last, top + LINE), fill=COLORS[number % len(COLORS)], outline="white")
            if (
                free <= first <= end - font.getlength(f"{start} ")
            ):  # a number that would stand on the one before it is left out
                pen.text((first, top + LINE + 2), str(start), fill="black", font=font)
                free = first + math.ceil(font.getlength(f"{start} "))
            start += length
    pen.text((end, top + LINE + 2), str(total), fill="black", font=font)
    said = f"one packed row of {total} patches; numbers: cu_seqlens"
    pen.text((left, top + 2 * LINE + 4), said, fill="black", font=font)


def _name(name: str) -> str:
    """In one line: the end of a long one, and no line breaks or other control characters."""
    shown = "".join(character if character.isprintable() else ascii(character)[1:-1] for character in name)
    return shown if len(shown) <= NAME else f"...{shown[3 - NAME :]}"


def headline(number: int, seen: Seen) -> str:
    t, rows, columns = seen.tokens
    frames = "" if seen.indices is None else f"{len(seen.pixels)} of {seen.total} frames, "
    return (
        f"{number}: {_name(seen.name)}, {seen.size[0]} x {seen.size[1]} pixels, {frames}"
        f"{' x '.join(map(str, seen.grid))} = {seen.patches} patches, {t * rows * columns} tokens"
    )


def terminal_width() -> int:
    """Characters of a line of the text picture: those of the terminal, at most COLUMNS."""
    return max(12, min(COLUMNS, shutil.get_terminal_size((COLUMNS, 24)).columns))


def as_text(seen: Seen, patch: int, width: int = COLUMNS) -> list[str]:
    """The first frame in characters, a line for each row of patches and two characters for each patch (fewer for wide
    ones), from dark to light."""
    gray = Image.fromarray(seen.pixels[0]).convert("L")
    columns = min(seen.grid[2], width // 2)
    rows = max(1, round(seen.grid[1] * columns / seen.grid[2]))
    small = np.asarray(gray.resize((columns, rows), Image.Resampling.BOX)).astype(int)
    return ["".join(SHADES[value * len(SHADES) // 256] * 2 for value in row) for row in small]


def pack_as_text(images: Sequence[Seen], width: int = COLUMNS) -> str:
    """The packed row in characters: ``|`` at the borders, the number of the image in its segment."""
    total, line = sum(seen.patches for seen in images), "|"
    for number, seen in enumerate(images):
        for length in seen.segments:
            line += str(number).center(max(1, (width - 1) * length // total - 1), "-") + "|"
    return line
