"""Configs, image processors and heads as transformers writes them, LoRA on every linear: each loads or trains."""

import json
import logging

import pytest
import torch
from families import GOLDEN_FAMILIES, TINY, pack, ragged, tiny
from safetensors.torch import load_file, save_file

from llava_packing_tower.checkpoint.pretrained import _warn_once
from llava_packing_tower.data.image_processor import PackingImageProcessor
from llava_packing_tower.models.llava_vit.config import LlavaViTConfig
from llava_packing_tower.models.llava_vit.standard import LlavaViTModel
from llava_packing_tower.utils.files import read_json

pytestmark = pytest.mark.newest


def features(model, rows, grid):
    out = model(rows, grid)
    return out if torch.is_tensor(out) else out.last_hidden_state


@pytest.fixture
def published(golden, tmp_path):
    """A golden checkpoint of a family with changed fields and further tensors."""

    def write(name, fields, **tensors):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({**read_json(golden / name / "config.json"), **fields}))
        save_file({**load_file(golden / name / "model.safetensors"), **tensors}, folder / "model.safetensors")
        return folder

    return write


@pytest.mark.parametrize("name", GOLDEN_FAMILIES)
def test_lists_dropout_and_a_classifier(name, published, golden, golden_case, caplog):
    cls, config = GOLDEN_FAMILIES[name], read_json(golden / name / "config.json")
    sizes = {key: [config[key]] * 2 for key in ("image_size", "patch_size") if key in config}
    head = {"classifier.weight": torch.ones(3, config["hidden_size"]), "classifier.bias": torch.ones(3)}
    folder = published(name, {**sizes, "attention_dropout": 0.1}, **head)
    model, info = cls.from_pretrained(folder, output_loading_info=True)
    expected = golden_case(name, "images")
    inputs = expected["patches"], expected["grid_thw"]
    assert torch.equal(features(model, *inputs), features(cls.from_pretrained(golden / name), *inputs))
    assert {"classifier.weight", "classifier.bias"} <= set(info["unexpected_keys"])
    assert model.config.patch_size == config["patch_size"] and model.config.attention_dropout == 0.1
    _warn_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        model.train()
    assert "attention_dropout 0.1; the model is trained without dropout" in caplog.text


@pytest.mark.parametrize("name", TINY)
def test_sizes_of_two_different_sides_are_refused(name):
    for field in ("image_size", "patch_size"):
        with pytest.raises(ValueError, match=rf"{field} must be one number .*got \[16, 32\]"):
            TINY[name][0].config_class(**{field: [16, 32]})


INNER = {"image_mean": [0.4] * 3, "image_std": [0.3] * 3, "resample": 3, "size": {"height": 32, "width": 32}}


@pytest.mark.parametrize("name", TINY)
def test_image_processor_of_transformers_5(name, tmp_path):
    model = tiny(name)
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": INNER, "processor_class": "X"}))
    for found in (
        type(model).load_image_processor(tmp_path, model.config),
        PackingImageProcessor.from_pretrained(tmp_path),
    ):
        assert (found.image_mean, found.image_std, found.resample) == ([0.4] * 3, [0.3] * 3, 3)
        assert found.size["height"] == 32
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(INNER))
    assert type(model).load_image_processor(tmp_path, model.config).image_mean == [0.4] * 3
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**INNER, "resample": 2}))
    with pytest.raises(ValueError, match=r"two image processors.* differ in resample"):
        type(model).load_image_processor(tmp_path, model.config)


@pytest.mark.parametrize("name", TINY)
def test_a_processor_without_images_says_nothing_of_them(name, tmp_path):
    model = tiny(name)
    (tmp_path / "processor_config.json").write_text(json.dumps({"processor_class": "X"}))
    default = type(model).default_image_processor(model.config)
    assert type(model).load_image_processor(tmp_path, model.config).to_dict() == default.to_dict()
    with pytest.raises(ValueError, match=r"has no preprocessor_config.json"):
        PackingImageProcessor.from_pretrained(tmp_path)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("targets", [["qkv", "proj"], "all-linear"])
@pytest.mark.parametrize("name", TINY)
def test_lora(name, targets, checkpointing):
    peft = pytest.importorskip("peft")
    model = tiny(name)
    rows, grid = pack(model, ragged(model))
    before = features(model, rows, grid)
    if checkpointing:
        model.gradient_checkpointing_enable()
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)).train()
    out = tuned(rows, grid)
    (out if torch.is_tensor(out) else out.last_hidden_state.sum() + out.pooler_output).sum().backward()
    adapters = {n: p.grad for n, p in tuned.named_parameters() if "lora_" in n}
    assert len(adapters) >= (8 if targets != "all-linear" else 16)
    assert all(grad is not None and grad.abs().max() > 0 for grad in adapters.values())
    tuned.eval()
    after = features(tuned, rows, grid)
    assert (after - before).abs().max() > 1e-3
    torch.testing.assert_close(features(tuned.merge_and_unload(), rows, grid), after, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", TINY)
def test_enable_input_require_grads(name):
    model = tiny(name).requires_grad_(False)
    model.enable_input_require_grads()
    assert features(model, *pack(model, ragged(model))).requires_grad
    model.disable_input_require_grads()
    assert not features(model, *pack(model, ragged(model))).requires_grad


@pytest.mark.parametrize("targets", ["all-linear", ["patch_embedding", "out_proj", "fc1"]])
def test_lora_on_the_standard_model(targets):
    """Its pooling head is torch's MultiheadAttention, which reads the weight of its output projection itself."""
    peft = pytest.importorskip("peft")
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlavaViTModel(LlavaViTConfig(**shape, patch_size=4)).eval()
    pixels = torch.randn(2, 3, 12, 20)
    before = model(pixels).pooler_output
    torch.testing.assert_close(
        model.head.attend(model.head.probe.expand(2, -1, -1), model(pixels).last_hidden_state),
        model.head.attention(*[model.head.probe.expand(2, -1, -1)] + [model(pixels).last_hidden_state] * 2)[0],
    )
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    after = tuned(pixels).pooler_output
    after.square().sum().backward()
    adapters = {n: p.grad for n, p in tuned.named_parameters() if "lora_" in n}
    assert any("head.attention.out_proj" in name for name in adapters)
    assert all(grad is not None and grad.abs().max() > 0 for grad in adapters.values())
    torch.testing.assert_close(tuned.merge_and_unload()(pixels).pooler_output, after, atol=1e-4, rtol=1e-4)
    assert (after - before).abs().max() > 1e-3


@pytest.mark.parametrize("name", TINY)
def test_gradient_checkpointing_is_enabled_and_disabled(name):
    model = tiny(name).train()
    inputs = pack(model, ragged(model))
    found = []
    for switch in (model.gradient_checkpointing_enable, model.gradient_checkpointing_disable):
        switch()
        assert model.is_gradient_checkpointing == model.encoder.gradient_checkpointing
        model.zero_grad()
        features(model, *inputs).square().sum().backward()
        found.append([p.grad for p in model.encoder.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*found, strict=True))
