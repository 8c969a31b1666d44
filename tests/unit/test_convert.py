"""`llava-packing convert`: every kind of source, the golden tensors, strictness, names. (Verification: test_verify.)"""

import json
import os
import shutil

import pytest
import torch
from conftest import assert_close
from conversions import config_of, packing_folder, same_bits, source_state_dict, standard_folder
from safetensors.torch import load_file, save_file

from llava_packing_tower import HEVCViTPackingVisionTower, LlavaViTPackingModel
from llava_packing_tower.cli.main import main
from llava_packing_tower.convert.writer import TensorSpec, shards_of, write_weights
from llava_packing_tower.data.image_processor import CLIP_MEAN, CLIP_STD, PackingImageProcessor
from llava_packing_tower.models.llava_vit.standard import LlavaViTModel


@pytest.fixture
def standard(tmp_path):
    return standard_folder(tmp_path / "standard")


def convert(*args):
    return main(["convert", *map(str, args), "--no-verify"])


# -------------------------------------------------------------------- golden tensors


def check_case(folder, case):
    model = LlavaViTPackingModel.from_pretrained(folder)
    with torch.no_grad():
        out = model(case["patches"], case["grid_thw"], case.get("patch_positions"), output_hidden_states=True)
    assert_close(out.last_hidden_state, case["last_hidden_state"])
    if "hidden_states" in case:
        assert_close(torch.stack(out.hidden_states), case["hidden_states"])
    if "pooler_output" in case:
        assert_close(out.pooler_output, case["pooler_output"])


@pytest.mark.parametrize(
    ("folder", "cases"),
    [
        ("llava_vit", ("images", "video8", "video8_default_positions", "mixed", "free_positions")),
        ("llava_vit_variant", ("images",)),
    ],
)
def test_golden_standard(golden, golden_case, tmp_path, folder, cases):
    packing_folder(golden / folder, tmp_path / "packing")
    for case in cases:
        check_case(tmp_path / "packing", golden_case(folder, case))
    config, source = config_of(tmp_path / "packing"), config_of(golden / folder)
    for name in set(source) - {"architectures", "model_type", "transformers_version"}:
        assert config[name] == source[name], name
    assert config["model_type"] == "llava_vit_packing"


def test_golden_keys_and_config(golden, tmp_path):
    packing_folder(golden / "llava_vit", tmp_path / "packing")
    expected = json.loads((golden / "llava_vit" / "expected_packing_keys.json").read_text())["packing"]
    found = load_file(tmp_path / "packing" / "model.safetensors")
    assert {name: list(tensor.shape) for name, tensor in found.items()} == expected
    fields = json.loads((golden / "llava_vit" / "packing_config.json").read_text())
    config = config_of(tmp_path / "packing")
    assert {name: config[name] for name in fields} == fields


def test_golden_onevision(golden, golden_case, tmp_path):
    source = tmp_path / "onevision_encoder"
    source.mkdir()
    shutil.copy(golden / "onevision_encoder" / "config.json", source)
    shutil.copy(golden / "llava_vit" / "model.safetensors", source)
    assert convert(source) == 0  # beside the source
    folder = tmp_path / "onevision_encoder_packing"
    check_case(folder, golden_case("onevision_encoder", "image"))
    case = golden_case("onevision_encoder", "video")
    check_case(folder, case)
    del case["patch_positions"]
    case["last_hidden_state"] = case["last_hidden_state_no_positions"]
    case["pooler_output"] = case["pooler_output_no_positions"]
    check_case(folder, case)
    assert "rope_temporal_size" not in config_of(folder)


def test_golden_training_checkpoint(golden, golden_case, tmp_path):
    """As a bare .safetensors, and wrapped in a .pt the way training scripts do; heads by argument or config.json."""
    weights = load_file(golden / "timm_source" / "model.safetensors")
    case = golden_case("timm_source", "mixed")
    expected = json.loads((golden / "timm_source" / "config.json").read_text())["packing_keys"]
    wrapped = {"state_dict": {f"module.{name}": tensor for name, tensor in weights.items()}, "epoch": 7}
    torch.save(wrapped, tmp_path / "backbone.pt")
    save_file(weights, tmp_path / "bare.safetensors")
    torch.save(
        {"model": weights, "optimizer": {"state": {}}}, tmp_path / "old.pth", _use_new_zipfile_serialization=False
    )
    for name in ("backbone.pt", "bare.safetensors", "old.pth"):
        assert convert(tmp_path / name, "--num_attention_heads", 1) == 0
        folder = tmp_path / f"{name.split('.')[0]}_hf_packing"
        check_case(folder, case)
        found = load_file(folder / "model.safetensors")
        assert {key: list(tensor.shape) for key, tensor in found.items()} == expected
    assert convert(golden / "timm_source", "--output_dir", tmp_path / "told") == 0
    same_bits(tmp_path / "told", tmp_path / "bare_hf_packing")
    assert config_of(tmp_path / "told")["num_attention_heads"] == 1


