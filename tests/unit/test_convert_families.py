"""`llava-packing convert` for SigLIP2, AIMv2 and DINOv3: folders in the packing layout, strict and verified too."""

import json
import os
import shutil

import pytest
import torch
import transformers
from conftest import assert_close
from conversions import change_weights, config_of
from families import GOLDEN_FAMILIES
from safetensors.torch import load_file

from llava_packing_tower import HEVCViTPackingVisionTower
from llava_packing_tower.checkpoint.key_map import KeyMap
from llava_packing_tower.cli.main import main
from llava_packing_tower.convert import pipeline, verify_against_hf
from llava_packing_tower.convert.hf_reference import IN_TRANSFORMERS, NoReference
from llava_packing_tower.data.image_processor import PackingImageProcessor

HAS_FAMILIES = all(hasattr(transformers, names.vision) for names in IN_TRANSFORMERS.values())
newest = [
    pytest.mark.newest,
    pytest.mark.skipif(not HAS_FAMILIES, reason=f"transformers {transformers.__version__} lacks the families"),
]


@pytest.fixture(params=GOLDEN_FAMILIES)
def name(request):
    return request.param


@pytest.fixture
def source(golden, tmp_path, name):
    folder = tmp_path / name
    shutil.copytree(golden / name, folder, ignore=shutil.ignore_patterns("case_*"))
    return folder


def convert(source, *options):
    return main(["convert", str(source), "--output_dir", str(source.parent / "out"), *options])


class Args:
    mm_vision_select_layer = -2


def test_golden_tensors_after_a_conversion(source, name, golden_case, capsys):
    assert convert(source, "--no-verify") == 0
    folder, case, cls = source.parent / "out", golden_case(name, "images"), GOLDEN_FAMILIES[name]
    model = cls.from_pretrained(folder)
    with torch.no_grad():
        last, states = model(case["patches"], case["grid_thw"], output_hidden_states=True)
    assert_close(last, case["last_hidden_state"])
    assert_close(torch.stack(states), case["hidden_states"])
    config = config_of(folder)
    assert config["model_type"] == cls.config_class.model_type
    original = config_of(source)
    for field in ("hidden_size", "num_hidden_layers", "hidden_act", "layer_norm_eps", "rms_norm_eps", "rope_theta"):
        assert config.get(field) == original.get(field), field
    left_out = json.loads((folder / "conversion.json").read_text())["left_out"]
    unused = {key for key in load_file(source / "model.safetensors") if "head." in key or "mask_token" in key}
    assert left_out.keys() == unused and bool(unused) == (name != "aimv2_native")
    assert ("left out (" in capsys.readouterr().out) == bool(unused)


def test_a_tower_on_the_source_gives_the_features_of_the_converted_folder(source, caplog):
    assert convert(source, "--no-verify") == 0
    converted = HEVCViTPackingVisionTower(str(source.parent / "out"), Args())
    assert "in memory" not in caplog.text
    direct = HEVCViTPackingVisionTower(str(source), Args())
    assert caplog.text.count("in memory") == 1
    side = getattr(direct.vision_tower, "fixed_side", None) or 4
    images = torch.randn(2, 3, side * direct.config.patch_size, side * direct.config.patch_size)
    assert torch.equal(converted(images), direct(images))
    assert converted.image_processor.to_dict() == direct.image_processor.to_dict()
    assert PackingImageProcessor.from_pretrained(source.parent / "out").to_dict() == direct.image_processor.to_dict()


def test_nothing_to_convert(source, name, capsys):
    assert convert(source, "--no-verify") == 0
    assert main(["convert", str(source.parent / "out")]) == 2
    packed = GOLDEN_FAMILIES[name].config_class.model_type
    assert f"is a {packed} checkpoint already: there is nothing to convert" in capsys.readouterr().err
    assert main(["convert", str(source), "--target_model_name", "llava_vit", "--output_dir", str(source / "x")]) == 2
    assert f"which becomes a {packed} one, not llava_vit" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["missing", "unexpected", "nan"])
def test_strict(source, damage, capsys):
    def change(tensors):
        key = next(key for key in sorted(tensors) if key.endswith(("fc1.weight", "gate_proj.weight", "up_proj.weight")))
        if damage == "missing":
            del tensors[key]
        elif damage == "unexpected":
            tensors["encoder.adapter.weight"] = torch.zeros(3, 2)
        else:
            tensors[key][1, 2] = torch.nan

    change_weights(source, change)
    assert convert(source, "--no-verify") == 2
    assert ("are NaN" if damage == "nan" else damage) in capsys.readouterr().err
    assert os.listdir(source.parent) == [source.name]


# -------------------------------------------------------------------- verification


def table(folder):
    return json.loads((folder / "conversion.json").read_text())["verification"]


def test_a_transformers_without_the_family_is_said_and_the_rest_tested(source, monkeypatch, capsys):
    def missing(model_type):
        raise NoReference("this transformers has none")

    monkeypatch.setattr(verify_against_hf, "require_reference", missing)
    assert convert(source) == 0
    text = capsys.readouterr().out
    assert "SKIPPED" in text and "(not compared with another model)" in text
    assert [row["passed"] for row in table(source.parent / "out")] == [None, True]
    shutil.rmtree(source.parent / "out")
    write = pipeline.write_conversion

    def flip(tensors):
        tensors[max(tensors)].view(torch.int32).flatten()[0] ^= 1

    def write_and_damage(conversion, folder, step):
        report = write(conversion, folder, step)
        change_weights(folder, flip)
        return report

    monkeypatch.setattr(pipeline, "write_conversion", write_and_damage)
    assert convert(source) == 1
    assert [row["passed"] for row in table(source.parent / "out.failed")] == [None, False]


@pytest.mark.usefixtures("small_pictures")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
class TestAgainstTransformers:
    pytestmark = newest

    def test_sound(self, source, name, dtype):
        assert convert(source, "--dtype", dtype) == 0
        rows = table(source.parent / "out")
        assert rows[-2]["name"] == "against transformers, real photos" and len(rows) >= 3
        assert all(row["passed"] for row in rows) and rows[-1]["max_difference"] == 0
        assert min(row["min_cosine"] for row in rows) > (0.99999 if dtype == "float32" else 0.99)

    def test_swapped_q_and_k(self, source, name, dtype, monkeypatch, capsys):
        fused = KeyMap._fused

        def wrong(match, biases):
            target, keys = fused(match, biases)
            return target, [keys[1], keys[0], *keys[2:]] if len(keys) == 3 else keys

        monkeypatch.setattr(KeyMap, "_fused", staticmethod(wrong))
        assert convert(source, "--dtype", dtype) == 1
        assert "moved to" in capsys.readouterr().err
        rows = table(source.parent / "out.failed")
        assert not any(row["passed"] for row in rows[:-1]) and rows[-1]["passed"]
