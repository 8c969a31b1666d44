import json

import pytest
import torch
from conftest import assert_close
from safetensors.torch import load_file, save_file

from llava_packing_tower import (
    LlavaViTPackingConfig,
    LlavaViTPackingModel,
    compute_patch_positions_from_grid_thw,
    unpatchify,
)
from llava_packing_tower.data.patches import batch_images_to_packing_input, split_packed

CASES = [
    ("llava_vit", "images"),
    ("llava_vit", "video8"),
    ("llava_vit", "video8_default_positions"),
    ("llava_vit", "mixed"),
    ("llava_vit", "free_positions"),
    ("llava_vit_variant", "images"),
]


@pytest.fixture(scope="module")
def packed_folder(golden, tmp_path_factory):
    """A golden folder under its packing names, as a converted checkpoint has them."""

    def make(name):
        folder = tmp_path_factory.mktemp("packing") / name
        LlavaViTPackingModel.from_pretrained(golden / name).save_pretrained(folder)
        return folder

    return make


def small(**overrides):
    config = dict(hidden_size=64, intermediate_size=80, num_hidden_layers=3, num_attention_heads=2, patch_size=4)
    return LlavaViTPackingModel(
        LlavaViTPackingConfig(**{**config, "image_size": 32, "initializer_range": 0.15, **overrides})
    ).eval()


def ragged(patch=4):
    return [torch.randn(3, h * patch, w * patch) for h, w in ((3, 5), (1, 7), (4, 4), (6, 2))]


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize(("folder", "case"), CASES)
def test_golden(packed_folder, golden_case, folder, case, backend):
    expected = golden_case(folder, case)
    model = LlavaViTPackingModel.from_pretrained(packed_folder(folder), attn_implementation=backend)
    out = model(expected["patches"], expected["grid_thw"], expected.get("patch_positions"), output_hidden_states=True)
    assert_close(out.last_hidden_state, expected["last_hidden_state"])
    checked = {"last_hidden_state"}
    if "hidden_states" in expected:
        assert_close(torch.stack(out.hidden_states), expected["hidden_states"])
        checked.add("hidden_states")
    if "pooler_output" in expected:
        assert_close(out.pooler_output, expected["pooler_output"])
        checked.add("pooler_output")
    else:
        assert out.pooler_output is None and folder == "llava_vit_variant"
    inputs = {"patches", "grid_thw", "patch_positions"}
    assert {key for key in expected if not key.startswith("pixels")} - inputs == checked


def test_key_names_and_config(packed_folder, golden):
    folder = packed_folder("llava_vit")
    content = json.loads((golden / "llava_vit" / "expected_packing_keys.json").read_text())
    expected = content.get("packing", content.get("packing_keys", content))
    saved = load_file(folder / "model.safetensors")
    assert {key: list(tensor.shape) for key, tensor in saved.items()} == expected
    config = json.loads((folder / "config.json").read_text())
    for key, value in json.loads((golden / "llava_vit" / "packing_config.json").read_text()).items():
        assert config[key] == value, key


def test_default_positions_are_those_of_the_grid(golden_case, golden):
    case = golden_case("llava_vit", "mixed")
    model = LlavaViTPackingModel.from_pretrained(golden / "llava_vit")
    implicit = model(case["patches"], case["grid_thw"]).last_hidden_state
    explicit = model(case["patches"], case["grid_thw"], compute_patch_positions_from_grid_thw(case["grid_thw"]))
    assert torch.equal(implicit, explicit.last_hidden_state)
    assert (implicit - case["last_hidden_state"]).abs().max() > 1e-2  # the case has interpolated frames


def test_hidden_states_and_tuple(golden):
    model = small()
    rows, grid = batch_images_to_packing_input(ragged(), 4)
    out = model(rows, grid, output_hidden_states=True)
    assert len(out.hidden_states) == 4
    assert_close(out.hidden_states[0], model.layernorm_pre(model.patch_embed(rows)), 0)
    assert not torch.allclose(out.hidden_states[-1], out.last_hidden_state)
    assert_close(model.layernorm_post(out.hidden_states[-1]), out.last_hidden_state, 0)
    last, pooled, states = model(rows, grid, return_dict=False)
    assert_close(last, out.last_hidden_state, 0)
    assert pooled.shape == (4, 64) and states is None
    assert [s.shape for s in model(rows, grid, feature_layers=(3, 1))] == [(*rows.shape[:1], 64)] * 2
    assert_close(model(rows, grid, feature_layers=(3, 1))[1], out.hidden_states[1], 0)


