"""LLaVA's own ways with images of any shape, over a packing tower: anyres and pad; run by ``native_checks.py``."""

from __future__ import annotations

import sys

import numpy as np
import torch
from native_host import IGNORE, IMAGE, Host, close, collate, reference_embeddings
from PIL import Image


def anyres_and_pad_equal_a_reference(host: Host):
    """The host's own tiles, its own unpadding and newlines, and its own padding, with our tower under them."""
    from llava.mm_utils import process_images

    from llava_packing_tower import image_to_packing_input

    noise = np.random.default_rng(0)
    photos = [Image.fromarray(noise.integers(0, 255, (h, w, 3), dtype=np.uint8)) for h, w in ((84, 112), (112, 56))]
    options = {"mm_patch_merge_type": "spatial_unpad", "image_grid_pinpoints": "[[56, 112], [112, 56], [112, 112]]"}
    model = host.model("anyres", **options)
    inner, newline = model.get_model(), model.get_model().image_newline[None]
    tiles = process_images(photos, model.get_vision_tower().image_processor, model.config)
    assert [tuple(t.shape) for t in tiles] == [(5, 3, 56, 56), (3, 3, 56, 56)]

    def features(tile):
        rows, grid = image_to_packing_input(tile, 14)
        return inner.mm_projector(
            inner.vision_tower.vision_tower(rows, grid, output_hidden_states=True).hidden_states[-1]
        )

    expected = []
    # The first has 14 pixels of padding above and below: its first and its last row of patches are cut away.
    for own, (down, across), kept in zip(tiles, ((2, 2), (2, 1)), (slice(1, 7), slice(0, 8))):
        parts = [features(tile).view(4, 4, -1) for tile in own[1:]]
        bands = [torch.cat(parts[row * across : (row + 1) * across], dim=1) for row in range(down)]
        lines = torch.cat(bands)[kept]
        expected.append(torch.cat([features(own[0]), *(torch.cat([line, newline]) for line in lines)]))
    batch = collate([[3, IMAGE, 4], [IMAGE, 5]], [tile.clone() for tile in tiles])
    batch["image_sizes"] = [photo.size for photo in photos]
    embeddings, labels = host.prepare(model, batch)[4:6]
    for row, start in enumerate((1, 0)):
        end = start + len(expected[row])
        close(embeddings[row, start:end], expected[row])
        assert labels[row, start - 1 if start else end] in (3, 5) and (labels[row, start:end] == IGNORE).all()

    model = host.model("pad")
    squares = process_images(photos, model.get_vision_tower().image_processor, model.config)
    assert [tuple(square.shape) for square in squares] == [(3, 56, 56)] * 2
    samples = [[3, IMAGE, 4], [IMAGE, 5]]
    prepared = host.prepare(model, collate(samples, squares))[4]
    for row, (embedding, _) in enumerate(reference_embeddings(model, samples, squares)):
        close(prepared[row, : len(embedding)], embedding)


CHECKS = {
    name: function
    for name, function in vars(sys.modules[__name__]).items()
    if callable(function) and "host" in getattr(function, "__annotations__", {})
}
