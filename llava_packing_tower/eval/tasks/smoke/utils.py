"""The smoke task: the photographs of `make demo`, out of installed packages. Nothing is downloaded."""

from pathlib import Path

from PIL import Image

from llava_packing_tower.data.images import open_image
from llava_packing_tower.data.sample_photos import PHOTOS, source_of

DATA_FILES = {"test": str(Path(__file__).with_name("photos.jsonl"))}
BY_NAME = {photo.name: photo for photo in PHOTOS}


def doc_to_visual(doc: dict) -> list[Image.Image]:
    return [open_image(source_of(BY_NAME[doc["photo"]]))]