def test_alone_equals_packed_forward_and_gradient():
    model = small()
    images, weights = ragged(), []
    rows, grid = batch_images_to_packing_input(images, 4)
    packed = model(rows, grid)
    weights = torch.randn_like(packed.last_hidden_state)
    pooled_weights = torch.randn_like(packed.pooler_output)
    ((packed.last_hidden_state * weights).sum() + (packed.pooler_output * pooled_weights).sum()).backward()
    together = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    grids = [tuple(g) for g in grid.tolist()]
    for index, (image, part) in enumerate(zip(images, split_packed(packed.last_hidden_state, grids), strict=True)):
        alone = model(*batch_images_to_packing_input([image], 4))
        assert_close(alone.last_hidden_state, part.detach(), 5e-6)
        assert_close(alone.pooler_output[0], packed.pooler_output[index].detach(), 5e-6)
        weight = split_packed(weights, grids)[index]
        loss = (alone.last_hidden_state * weight).sum() + (alone.pooler_output[0] * pooled_weights[index]).sum()
        loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, together[name], rtol=1e-4, atol=1e-5, msg=name)


def test_permuting_images_permutes_outputs():
    model = small()
    images = ragged()
    order = [2, 0, 3, 1]
    rows, grid = batch_images_to_packing_input(images, 4)
    out = split_packed(model(rows, grid).last_hidden_state, [tuple(g) for g in grid.tolist()])
    rows, grid = batch_images_to_packing_input([images[i] for i in order], 4)
    permuted = split_packed(model(rows, grid).last_hidden_state, [tuple(g) for g in grid.tolist()])
    for place, index in enumerate(order):
        assert_close(permuted[place], out[index], 5e-6)


def test_images_of_one_pack_do_not_see_each_other():
    model = small()
    images = ragged()
    rows, grid = batch_images_to_packing_input(images, 4)
    before = model(rows, grid).last_hidden_state
    images[1] = images[1] + 2.0
    after = model(batch_images_to_packing_input(images, 4)[0], grid).last_hidden_state
    same = torch.cat([torch.arange(15), torch.arange(22, 50)])
    assert_close(after[same], before[same], 5e-6)
    assert not torch.allclose(after[15:22], before[15:22], atol=1e-2)


def test_frame_order_matters():
    model = small()
    clip = torch.randn(3, 4, 8, 8)
    forward = model(*batch_images_to_packing_input([clip], 4)).last_hidden_state
    backward = model(*batch_images_to_packing_input([clip.flip(1)], 4)).last_hidden_state
    assert not torch.allclose(forward, backward.view(4, 4, 64).flip(0).reshape(16, 64), atol=1e-3)


def test_bf16_error_at_most_twice_the_references_own(golden, golden_case):
    case = golden_case("llava_vit", "images")
    error = {}
    for backend in ("eager", "sdpa"):
        model = LlavaViTPackingModel.from_pretrained(
            golden / "llava_vit", dtype=torch.bfloat16, attn_implementation=backend
        )
        out = model(case["patches"], case["grid_thw"]).last_hidden_state
        assert out.dtype == torch.bfloat16
        error[backend] = (out.float() - case["last_hidden_state"]).abs().max().item()
    assert 0 < error["sdpa"] <= 2 * error["eager"]


def test_rotary_tables_stay_float32_in_a_cast_model(golden, golden_case):
    """Far positions (t up to 63, fractions) turn by whole radians if the frequencies were rounded to bfloat16."""
    model = LlavaViTPackingModel.from_pretrained(golden / "llava_vit")
    rows, grid = batch_images_to_packing_input(ragged(), 4)
    seen = []
    handle = model.encoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[2]))
    positions = torch.rand(rows.shape[0], 3) * 63
    for _ in range(2):
        model(rows, grid, positions)
        model.to(torch.bfloat16)
    handle.remove()
    (cos, sin), (cos_cast, sin_cast) = seen
    assert cos_cast.dtype == torch.float32
    assert torch.equal(cos, cos_cast) and torch.equal(sin, sin_cast)
    assert not list(model.buffers())


