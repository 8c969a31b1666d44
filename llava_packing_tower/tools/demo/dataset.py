"""The demo's training data, in LLaVA's format."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

from ...data.images import read_size
from ...data.sample_photos import PHOTOS, Photo, source_of
from ...utils.files import write_aside, write_text

QUESTION = "What does this photo show? Answer with one word."


def conversation(photo: Photo) -> dict:
    """One entry of a LLaVA training file."""
    return {
        "id": photo.answer,
        "image": photo.name,
        "conversations": [
            {"from": "human", "value": f"<image>\n{QUESTION}"},
            {"from": "gpt", "value": photo.answer},
        ],
    }


def write_dataset(data_path: Path, image_folder: Path) -> list[tuple[Photo, tuple[int, int]]]:
    """Write the original files into `image_folder` and LLaVA's training JSON to `data_path`.

    Returns the photos with their (width, height) in pixels.
    """
    sizes = []
    for photo in PHOTOS:
        target = image_folder / photo.name
        write_aside(target, partial(shutil.copyfile, source_of(photo)))
        sizes.append((photo, read_size(target)))
    write_text(data_path, json.dumps([conversation(photo) for photo in PHOTOS], indent=1))
    return sizes
