import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import assert_close
from safetensors.torch import load_file, save_file

from llava_packing_tower import HEVCViTPackingVisionTower, LlavaViTPackingConfig, LlavaViTPackingModel
from llava_packing_tower.data.image_processor import PackingImageProcessor
from llava_packing_tower.towers.feature_select import selected_layers

FOLDER = "hevc_packing_tower"


def arguments(layer=-1, feature="patch", **more):
    return SimpleNamespace(mm_vision_select_layer=layer, mm_vision_select_feature=feature, **more)


@pytest.fixture(scope="module")
def folder(golden):
    return str(golden / FOLDER)


@pytest.fixture(scope="module")
def facts(golden):
    return json.loads((golden / FOLDER / "tower.json").read_text())


@pytest.fixture(scope="module")
def features(golden):
    return load_file(golden / FOLDER / "features.safetensors")


MODES = [
    "patch@-1",
    "patch@-2",
    "cls_patch@-2",
    "slicefour_patch@-1",
    "slicefour_patch@-2",
    "slice_m25811_f6_patch@-2",
]


def test_all_modes_are_covered(facts):
    assert set(facts["modes"]) == set(MODES)


@pytest.mark.parametrize("mode", MODES)
def test_golden_features(folder, facts, features, mode):
    feature, layer = mode.split("@")
    tower = HEVCViTPackingVisionTower(folder, arguments(int(layer), feature))
    expected = facts["modes"][mode]
    assert tower.hidden_size == expected["hidden_size"]
    batch, rows, columns = tower(features["batch"], return_spatial_dims=True)
    assert [rows, columns] == expected["batch_spatial_dims"]
    assert_close(batch, features[f"{mode}/batch"])
    images = [features[f"image.{i}"] for i in range(3)]
    listed, rows, columns = tower(images, return_spatial_dims=True)
    assert type(listed).__name__ == expected["list_type"] and [rows, columns] == expected["list_spatial_dims"]
    for index, part in enumerate(listed):
        assert_close(part, features[f"{mode}/list.{index}"])


def test_tensor_and_list_of_the_same_images_agree(folder, features):
    tower = HEVCViTPackingVisionTower(folder, arguments(-2))
    batch = features["batch"]
    listed = tower(list(batch))
    assert isinstance(listed, list) and torch.equal(torch.stack(listed), tower(batch))
    assert torch.equal(torch.stack(tower(tuple(batch))), tower(batch))


def test_a_ragged_batch_is_one_pass(folder, features):
    tower = HEVCViTPackingVisionTower(folder, arguments())
    calls = []
    tower.vision_tower.encoder.layers[0].register_forward_hook(lambda m, inputs, out: calls.append(out[0].shape[0]))
    tower([features[f"image.{i}"] for i in range(3)])
    assert calls == [6 + 16 + 5]


def test_only_what_is_selected_is_computed_and_kept(folder, features):
    tower = HEVCViTPackingVisionTower(folder, arguments(-5))
    model, ran = tower.vision_tower, []
    for index, layer in enumerate(model.encoder.layers):
        layer.register_forward_hook(lambda *_, i=index: ran.append(i))
    for module in (model.head, model.layernorm_post):
        module.register_forward_hook(lambda *_: ran.append("head or norm"))
    model.encoder.register_forward_hook(lambda m, i, states: ran.append(len(states)))
    tower(features["batch"])
    assert ran == [*range(8), 1]  # one state


@pytest.mark.parametrize("projector", [None, "patch_merger", "spatial_merge"])
def test_attributes(folder, facts, projector):
    expected = facts[f"attributes mm_projector_type={projector}"]
    tower = HEVCViTPackingVisionTower(folder, arguments(mm_projector_type=projector))
    for name in ("hidden_size", "image_size", "num_patches", "num_patches_per_side", "projector_type"):
        assert getattr(tower, name) == expected[name], name
    assert tower.select_feature == expected["select_feature"]
    assert str(tower.dtype) == expected["dtype"] and str(tower.device) == expected["device"]
    assert list(tower.dummy_feature.shape) == expected["dummy_feature"] and not tower.dummy_feature.any()
    assert any(p.requires_grad for p in tower.parameters()) == expected["any_requires_grad"]
    assert isinstance(tower.config, LlavaViTPackingConfig)
    processor = tower.image_processor
    assert processor.size == {"shortest_edge": 16} and processor.crop_size == {"height": 16, "width": 16}
    assert processor.image_mean == pytest.approx([0.48145466, 0.4578275, 0.40821073])


def test_loading_rules(folder, facts):
    for case in facts["loading"]:
        more = {k: case[k] for k in ("mm_tunable_parts", "unfreeze_mm_vision_tower") if case[k] is not None}
        tower = HEVCViTPackingVisionTower(folder, arguments(**more), delay_load=case["delay_load"])
        assert tower.is_loaded == case["is_loaded"], case
        assert hasattr(tower, "cfg_only") == case["has_cfg_only"], case
        assert hasattr(tower, "image_processor") == case["has_image_processor"] == hasattr(tower, "vision_tower"), case
        assert tower.hidden_size == case["hidden_size"] and str(tower.dtype) == case["dtype"]