def test_wrong_pairing_would_be_seen(golden, golden_case, monkeypatch):
    """The half-split rotation in place of neighbouring pairs moves the golden case far beyond the tolerance."""
    from llava_packing_tower.kernels import rotary
    from llava_packing_tower.models import layers

    monkeypatch.setitem(layers.ROTATE, "interleaved", rotary.rotate_half)
    case = golden_case("llava_vit", "images")
    out = LlavaViTPackingModel.from_pretrained(golden / "llava_vit")(case["patches"], case["grid_thw"])
    assert (out.last_hidden_state - case["last_hidden_state"]).abs().max() > 0.1


def test_gradient_checkpointing_changes_nothing():
    model = small().train()
    rows, grid = batch_images_to_packing_input(ragged(), 4)
    grads = []
    for checkpointing in (False, True):
        calls = []
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            inner = model.encoder._gradient_checkpointing_func
            model.encoder._gradient_checkpointing_func = lambda *a, _f=inner, _c=calls, **k: _c.append(1) or _f(*a, **k)
        model.zero_grad()
        model(rows, grid).last_hidden_state.square().mean().backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        assert len(calls) == (3 if checkpointing else 0)
    assert grads[0].keys() == grads[1].keys() and all(torch.equal(grads[0][k], grads[1][k]) for k in grads[0])


def test_layers_above_the_highest_wanted_are_not_run():
    model = small()
    ran = []
    for index, layer in enumerate(model.encoder.layers):
        layer.register_forward_hook(lambda *_, i=index: ran.append(i))
    model.head.register_forward_hook(lambda *_: ran.append("head"))
    rows, grid = batch_images_to_packing_input(ragged(), 4)
    assert len(model(rows, grid, feature_layers=(2,))) == 1
    assert ran == [0, 1]


def test_save_and_reload_are_bit_equal(tmp_path):
    model = small(layer_norm_type="rms_norm", layer_norm_eps=3e-5, rope_theta=500.0, use_head=False)
    model.save_pretrained(tmp_path / "m")
    again = LlavaViTPackingModel.from_pretrained(tmp_path / "m")
    assert {k: v for k, v in again.config.to_dict().items() if k in model.config.to_dict()}["rope_theta"] == 500.0
    for (name, a), (other, b) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert name == other and torch.equal(a, b)
    rows, grid = batch_images_to_packing_input(ragged(), 4)
    assert torch.equal(model(rows, grid).last_hidden_state, again(rows, grid).last_hidden_state)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["m"]


