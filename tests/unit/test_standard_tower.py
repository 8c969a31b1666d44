"""HEVCViTVisionTower against the packing tower and the golden tensors."""

from types import SimpleNamespace

import pytest
import torch
from conftest import assert_close

from llava_packing_tower.towers.packing_tower import HEVCViTPackingVisionTower
from llava_packing_tower.towers.standard_tower import HEVCViTVisionTower


def args(**changes):
    return SimpleNamespace(**{"mm_vision_select_layer": -2, **changes})


@pytest.mark.parametrize(
    ("name", "feature"),
    [
        ("llava_vit", "patch"),
        ("llava_vit", "slicefour_patch"),
        ("llava_vit_variant", "patch"),
        ("hevc_packing_tower", "slice_m25811_f6_patch"),
    ],
)
def test_same_features_as_the_packing_tower(golden, name, feature):
    folder = str(golden / name)
    config = args(mm_vision_select_feature=feature, mm_vision_select_layer=-1)
    standard, packing = HEVCViTVisionTower(folder, config), HEVCViTPackingVisionTower(folder, config)
    p = standard.config.patch_size
    ragged = [torch.randn(3, 2 * p, 5 * p), torch.randn(3, 4 * p, p), torch.randn(3, 3 * p, 3 * p)]
    found = standard(ragged)
    assert [tuple(f.shape[:2]) for f in found] == [(1, 10), (1, 4), (1, 9)]
    for ours, theirs in zip(found, packing(ragged)):
        assert_close(ours[0], theirs)
    batch = torch.randn(2, 3, 2 * p, 5 * p)
    assert_close(standard(batch), packing(batch))
    _, rows, columns = standard(batch, return_spatial_dims=True)
    assert (rows, columns) == packing(batch, return_spatial_dims=True)[1:] == (2, 5)
    for name in ("hidden_size", "num_patches", "num_patches_per_side", "image_size"):
        assert getattr(standard, name) == getattr(packing, name)
    assert standard.dummy_feature.shape == packing.dummy_feature.shape
    assert not any(p.requires_grad for p in standard.parameters())


def test_video_stands_at_interpolated_frames(golden, golden_case):
    case = golden_case("llava_vit", "video8")
    tower = HEVCViTVisionTower(str(golden / "llava_vit"), args(mm_vision_select_layer=-1))
    expected = case["hidden_states"][-1]
    assert_close(tower(case["pixels.0"][None])[0], expected)
    assert_close(tower([case["pixels.0"]])[0][0], expected)
    plain = golden_case("llava_vit", "video8_default_positions")
    assert (tower(case["pixels.0"][None])[0] - plain["last_hidden_state"]).abs().max() > 0.1


def test_features_come_back_in_the_dtype_of_the_images(golden):
    tower = HEVCViTVisionTower(str(golden / "llava_vit"), args())
    images = torch.randn(2, 3, 8, 12).bfloat16()
    assert tower(images).dtype == torch.bfloat16 and tower.dtype == torch.float32
    assert [f.dtype for f in tower(list(images))] == [torch.bfloat16] * 2


def test_attention_setting_of_the_packing_tower_does_not_concern_it(golden, monkeypatch):
    monkeypatch.setenv("LLAVA_PACKING_ATTENTION", "torch_varlen")
    tower = HEVCViTVisionTower(str(golden / "llava_vit"), args(mm_packing_attention="flash_attention_2"))
    assert tower(torch.zeros(1, 3, 8, 8)).shape == (1, 4, 64)


def test_delayed_loading_and_rebuilding_from_a_checkpoint(golden):
    folder = str(golden / "llava_vit")
    tower = HEVCViTVisionTower(folder, args(), delay_load=True)
    assert not tower.is_loaded and tower.hidden_size == 64 and tower.config.model_type == "llava_vit"
    with pytest.raises(ValueError, match="not loaded"):
        tower(torch.zeros(1, 3, 8, 8))
    tower.load_model()
    again = HEVCViTVisionTower("/nowhere/hevc_vit", args(mm_packing_config=tower.packing_config()))
    with pytest.raises(ValueError, match="not in the LLaVA checkpoint"):
        again(torch.zeros(1, 3, 8, 8))
    again.vision_tower.load_state_dict(tower.vision_tower.state_dict())
    images = torch.randn(1, 3, 8, 8)
    assert torch.equal(again(images), tower(images))


def test_bad_input(golden):
    tower = HEVCViTVisionTower(str(golden / "llava_vit"), args())
    with pytest.raises(ValueError, match="empty"):
        tower([])
    with pytest.raises(ValueError, match="multiples of 4"):
        tower(torch.zeros(1, 3, 8, 9))
    with pytest.raises(ValueError, match="65 different positions"):
        tower(torch.zeros(1, 3, 65, 4, 4))
    with pytest.raises(ValueError, match="no model for model_type 'siglip2'"):
        tower._model_class("siglip2")