def test_none_as_tunable_parts_is_no_crash(folder):
    assert not HEVCViTPackingVisionTower(folder, arguments(mm_tunable_parts=None), delay_load=True).is_loaded


def test_delayed_loading(folder, features):
    tower = HEVCViTPackingVisionTower(folder, arguments(-2), delay_load=True)
    with pytest.raises(ValueError, match=r"not loaded: call load_model"):
        tower(features["batch"])
    tower.load_model(device_map="auto")
    inner = tower.vision_tower
    tower.load_model()
    assert tower.vision_tower is inner
    assert_close(tower(features["batch"]), features["patch@-2/batch"])


def test_prefix_is_taken_off(folder, features):
    for name in (f"packing:{folder}", f"PACKING:{folder}"):
        tower = HEVCViTPackingVisionTower(name, arguments(-2))
        assert tower.vision_tower_name == name
        assert_close(tower(features["batch"]), features["patch@-2/batch"])


def test_features_keep_the_towers_dtype(folder, features):
    tower = HEVCViTPackingVisionTower(folder, arguments())
    assert tower(features["batch"].half()).dtype == torch.float32
    tower.to(torch.bfloat16)
    assert tower.dtype == torch.bfloat16
    assert tower(features["batch"].half()).dtype == torch.bfloat16
    assert tower([features["image.0"].double()])[0].dtype == torch.bfloat16


def test_trainable_and_gradients_equal_image_by_image(folder, features):
    tower = HEVCViTPackingVisionTower(folder, arguments(-2))
    tower.requires_grad_(True)
    images = [features[f"image.{i}"] for i in range(3)]
    sum((f * (i + 1)).square().sum() for i, f in enumerate(tower(images))).backward()
    together = {n: p.grad.clone() for n, p in tower.named_parameters()}  # of every one: DDP waits for each
    idle = {n for n in together if ".layers.11." in n or ".head." in n or "layernorm_post" in n}
    assert {n for n, gradient in together.items() if not gradient.any()} == idle
    tower.zero_grad()
    for index, image in enumerate(images):
        (tower(image[None]) * (index + 1)).square().sum().backward()
    for name, parameter in tower.named_parameters():
        torch.testing.assert_close(parameter.grad, together[name], rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "no images"),
        (torch.zeros(0, 3, 8, 8), "no images"),
        (torch.zeros(1, 3, 2, 8, 8), r"\[B, C, H, W\]"),
        (torch.zeros(2, 3, 8, 10), r"image 0 is 8 x 10 pixels.*width 10.*patch size 4; nearest widths: 8 or 12"),
        ([torch.zeros(3, 8, 8), torch.zeros(4, 8, 8)], "image 1 has 4 channels, expected 3"),
    ],
)
def test_bad_images(folder, images, message):
    tower = HEVCViTPackingVisionTower(folder, arguments())
    with pytest.raises(ValueError, match=message):
        tower(images)


@pytest.mark.parametrize("delay", [False, True])
@pytest.mark.parametrize("layer", [13, -14])
def test_select_layer_out_of_range(folder, layer, delay):
    with pytest.raises(ValueError, match=rf"{layer}.*12 layers has only -13 to 12"):
        HEVCViTPackingVisionTower(folder, arguments(layer), delay_load=delay)
    HEVCViTPackingVisionTower(folder, arguments(12 if layer > 0 else -13), delay_load=delay)


def test_unknown_feature(folder, facts):
    with pytest.raises(ValueError, match="Unexpected select feature: cls") as error:
        HEVCViTPackingVisionTower(folder, arguments(feature="cls"))
    assert facts["unknown_feature"].split(": ", 1)[1] in str(error.value)


def test_selected_layers():
    assert selected_layers("slicefour_patch", -1, 24) == (5, 11, 17, 23)
    assert selected_layers("slicefour_cls_patch", -2, 24) == (4, 10, 16, 22)
    assert selected_layers("slice_m25811_f6_cls_patch", -1, 24) == (23, 20, 17, 14, 6)
    with pytest.raises(ValueError, match=r"-11.*9 layers"):
        selected_layers("slice_m25811_f6_patch", -2, 9)
    with pytest.raises(ValueError, match=r"slicefour_patch with mm_vision_select_layer -2 and 6 layers.*\[-1, 0"):
        selected_layers("slicefour_patch", -2, 6)


def test_folder_without_weights_config_or_with_wrong_weights(folder, tmp_path):
    with pytest.raises(ValueError, match=r"no config\.json"):
        HEVCViTPackingVisionTower(str(tmp_path), arguments())
    tensors = load_file(f"{folder}/model.safetensors")
    config = json.loads(Path(folder, "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"no model\.safetensors"):
        HEVCViTPackingVisionTower(str(tmp_path), arguments())
    tensors.pop("encoder.layers.3.mlp.fc1.bias")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"1 missing[\s\S]*encoder\.layers\.3\.mlp\.fc1\.bias"):
        HEVCViTPackingVisionTower(str(tmp_path), arguments())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "clip_vision_model"}))
    with pytest.raises(ValueError, match="no packed encoder for model_type 'clip_vision_model'; known: llava_vit_pack"):
        HEVCViTPackingVisionTower(str(tmp_path), arguments())