def test_sharded_and_pickled_checkpoints_load(tmp_path):
    model = small()
    model.save_pretrained(tmp_path / "sharded", max_shard_size="50KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    torch.save(model.state_dict(), pickled / "pytorch_model.bin")
    (pickled / "config.json").write_text((tmp_path / "sharded" / "config.json").read_text())
    for folder in (tmp_path / "sharded", pickled):
        again = LlavaViTPackingModel.from_pretrained(folder)
        assert all(torch.equal(a, again.state_dict()[k]) for k, a in model.state_dict().items())


def test_auto_classes_load_it(tmp_path):
    from transformers import AutoConfig, AutoModel

    small().save_pretrained(tmp_path / "m")
    assert type(AutoConfig.from_pretrained(tmp_path / "m")) is LlavaViTPackingConfig
    assert type(AutoModel.from_pretrained(tmp_path / "m")) is LlavaViTPackingModel


def test_dtypes(tmp_path):
    small().to(torch.bfloat16).save_pretrained(tmp_path / "m")
    assert LlavaViTPackingModel.from_pretrained(tmp_path / "m").dtype == torch.float32
    assert LlavaViTPackingModel.from_pretrained(tmp_path / "m", dtype="auto").dtype == torch.bfloat16
    assert LlavaViTPackingModel.from_pretrained(tmp_path / "m", torch_dtype="float16").dtype == torch.float16
    with pytest.raises(ValueError, match="dtype must be"):
        LlavaViTPackingModel.from_pretrained(tmp_path / "m", dtype="int8")


def broken_folder(tmp_path, change):
    folder = tmp_path / "m"
    small().save_pretrained(folder)
    tensors, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    change(tensors, config, folder)
    if (folder / "model.safetensors").exists():
        save_file(tensors, folder / "model.safetensors")
    if (folder / "config.json").exists():
        (folder / "config.json").write_text(json.dumps(config))
    return folder


KEY = "encoder.layers.1.self_attn.qkv.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, c, f: t.pop(KEY), f"1 missing\n.*{KEY}"),
        (lambda t, c, f: t.update({"surprise.weight": torch.zeros(2)}), r"1 unexpected\n.*surprise.weight"),
        (lambda t, c, f: t.update({KEY: torch.zeros(64, 64)}), rf"1 mis-shaped\n.*{KEY}.*\(64, 64\).*\(192, 64\)"),
        (lambda t, c, f: c.update(num_hidden_layers=4), "12 missing"),
        (lambda t, c, f: c.update(model_type="clip"), "model_type 'clip'"),
        (lambda t, c, f: (f / "config.json").unlink(), "LlavaViT checkpoint without config.json"),
        (lambda t, c, f: (f / "model.safetensors").unlink(), "no model.safetensors"),
    ],
)
def test_folders_that_do_not_fit_are_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        LlavaViTPackingModel.from_pretrained(broken_folder(tmp_path, change))


def test_truncated_weights_and_missing_folder(tmp_path):
    folder = tmp_path / "m"
    small().save_pretrained(folder)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"cannot read .*model\.safetensors"):
        LlavaViTPackingModel.from_pretrained(folder)
    with pytest.raises(ValueError, match="does not exist"):
        LlavaViTPackingModel.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="neither a local folder nor a hub id"):
        LlavaViTPackingModel.from_pretrained("nobody/no-such-model")


def test_a_failed_save_leaves_nothing(tmp_path, monkeypatch):
    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("huggingface_hub.save_torch_state_dict", full_disk)
    with pytest.raises(OSError, match="No space left"):
        small().save_pretrained(tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_bad_inputs():
    model = small()
    rows, grid = batch_images_to_packing_input(ragged(), 4)
    with pytest.raises(ValueError, match=r"\[N, 48\].*patch size 4.*channel_first.*got \[50, 47\]"):
        model(rows[:, :-1], grid)
    with pytest.raises(ValueError, match=r"describes 50 patches.*has 49 rows"):
        model(rows[:-1], grid)
    with pytest.raises(ValueError, match=r"patch_positions must be \[50, 3\], got \[49, 3\]"):
        model(rows, grid, torch.zeros(49, 3))
    # 49 rows of 768 regroup into 64 rows of 588: the original took them silently
    with pytest.raises(ValueError, match="588"):
        small(patch_size=14)(torch.zeros(49, 768), torch.tensor([[1, 7, 7]]))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (dict(hidden_size=96), "head width 48"),
        (dict(hidden_size=65), "65 is not a multiple of 2"),
        (dict(layer_norm_type="batch_norm"), "unknown norm 'batch_norm'"),
        (dict(hidden_act="gelllu"), "unknown activation 'gelllu'"),
        (dict(attention_dropout=1.5), "attention_dropout must be a probability"),
    ],
)
def test_bad_configs(overrides, message):
    with pytest.raises(ValueError, match=message):
        small(**overrides)


def test_unpatchify_is_the_inverse_on_the_golden_clip(golden_case):
    case = golden_case("llava_vit", "video8")
    assert torch.equal(unpatchify(case["patches"], case["grid_thw"], 4)[0], case["pixels.0"])


def test_training_after_inference():
    """Nothing that inference mode made and kept is in the way of a later backward."""
    model = small()
    rows, grid = batch_images_to_packing_input(ragged(), 4)
    with torch.inference_mode():
        before = model(rows, grid).last_hidden_state.clone()
    out = model(rows, grid)
    (out.last_hidden_state.sum() + out.pooler_output.sum()).backward()
    assert torch.equal(out.last_hidden_state, before) and model.patch_embed.proj.weight.grad is not None
