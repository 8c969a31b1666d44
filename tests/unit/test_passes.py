"""A token budget for one encoder pass: several passes, the same features and gradients, and what fits."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from families import TINY, ragged, tiny

from llava_packing_tower.towers import passes
from llava_packing_tower.towers.packing_tower import HEVCViTPackingVisionTower
from llava_packing_tower.towers.passes import KEY, divide

GRIDS = ((3, 5), (1, 7), (5, 3), (4, 4), (2, 3), (3, 5), (6, 6))


def make_tower(folder, name="llava_vit", **arguments):
    tiny(name).save_pretrained(folder)
    tower = HEVCViTPackingVisionTower(f"packing:{folder}", SimpleNamespace(mm_vision_select_layer=-1, **arguments))
    tower.vision_tower.requires_grad_(True)
    return tower.train()


def count_passes(tower):
    """The patches of each pass from here on."""
    seen = []
    tower.vision_tower.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    return seen


def learn(tower, *inputs, **more):
    """Features, as one tensor, and the gradients of a loss in which every number has another weight."""
    tower.zero_grad()
    features = tower(*inputs, **more)
    flat = torch.cat([each.flatten() for each in features])
    (flat * torch.linspace(-1, 1, len(flat))).sum().backward()
    return flat.detach(), {name: p.grad.clone() for name, p in tower.named_parameters() if p.grad is not None}


def assert_same(found, expected):
    """Features to 1e-6 of the largest; gradients, which are sums over all patches in another order, to 1e-6 in float64
    and to the rounding of such a sum in float32."""
    (left, left_grads), (right, right_grads) = found, expected
    assert left.shape == right.shape and (left - right).abs().max() <= 1e-6 * right.abs().max()
    assert left_grads.keys() == right_grads.keys()
    for name, gradient in right_grads.items():
        rounding = 1e-6 if gradient.dtype == torch.float64 else 2e-5
        assert (left_grads[name] - gradient).abs().max() <= rounding * max(1.0, gradient.abs().max().item()), name


@pytest.mark.parametrize(
    ("sizes", "budget", "expected"),
    [
        ([9, 4, 4, 3], None, [[0, 1, 2, 3]]),
        ([9, 4, 4, 3], 20, [[0, 1, 2, 3]]),
        ([9, 4, 4, 3], 19, [[0, 1, 2], [3]]),
        ([9, 4, 4, 3], 8, [[0], [1, 2], [3]]),  # the first is larger: alone
        ([9, 4, 4, 3], 1, [[0], [1], [2], [3]]),
        ([], 5, [[]]),
    ],
)
def test_images_are_divided_in_order(sizes, budget, expected):
    assert divide(sizes, budget) == expected


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_features_and_gradients_are_those_of_one_pass(tmp_path, name, checkpointing, dtype):
    tower = make_tower(tmp_path, name).to(dtype)
    if checkpointing:
        tower.vision_tower.gradient_checkpointing_enable()
    images = ragged(tower.vision_tower, GRIDS)
    seen = count_passes(tower)
    expected = learn(tower, images)
    assert len(seen) == 1 and tower.encoder_tokens is None
    for budget in (40, 16, 1):
        seen.clear()
        tower.encoder_tokens = budget
        assert_same(learn(tower, images), expected)
        assert len(seen) == len(divide(sorted((h * w for h, w in GRIDS), reverse=True), budget)) > 1
        assert all(count <= budget or count in [h * w for h, w in GRIDS] for count in seen)


def test_a_batch_of_one_size_and_clips_with_positions(tmp_path):
    tower = make_tower(tmp_path)
    batch = torch.randn(5, 3, 12, 20)
    clips = [torch.randn(3, 2, 8, 12), torch.randn(3, 12, 4), torch.randn(3, 4, 8, 8)]
    positions = torch.rand(12 + 3 + 16, 3) * 9
    expected = learn(tower, batch), learn(tower, clips, patch_positions=positions)
    tower.encoder_tokens = 17
    seen = count_passes(tower)
    assert_same(learn(tower, batch), expected[0])
    assert seen == [15] * 5
    seen.clear()
    assert_same(learn(tower, clips, patch_positions=positions), expected[1])
    assert seen == [15, 16]


def test_half_precision_is_as_near_to_float32(tmp_path):
    """Twice the error of one pass in bfloat16, both against float32."""
    tower = make_tower(tmp_path)
    images = ragged(tower.vision_tower, GRIDS)
    exact, _ = learn(tower, images)
    low = copy.deepcopy(tower).bfloat16()
    one, _ = learn(low, images)
    low.encoder_tokens = 16
    several, _ = learn(low, images)
    assert (several.float() - exact).abs().max() <= 2 * (one.float() - exact).abs().max()


def test_where_the_budget_comes_from(tmp_path, monkeypatch):
    assert make_tower(tmp_path, **{KEY: 300}).encoder_tokens == 300
    monkeypatch.setenv("LLAVA_PACKING_ENCODER_TOKENS", "77")
    assert make_tower(tmp_path).encoder_tokens == 77
    assert make_tower(tmp_path, **{KEY: 300}).encoder_tokens == 300
    for wrong in (0, -3, True, 2.5, "many"):
        with pytest.raises(ValueError, match=f"{KEY} must be a whole number of patches"):
            make_tower(tmp_path, **{KEY: wrong})
    monkeypatch.setenv("LLAVA_PACKING_ENCODER_TOKENS", "-1")
    with pytest.raises(ValueError, match=r"^LLAVA_PACKING_ENCODER_TOKENS must be a whole number"):
        make_tower(tmp_path)


@pytest.mark.parametrize("kind", [torch.cuda.OutOfMemoryError, RuntimeError])
def test_out_of_memory_says_what_was_asked_for_and_what_fits(tmp_path, kind):
    tower = make_tower(tmp_path)
    images = ragged(tower.vision_tower, GRIDS)  # 36, 16, 15, 15, 15, 7, 6 patches
    most = 70

    def refuse(module, args, kwargs):
        if len(kwargs["hidden_states"]) > most:
            raise kind("CUDA out of memory, or DefaultCPUAllocator: can't allocate memory")

    tower.vision_tower.register_forward_pre_hook(refuse, with_kwargs=True)
    with pytest.raises(kind, match=rf"asked for 110 patches of 7 images in one pass; 67 fit: set {KEY}: 67"):
        tower(images)
    tower.encoder_tokens = 67
    assert [len(each) for each in tower(images)] == [h * w for h, w in GRIDS]
    most = 30
    tower.encoder_tokens = None
    with pytest.raises(kind, match="the largest image alone has 36: lower mm_packing_max_patches"):
        tower(images)


def test_other_errors_are_not_explained(tmp_path):
    tower = make_tower(tmp_path)
    with pytest.raises(ValueError, match="image 1 has 4 channels"):
        tower([torch.randn(3, 8, 8), torch.randn(4, 8, 8)])
    with pytest.raises(ValueError, match="no images"):
        tower([])


def test_all_ranks_make_as_many_passes(tmp_path, monkeypatch):
    """A rank that needs fewer runs its smallest image again, without an effect on features and gradients."""
    tower = make_tower(tmp_path)
    images = ragged(tower.vision_tower, GRIDS[:3])
    expected = learn(tower, images)
    tower.encoder_tokens = 1000
    monkeypatch.setattr(passes, "wait_for_others", lambda model, count, device: count + 2)
    seen = count_passes(tower)
    assert_same(learn(tower, images), expected)
    assert seen == [37, 7, 7]
