"""What a worker of the data loader does for a photograph, and how much it sends: as numbers, and as bytes.

    python benchmarks/image_loading.py [--json F]

Photographs of the sizes of COCO, as JPEG files; for each image_aspect_ratio the median processor time from the file to
the pixels (one thread), and the bytes of a batch of 16. No GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import statistics
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image

from llava_packing_tower.data.image_processor import PackingImageProcessor, raw_pixels
from llava_packing_tower.data.images import open_image
from llava_packing_tower.data.native_config import NativeSettings
from llava_packing_tower.data.native_image_processor import NativeImageProcessor
from llava_packing_tower.data.sample_photos import PHOTOS, source_of
from llava_packing_tower.data.smart_resize import SmartResize
from llava_packing_tower.tools.bench.training.photos import photo_sizes

BATCH, PATCH, SIDE, ROUNDS = 16, 14, 448, 5


def write_photos(folder: Path) -> list[Path]:
    """A batch of photographs of COCO's sizes."""
    files = []
    for number, size in enumerate(random.Random(0).sample(photo_sizes(1.0), BATCH)):
        file = folder / f"{number}.jpg"
        with_photo = open_image(source_of(PHOTOS[number % len(PHOTOS)]))
        with_photo.resize(size, Image.Resampling.BICUBIC).save(file, quality=90)
        files.append(file)
    return files


def processors() -> dict[str, PackingImageProcessor]:
    square = PackingImageProcessor(size=SIDE)
    patches = (SIDE // PATCH) ** 2
    rule = SmartResize(PATCH, (1, 1), 16, patches)
    return {"square": square, "native": NativeImageProcessor(square, rule, NativeSettings(16, patches, "frames"))}


def measure(processor: PackingImageProcessor, files: list[Path], raw: bool) -> dict[str, float]:
    """Milliseconds for each photograph (median over photographs and rounds), and the bytes of the batch."""
    times, size = [], 0
    with raw_pixels() if raw else contextlib.nullcontext():
        for _ in range(ROUNDS):
            size = 0
            for file in files:
                mark = time.thread_time()
                pixels = processor(open_image(file), return_tensors="pt")["pixel_values"]
                times.append(time.thread_time() - mark)
                size += pixels.numel() * pixels.element_size()
    return {"ms per photograph": round(1000 * statistics.median(times), 2), "MB per batch": round(size / 1e6, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        files = write_photos(Path(folder))
        results = {
            f"{name}, {words}": measure(processor, files, raw)
            for name, processor in processors().items()
            for words, raw in (("float32", False), ("uint8", True))
        }
    for name, row in results.items():
        print(f"{name:>16}: " + ", ".join(f"{value} {unit}" for unit, value in row.items()))
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