# -------------------------------------------------------------------- rebuilt from a LLaVA checkpoint


def saved_arguments(tower, weights="checkpoint", **more):
    remembered = json.loads(json.dumps(tower.packing_config(weights)))
    return arguments(-2, mm_packing_config=remembered, **more)


def test_rebuilt_without_the_folder_and_filled_from_outside(folder, features):
    tower = HEVCViTPackingVisionTower(folder, arguments(-2))
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    again = HEVCViTPackingVisionTower("/gone/packing", saved_arguments(tower))
    assert again.is_loaded and again.image_processor.to_dict() == tower.image_processor.to_dict()
    again.load_state_dict(tower.state_dict())
    assert torch.equal(again(features["batch"]), tower(features["batch"]))


def test_a_gap_is_an_error_not_random_weights(folder, features):
    tower = HEVCViTPackingVisionTower(folder, arguments(-2))
    again = HEVCViTPackingVisionTower("/gone/packing", saved_arguments(tower))
    with pytest.raises(ValueError, match="tensors of the vision tower were not in the LLaVA checkpoint"):
        again(features["batch"])
    state = tower.state_dict()
    name = "vision_tower.encoder.layers.2.layer_norm1.weight"
    state.pop(name)
    again.load_state_dict(state, strict=False)
    with pytest.raises(ValueError, match=rf"1 tensors .*{name.removeprefix('vision_tower.')}"):
        again(features["batch"])


def test_frozen_tower_notices_a_changed_folder(folder, features, tmp_path):
    LlavaViTPackingModel.from_pretrained(folder).save_pretrained(tmp_path / "packing")
    PackingImageProcessor.from_pretrained(folder).save_pretrained(tmp_path / "packing")
    name = str(tmp_path / "packing")
    args = saved_arguments(HEVCViTPackingVisionTower(name, arguments(-2)), "folder")
    assert_close(HEVCViTPackingVisionTower(name, args)(features["batch"]), features["patch@-2/batch"])
    tensors = load_file(tmp_path / "packing" / "model.safetensors")
    tensors["encoder.layers.0.mlp.fc2.bias"][3] += 1e-3
    save_file(tensors, tmp_path / "packing" / "model.safetensors")
    with pytest.raises(ValueError, match="has changed since"):
        HEVCViTPackingVisionTower(name, args)


def test_loads_inside_a_meta_device_context(folder, features):
    """transformers 5 builds LLaVA under torch.device("meta")."""
    with torch.device("meta"):
        tower = HEVCViTPackingVisionTower(folder, arguments(-2))
        hollow = HEVCViTPackingVisionTower("/gone", saved_arguments(tower))
    assert_close(tower(features["batch"]), features["patch@-2/batch"])
    hollow.load_state_dict(tower.state_dict())
    assert_close(hollow(features["batch"]), features["patch@-2/batch"])


def test_loads_where_new_parameters_are_sent_to_meta(folder, features):
    """transformers 4 with low_cpu_mem_usage builds LLaVA under accelerate's init_empty_weights."""
    from accelerate import init_empty_weights

    with init_empty_weights():
        tower = HEVCViTPackingVisionTower(folder, arguments(-2))
        hollow = HEVCViTPackingVisionTower("/gone", saved_arguments(tower))
    assert_close(tower(features["batch"]), features["patch@-2/batch"])
    assert not any(p.is_meta for p in hollow.parameters())


def test_attention_is_chosen_by_argument_or_environment(folder, features, monkeypatch, caplog):
    tower = HEVCViTPackingVisionTower(folder, arguments(-2, mm_packing_attention="eager"))
    with caplog.at_level(logging.INFO, logger="llava_packing_tower.attention.dispatch"):
        tower(features["batch"])
    assert tower.vision_tower.encoder.attention_backend == "eager"
    monkeypatch.setenv("LLAVA_PACKING_ATTENTION", "sdpa")
    assert HEVCViTPackingVisionTower(folder, arguments()).vision_tower.encoder.attention_backend == "sdpa"
    with pytest.raises(ValueError, match="unknown attention backend 'flash'"):
        HEVCViTPackingVisionTower(folder, arguments(mm_packing_attention="flash"))


def test_fused_blocks_are_switched_off_by_argument(folder):
    assert HEVCViTPackingVisionTower(folder, arguments()).vision_tower.encoder.fused is None
    off = HEVCViTPackingVisionTower(folder, arguments(mm_packing_compile=False))
    assert off.vision_tower.encoder.fused is False
    off.vision_tower.set_compile(None)  # the old name
    assert off.vision_tower.encoder.fused is None