def test_training_checkpoint_with_its_own_eps(golden, golden_case, tmp_path):
    """--layer_norm_eps 1e-5 is what the training code computed with; the default is that of published conversions."""
    case = golden_case("timm_source", "mixed")
    case["last_hidden_state"] = case["source_visible_embeddings"]
    case["pooler_output"] = case["source_head_output"]
    for eps, fits in (("1e-5", True), (None, False)):
        out = tmp_path / f"eps{eps}"
        options = ["--layer_norm_eps", eps] if eps else []
        assert convert(golden / "timm_source", "--output_dir", out, *options) == 0
        if fits:
            check_case(out, case)
        else:
            with pytest.raises(AssertionError, match=r"largest difference 4\.8"):
                check_case(out, case)


# -------------------------------------------------------------------- there and back


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fields", [{}, {"use_head": False, "layer_norm_type": "rms_norm", "hidden_act": "silu"}])
def test_standard_to_packing_and_back_is_bit_equal(tmp_path, dtype, fields):
    told = {"layer_norm_eps": 3e-5, "rope_theta": 777.0, "image_size": 160, **fields}
    source = standard_folder(tmp_path / "hevc.vit", dtype, **told)
    assert convert(source) == 0
    packing = tmp_path / "hevc.vit_packing"
    assert convert(packing) == 0
    same_bits(source, tmp_path / "hevc.vit_packing_standard")
    for folder in (packing, tmp_path / "hevc.vit_packing_standard"):
        config = config_of(folder)
        assert {name: config[name] for name in told} == told
        assert config["dtype"] == str(dtype).removeprefix("torch.")
    assert convert(tmp_path / "hevc.vit_packing_standard", "--output_dir", tmp_path / "again") == 0
    same_bits(packing, tmp_path / "again")


def test_training_checkpoint_becomes_standard_too(standard, tmp_path):
    weights = load_file(standard / "model.safetensors")
    save_file(source_state_dict(weights), tmp_path / "backbone.safetensors")
    options = ("--num_attention_heads", 2)
    assert convert(tmp_path / "backbone.safetensors", *options, "--target_model_name", "llava_vit") == 0
    same_bits(tmp_path / "backbone_standard", standard)
    assert convert(tmp_path / "backbone.safetensors", *options) == 0
    packing_folder(standard, tmp_path / "packing")
    same_bits(tmp_path / "backbone_hf_packing", tmp_path / "packing")


def test_packing_becomes_onevision(standard, tmp_path):
    packing_folder(standard, tmp_path / "packing")
    assert (
        convert(tmp_path / "packing", "--target_model_name", "onevision_encoder", "--output_dir", tmp_path / "ov") == 0
    )
    same_bits(tmp_path / "ov", standard)
    assert config_of(tmp_path / "ov")["rope_temporal_size"] == 64
    assert LlavaViTModel.from_pretrained(tmp_path / "ov").config.model_type == "onevision_encoder"


@pytest.mark.parametrize("kind", ["standard", "packing"])
def test_single_files_of_the_other_spellings(standard, tmp_path, kind):
    folder = standard if kind == "standard" else packing_folder(standard, tmp_path / "packing")
    torch.save(load_file(folder / "model.safetensors"), tmp_path / "weights.pth")
    assert convert(tmp_path / "weights.pth", "--num_attention_heads", 2, "--output_dir", tmp_path / "out") == 0
    other = packing_folder(standard, tmp_path / "other") if kind == "standard" else standard
    same_bits(tmp_path / "out", other)


def test_dtype_is_rounded_once(standard, tmp_path):
    packing_folder(standard, tmp_path / "kept")
    packing_folder(standard, tmp_path / "rounded", "--dtype", "bfloat16")
    kept = load_file(tmp_path / "kept" / "model.safetensors")
    for name, tensor in load_file(tmp_path / "rounded" / "model.safetensors").items():
        assert torch.equal(tensor, kept[name].bfloat16())


