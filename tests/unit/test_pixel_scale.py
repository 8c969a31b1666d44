"""uint8 pixels are normalized by whoever knows how, to the processor's numbers; other integers are refused."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from families import ALL_FAMILIES, TINY, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from llava_packing_tower import PackingImageProcessor
from llava_packing_tower.data.image_processor import raw_pixels
from llava_packing_tower.data.patches import PatchLayout, batch_images_to_packing_input
from llava_packing_tower.data.pixel_scale import PixelScale
from llava_packing_tower.towers.packing_tower import HEVCViTPackingVisionTower
from llava_packing_tower.towers.standard_tower import HEVCViTVisionTower

pytestmark = pytest.mark.newest
SCALE = PackingImageProcessor().pixel_scale


def draw(*sizes: tuple[int, ...], seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8) for size in sizes]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"image_mean": [0.5] * 3, "image_std": [0.25, 0.5, 0.125], "rescale_factor": 1 / 127.5},
        {"do_rescale": False},
        {"do_normalize": False},
        {"size": {"height": 42, "width": 70}, "do_center_crop": False},
        {"size": 56, "crop_size": {"height": 70, "width": 84}},  # with black borders
    ],
)
def test_to_the_bit_what_the_processor_computes(options):
    processor = PackingImageProcessor(**{"size": 56, **options})
    photos = [Image.fromarray(np.random.default_rng(n).integers(0, 255, (60 + n, 90, 3), np.uint8)) for n in range(2)]
    wanted = processor(photos, return_tensors="pt")["pixel_values"]
    with raw_pixels():
        raw = processor(photos, return_tensors="pt")["pixel_values"]
        overridden = processor(photos, return_tensors="pt", do_normalize=False)["pixel_values"]
    assert raw.dtype == overridden.dtype == torch.uint8 and raw.shape == wanted.shape
    assert torch.equal(processor.pixel_scale(raw, 1), wanted)
    assert processor(photos, return_tensors="pt")["pixel_values"].dtype == torch.float32  # and it is over


@given(
    sizes=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(0, 3)), min_size=1, max_size=4),
    layout=st.sampled_from(PatchLayout),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    seed=st.integers(0, 99),
    floats=st.lists(st.booleans(), min_size=4, max_size=4),
)
@settings(max_examples=60, deadline=None)
def test_rows_of_bytes_are_the_rows_of_numbers(sizes, layout, dtype, seed, floats):
    """Images and clips (of t frames) of any sizes, in both layouts; some given as numbers among them."""
    raw = draw(*(((t, 6 * h, 6 * w) if t else (6 * h, 6 * w)) for h, w, t in sizes), seed=seed)
    numbers = [SCALE(image, 0) for image in raw]
    mixed = [n if is_float else r for r, n, is_float in zip(raw, numbers, floats)]
    wanted, grid = batch_images_to_packing_input(numbers, 6, layout, dtype=dtype)
    for images in (raw, mixed):
        rows, found = batch_images_to_packing_input(images, 6, layout, dtype=dtype, scale=SCALE)
        assert rows.dtype == dtype and torch.equal(rows, wanted) and torch.equal(found, grid)
    same = [draw((12, 18), seed=seed)[0]] * 2
    stacked, _ = batch_images_to_packing_input(torch.stack(same), 6, layout, scale=SCALE)
    assert torch.equal(stacked, batch_images_to_packing_input(SCALE(torch.stack(same), 1), 6, layout)[0])


def tower_of(folder, cls=HEVCViTPackingVisionTower):
    args = SimpleNamespace(mm_vision_select_layer=-1, mm_projector_type="linear")
    return cls(str(folder), args)


@pytest.mark.parametrize("name", ["llava_vit", *ALL_FAMILIES])
def test_a_tower_has_the_features_of_normalized_images(golden, name):
    tower = tower_of(golden / name)
    side = tower.image_size // tower.config.patch_size * tower.config.patch_size
    raw = draw((side, side), (side, side), seed=3)
    scale = tower.image_processor.pixel_scale
    for dtype in (torch.float32, torch.bfloat16):
        tower.to(dtype)
        wanted = tower([scale(image, 0) for image in raw])
        found = tower(raw)
        assert found[0].dtype == dtype and all(map(torch.equal, found, wanted))
        assert torch.equal(tower(torch.stack(raw)), tower(scale(torch.stack(raw), 1)))


def test_the_standard_tower_does_the_same(golden):
    tower = tower_of(golden / "llava_vit", HEVCViTVisionTower)
    patch = tower.config.patch_size
    raw = draw((2 * patch, 3 * patch), (4 * patch, patch))
    scale = tower.image_processor.pixel_scale
    found = tower(raw)
    assert found[0].dtype == torch.float32
    assert all(map(torch.equal, found, tower([scale(image, 0) for image in raw])))
    clip = draw((4, 2 * patch, 2 * patch))[0]
    assert torch.equal(tower([clip])[0], tower([scale(clip, 0)])[0])


def test_integers_without_a_meaning_are_refused(golden):
    tower = tower_of(golden / "llava_vit")
    patch = tower.config.patch_size
    for dtype in (torch.int64, torch.int32, torch.bool):
        with pytest.raises(ValueError, match="pixels must be uint8"):
            tower(torch.ones(1, 3, patch, patch).to(dtype))
    with pytest.raises(ValueError, match="images have 3 channels, but image_mean has 1"):
        PixelScale(1.0, (0.5,), (0.5,))(draw((4, 4))[0], 0)
    with pytest.raises(ValueError, match=r"image 7 is torch\.uint8: integer pixels need a scale"):
        batch_images_to_packing_input(draw((6, 6)), 6, dtype=torch.float32, numbers=[7])
    tower.image_processor = SimpleNamespace()  # one that says nothing of a mean
    with pytest.raises(ValueError, match="integer pixels need a scale"):
        tower(draw((patch, patch)))


@pytest.mark.parametrize("name", TINY)
def test_a_model_alone_refuses_integers(name):
    model = tiny(name)
    rows = torch.zeros(16, model.patch_dim, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"pixels are torch\.uint8, and a model takes normalized floating point ones"):
        model(rows, torch.tensor([[1, 4, 4]]))


def test_the_standard_model_alone_refuses_them_too(golden):
    model = tower_of(golden / "llava_vit", HEVCViTVisionTower).vision_tower
    with pytest.raises(ValueError, match=r"pixels are torch\.uint8"):
        model(torch.zeros(1, 3, 2 * model.config.patch_size, model.config.patch_size, dtype=torch.uint8))
