"""The data's side of native resolution: images of a sample keep their own sizes, and go where their ``<image>`` is."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType

import torch

from ..native.settings import asks_for_native
from .patches import Patches

logger = logging.getLogger(__name__)


def into_training(train: ModuleType, patches: Patches) -> None:
    """Wrap what a host's ``train.train`` makes batches with."""
    dataset = train.LazySupervisedDataset
    if hasattr(dataset, "process_image"):
        process = dataset.process_image

        @functools.wraps(process)
        def process_image(self, image_file, overwrite_image_aspect_ratio=None):
            # LLaVA-NeXT pads every image of a sample with several to a square.
            native = asks_for_native(self.data_args)
            return process(self, image_file, None if native else overwrite_image_aspect_ratio)

        patches.set(dataset, "process_image", process_image)

    make = train.make_supervised_data_module

    @functools.wraps(make)
    def make_supervised_data_module(tokenizer, data_args):
        module = make(tokenizer=tokenizer, data_args=data_args)
        if asks_for_native(data_args):
            limit, token = tokenizer.model_max_length, train.IMAGE_TOKEN_INDEX
            module["data_collator"] = NativeCollator(module["data_collator"], limit, token)
        return module

    patches.set(train, "make_supervised_data_module", make_supervised_data_module)


class NativeCollator:
    """The host's collator, given no more images than the text of a sample has places for.

    The host cuts the text at ``limit`` tokens; images whose ``<image>`` goes with it would move into the next sample.
    """

    def __init__(self, collate: Callable, limit: int, image_token: int) -> None:
        self.collate, self.limit, self.image_token = collate, limit, image_token

    def __call__(self, instances: Sequence[Mapping]) -> dict[str, torch.Tensor]:
        return self.collate([self.fitted(instance) for instance in instances])

    def fitted(self, instance: Mapping) -> Mapping:
        """Raises ``ValueError`` for a sample with more or fewer images than ``<image>`` in its text."""
        images, ids = instance.get("image"), instance["input_ids"]
        if images is None:
            return instance
        marks = ids == self.image_token
        places, count = int(marks.sum()), len(images) if isinstance(images, list) else 1
        if max(places, 1) != count:
            raise ValueError(f"sample {instance.get('id')} has {count} images, but {places} <image> in its text")
        kept = max(int(marks[: self.limit].sum()), 1)
        if kept == count:
            return instance
        logger.warning(
            "sample %s: its text is cut at model_max_length %d, and %d of its %d images with it",
            instance.get("id"),
            self.limit,
            count - kept,
            count,
        )
        return {**instance, "image": images[:kept]}