def test_sharded_and_pickled_sources(standard, tmp_path):
    packing_folder(standard, tmp_path / "expected")
    model = LlavaViTModel.from_pretrained(standard)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    (tmp_path / "pickled").mkdir()
    shutil.copy(standard / "config.json", tmp_path / "pickled")
    torch.save(model.state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
    for name in ("sharded", "pickled"):
        same_bits(packing_folder(tmp_path / name, tmp_path / f"{name}_out"), tmp_path / "expected")


def test_large_output_is_sharded_as_transformers_does(tmp_path):
    tensors = {f"t{i}": torch.randn(10, 10 + i) for i in range(5)} | {"narrow": torch.randn(3).bfloat16()}
    specs = {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    files = shards_of(specs, 1000)
    assert len(files) == 3 and "model-00001-of-00003.safetensors" in files
    write_weights(tmp_path, specs, tensors.__getitem__, 1000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in tensors.values())
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], tensors[name])


# -------------------------------------------------------------------- image processor


def test_image_processor_is_carried_over_or_made(standard, tmp_path):
    packing_folder(standard, tmp_path / "made")
    made = PackingImageProcessor.from_pretrained(tmp_path / "made")
    assert made.size == {"shortest_edge": 448} and made.crop_size == {"height": 448, "width": 448}
    assert made.image_mean == list(CLIP_MEAN) and made.image_std == list(CLIP_STD) and made.resample == 3
    small = standard_folder(tmp_path / "small", image_size=96)
    assert PackingImageProcessor.from_pretrained(packing_folder(small, tmp_path / "small_out")).size == {
        "shortest_edge": 96
    }
    content = {
        "size": {"shortest_edge": 320},
        "crop_size": {"height": 320, "width": 256},
        "image_mean": [0.5, 0.4, 0.3],
    }
    (standard / "preprocessor_config.json").write_text(json.dumps(content))
    carried = PackingImageProcessor.from_pretrained(packing_folder(standard, tmp_path / "carried"))
    assert carried.size == {"shortest_edge": 320} and carried.crop_size == {"height": 320, "width": 256}
    assert carried.image_mean == [0.5, 0.4, 0.3] and carried.image_std == list(CLIP_STD)


# -------------------------------------------------------------------- in memory


class Args:
    mm_vision_select_layer = -1


@pytest.mark.parametrize("kind", ["llava_vit", "onevision_encoder"])
def test_a_tower_on_the_source_gives_the_features_of_the_converted_folder(standard, tmp_path, caplog, kind):
    if kind == "onevision_encoder":
        config = {**config_of(standard), "model_type": kind, "rope_temporal_size": 64}
        (standard / "config.json").write_text(json.dumps(config))
    folder = packing_folder(standard, tmp_path / "packing")
    images = [torch.randn(3, 64, 96), torch.randn(3, 32, 160)]
    expected = HEVCViTPackingVisionTower(str(folder), Args())(images)
    assert "converted" not in caplog.text
    found = HEVCViTPackingVisionTower(str(standard), Args())(images)
    assert all(torch.equal(a, b) for a, b in zip(found, expected))
    assert caplog.text.count(f"a {kind} checkpoint, converted to llava_vit_packing in memory") == 1


# -------------------------------------------------------------------- the source is not touched, the output is whole


def tree(folder):
    return {
        path.relative_to(folder): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_source_is_not_touched_and_nothing_else_is_left(standard, tmp_path):
    before = tree(standard)
    assert convert(standard) == 0
    assert tree(standard) == before
    assert sorted(os.listdir(tmp_path)) == ["standard", "standard_packing"]
    expected = ["config.json", "conversion.json", "model.safetensors", "preprocessor_config.json"]
    assert sorted(os.listdir(tmp_path / "standard_packing")) == expected


def test_an_empty_output_folder_is_filled_a_full_one_refused(standard, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    assert convert(standard, "--output_dir", tmp_path / "out") == 0
    before = tree(tmp_path / "out")
    assert convert(standard, "--output_dir", tmp_path / "out") == 2
    assert "is not empty" in capsys.readouterr().err
    assert tree(tmp_path / "out") == before
    assert convert(standard, "--output_dir", standard) == 2
