"""Photos of COCO's sizes, and batches of them as LLaVA's own ``process_images`` makes them.

The sizes are those of 159 photos of COCO 2017 (80 of its training and 79 of its validation set), which is where most
photos of LLaVA's instruction data come from; counted from a public extract of COCO's annotations. The pixels are noise.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn

from ....data.native_config import settings_of

IGNORE, IMAGE = -100, -200
PATCH = 14
# Width x height in pixels, and how many of the photos have that size.
COCO = """
640x480:33 640x427:22 480x640:12 640x426:6 500x375:6 375x500:5 640x424:5 427x640:4 640x428:4 640x425:4 500x333:3
478x640:3 640x399:2 640x433:2 640x579:1 640x474:1 640x383:1 640x640:1 500x406:1 640x360:1 376x500:1 640x522:1
640x463:1 640x342:1 640x422:1 621x640:1 640x506:1 640x382:1 640x400:1 640x393:1 640x361:1 479x640:1 414x640:1
500x500:1 640x478:1 500x377:1 333x500:1 612x612:1 640x358:1 457x640:1 640x423:1 640x457:1 424x640:1 428x640:1
474x640:1 470x640:1 500x334:1 640x304:1 640x464:1 640x559:1 640x414:1 383x640:1 640x406:1 640x313:1 640x408:1
500x374:1 358x640:1 640x461:1 500x400:1 640x484:1 426x640:1 640x476:1
"""
GRIDS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
"""anyres grids of LLaVA-NeXT in tiles, width x height."""


def photo_sizes(scale: float) -> list[tuple[int, int]]:
    """Width and height of each photo, times ``scale``."""
    sizes = []
    for entry in COCO.split():
        size, count = entry.split(":")
        sizes += [tuple(round(int(side) * scale) for side in size.split("x"))] * int(count)
    return sizes


def draw_photos(count: int, scale: float, seed: int = 0) -> list[Image.Image]:
    """Photos (noise) whose sizes are drawn from the table, the same on every machine."""
    draw, noise = random.Random(seed), np.random.default_rng(seed)
    drawn = draw.sample(photo_sizes(scale), count)
    return [Image.fromarray(noise.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in drawn]


class Mode(NamedTuple):
    """What a mode sets in the model's config."""

    name: str
    bounds: tuple[int, int] | None  # fewest and most patches, None for anyres

    def set(self, model: nn.Module) -> None:
        config, tower = model.config, model.get_vision_tower()
        config.image_aspect_ratio = "native" if self.bounds else "anyres"
        if self.bounds:
            config.mm_packing_min_patches, config.mm_packing_max_patches = self.bounds
            config.mm_packing_video = "frames"
        if hasattr(tower, "set_native"):  # LLaVA's own towers have anyres alone
            tower.set_native(settings_of(config))


class Batch(NamedTuple):
    """What a model is called with."""

    given: dict
    labels: torch.Tensor

    @property
    def tiles(self) -> list[int]:
        """Patches of each image, or of each tile where images are cut: those attend to each other."""
        found = []
        for pixels in self.given["images"]:
            count = len(pixels) if pixels.dim() == 4 else 1
            found += [pixels.numel() // count // (3 * PATCH**2)] * count
        return found

    @property
    def patches(self) -> int:
        """How many the tower will encode."""
        return sum(self.tiles)

    def first(self, count: int) -> Batch:
        return Batch({key: value[:count] for key, value in self.given.items()}, self.labels[:count])


def processed(model: nn.Module, mode: Mode, photos: Sequence[Image.Image]) -> list[torch.Tensor]:
    """Each photo as the host's own ``process_images`` makes it, where the model is: ``[3, H, W]``, or
    ``[tiles, 3, side, side]``."""
    utilities = import_module(_host_module(model).split(".")[0] + ".mm_utils")
    mode.set(model)
    processor, each = model.get_vision_tower().image_processor, []
    for photo in photos:
        (pixels,) = utilities.process_images([photo], processor, model.config)
        each.append(pixels.to(model.device, model.dtype))
    return each


def _host_module(model: nn.Module) -> str:
    """The module of the class of LLaVA that a model is of."""
    return next(cls.__module__ for cls in type(model).__mro__ if not cls.__module__.startswith("transformers"))


def assemble(
    model: nn.Module, photos: Sequence[Image.Image], pixels: list[torch.Tensor], words: tuple[int, int], seed: int = 1
) -> Batch:
    """A batch of photos, each behind some words and in front of an answer.

    pixels: of each photo, from :func:`processed`; words: how many are in front, and in the answer, which is trained.
    """
    draw = torch.Generator().manual_seed(seed)
    question, answer = words
    text = torch.randint(3, model.config.vocab_size, (len(photos), question + answer), generator=draw)
    ids = torch.cat([text[:, :4], torch.full((len(photos), 1), IMAGE), text[:, 4:]], dim=1).to(model.device)
    labels = ids.clone()
    labels[:, : question + 1] = IGNORE
    given = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids, dtype=torch.bool),
        "images": pixels,
        "image_sizes": [photo.size for photo in photos],
    }
    if "modalities" in inspect.signature(type(model).forward).parameters:
        given["modalities"] = ["image"] * len(photos)  # LLaVA-NeXT drops the samples beyond their number
    return Batch(given, labels)


def make_batch(model: nn.Module, mode: Mode, photos: Sequence[Image.Image], words: tuple[int, int]) -> Batch:
    """:func:`processed` and :func:`assemble`."""
    return assemble(model, photos, processed(model, mode, photos), words)


def prepared(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings ``[B, L, hidden]`` that the decoder gets, and their mask ``[B, L]``."""
    given = dict(batch.given)
    words = (given.pop("input_ids"), None, given.pop("attention_mask"), None, batch.labels, given.pop("images"))
    made = model.prepare_inputs_labels_for_multimodal(*words, **given)
    return made[4], made[2]
