"""Positions of samples, as OneVision-Encoder's LLaVA passes them: to the tower, and to a model at native resolution."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from llava_packing_tower.data.positions import grid_positions
from llava_packing_tower.integrations.llava.gridded_images import hooked_grid
from llava_packing_tower.multimodal.visual_inputs import Visual, with_positions
from llava_packing_tower.tools.demo.tiny_models import make_tower
from llava_packing_tower.towers.packing_tower import HEVCViTPackingVisionTower
from llava_packing_tower.towers.sample_positions import join_samples

ROWS, COLUMNS, PATCH = 3, 2, 14


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tower") / "vit_packing"
    make_tower(folder, seed=3)
    return HEVCViTPackingVisionTower(str(folder), SimpleNamespace(mm_vision_select_layer=-1))


def pixels(count: int) -> torch.Tensor:
    return torch.randn(count, 3, ROWS * PATCH, COLUMNS * PATCH, generator=torch.Generator().manual_seed(1))


def grid(times=(0,)) -> torch.Tensor:
    """What the fork's dataset makes: ``[1, n, 3]``, frames at these times."""
    plain = grid_positions((1, ROWS, COLUMNS)).float()
    frames = [torch.cat([torch.full((len(plain), 1), float(t)), plain[:, 1:]], 1) for t in times]
    return torch.cat(frames)[None]


@torch.no_grad()
def test_an_image_with_the_positions_of_its_grid_is_what_it_is_without(tower):
    images = pixels(2)
    features = tower(images, grid_thw=torch.tensor([[1, ROWS, COLUMNS]] * 2), patch_positions=[grid(), grid()])
    assert torch.equal(features, tower(images))
    merged = tower(images, return_spatial_dims=True, patch_positions=[grid(), None])
    assert torch.equal(merged[0], features) and merged[1:] == (ROWS, COLUMNS)


@torch.no_grad()
def test_the_frames_of_a_sample_are_one_clip_at_their_times(tower):
    images, times = pixels(4), (0, 9, 63)
    features = tower(images, patch_positions=[None, grid(times)])
    assert features.shape == (4, ROWS * COLUMNS, tower.hidden_size)
    assert torch.equal(features[0], tower(images[:1])[0])
    clip = torch.stack(list(images[1:]), dim=1)
    expected = tower([clip], patch_positions=grid(times)[0])[0].unflatten(0, (3, -1))
    torch.testing.assert_close(features[1:], expected)
    apart = tower(images[1:])
    assert (features[1:] - apart).abs().max() > 1e-3  # the frames see each other, and stand elsewhere
    as_list = tower(list(images), patch_positions=[None, grid(times)])
    torch.testing.assert_close(torch.stack(as_list), features)


def test_which_images_are_whose():
    images = pixels(5)
    moved = grid() + torch.tensor([0.0, 1.0, 2.0])
    inputs, positions = join_samples(images, [grid((1, 2)), moved, None, None], PATCH, False)
    assert [tuple(x.shape[:2]) for x in inputs] == [(3, 2), (3, 42), (3, 42), (3, 42)]
    expected = torch.cat([grid((1, 2))[0], moved[0], grid()[0], grid()[0]])
    assert torch.equal(positions, expected)
    # A tower that knows no time: frames stay images, and times mean nothing.
    assert join_samples(images, [grid((1, 2)), None], PATCH, True) == (images, None)
    assert join_samples(images, [None, None], PATCH, False) == (images, None)


@pytest.mark.parametrize(
    ("count", "given", "message"),
    [
        (2, [torch.zeros(1, 7, 3)], "a sample has 7 positions, but its images have 6 patches each"),
        (3, [grid((1, 2))], r"3 images of 6 patches, but the samples have positions of \[12\] patches"),
        (3, [grid((1, 2)), None, None], r"3 images of 6 patches, but .* of \[12, None, None\]"),
    ],
)
def test_positions_that_do_not_fit_are_refused(count, given, message):
    with pytest.raises(ValueError, match=message):
        join_samples(pixels(count), given, PATCH, False)


def test_positions_for_images_of_several_sizes_are_refused():
    with pytest.raises(ValueError, match=r"images of one size, got \[\(28, 42\), \(42, 28\)\]"):
        join_samples([torch.zeros(3, 28, 42), torch.zeros(3, 42, 28)], [grid(), grid()], PATCH, False)


# ---------------------------------------------------------------- at native resolution


def test_a_model_is_called_with_positions_of_images_or_of_samples():
    visuals = [Visual(torch.zeros(1, 3, 28, 42)), Visual(torch.zeros(1, 3, 28, 14)), Visual(torch.zeros(1, 3, 14, 14))]
    counts = [6, 2, 1]
    rows = torch.arange(27.0).view(9, 3)
    placed = with_positions(visuals, [None, rows[None, :8], rows[8:]], 14)
    assert [len(v.patch_positions) for v in placed] == counts
    assert torch.equal(torch.cat([v.patch_positions for v in placed]), rows)
    assert placed[0].group == placed[1].group != placed[2].group
    for nothing in (None, [], [None, None]):
        assert with_positions(visuals, nothing, 14) == visuals
    with pytest.raises(ValueError, match=r"patch_positions of \[8\] patches, but the images have \[6, 2, 1\]"):
        with_positions(visuals, [rows[:8]], 14)


def test_the_grid_of_an_image_is_that_of_its_pixels(tower):
    """The fork divides by 14, whatever the patch is, and its processors cut nothing off."""
    seen = []

    def original(image, processor, pinpoints=None):
        seen.append(processor)
        return {"pixel_values": processor.preprocess(image, return_tensors="pt", do_resize=False)["pixel_values"]}

    process = hooked_grid(original)
    image = Image.new("RGB", (7 * PATCH, 11 * PATCH))
    found = process(image, tower.image_processor, [(98, 154)])
    assert found["grid_thw"] == [1, 11, 7] and found["pixel_values"].shape == (1, 3, 154, 98)
    assert seen[0].do_center_crop is False and tower.image_processor.do_center_crop is True
    stranger = SimpleNamespace(preprocess=lambda image, **how: {"pixel_values": "its own"})
    assert process(image, stranger) == {"pixel_values": "its own"}
    assert "tower_patch_size" not in tower.image_processor.to_dict()
