"""Images of a host that makes pixels and a grid of each, for patches of 14 pixels: our towers may have others."""

from __future__ import annotations

import functools
from collections.abc import Callable

from ...data.image_processor import PackingImageProcessor
from ...data.native_image_processor import NativeImageProcessor
from .tower_builder import mark_wrapper


def hooked_grid(original: Callable) -> Callable:
    """A host's ``process_native_image(image, processor)``, or its like: it returns ``pixel_values`` and ``grid_thw``.

    At native resolution the tower's own processor sizes the image. In another mode the host does; nothing is cut off.
    """

    @functools.wraps(original)
    def process(image: object, processor: object, *args: object, **kwargs: object) -> object:
        if not isinstance(processor, PackingImageProcessor):
            return original(image, processor, *args, **kwargs)
        if isinstance(processor, NativeImageProcessor):
            found = {"pixel_values": processor.preprocess(image, return_tensors="pt")["pixel_values"]}
        else:
            uncut = type(processor).from_dict({**processor.to_dict(), "do_center_crop": False})
            uncut.image_reading = processor.image_reading
            found = original(image, uncut, *args, **kwargs)
        height, width = found["pixel_values"].shape[-2:]
        patch = processor.tower_patch_size
        return {**found, "grid_thw": [1, height // patch, width // patch]}

    return mark_wrapper(process, original)
