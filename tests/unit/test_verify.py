"""The five tests of a conversion: a sound one passes them all, and every damage fails just those that it concerns."""

import json
import os
import re
import shutil
from functools import partial

import pytest
import torch
from conversions import change_weights, packing_folder, same_bits, standard_folder

from llava_packing_tower.checkpoint.key_map import KeyMap
from llava_packing_tower.cli.main import main
from llava_packing_tower.convert import pipeline
from llava_packing_tower.convert.pipeline import Options, verify_pair
from llava_packing_tower.convert.verify import TEST_NAMES, THRESHOLDS, compare
from llava_packing_tower.models.llava_vit import packed
from llava_packing_tower.models.llava_vit.packed import LlavaViTPackingModel


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A standard checkpoint and its sound conversion."""
    folder = tmp_path_factory.mktemp("sound")
    standard_folder(folder / "standard", num_hidden_layers=2)
    packing_folder(folder / "standard", folder / "packing")
    return folder


@pytest.fixture
def pair(sound, tmp_path):
    """A copy of them, to damage."""
    shutil.copytree(sound, tmp_path, dirs_exist_ok=True)
    return tmp_path / "standard", tmp_path / "packing"


def passed(results):
    return [result.passed for result in results]


def lines(text):
    """(name of the test, its line) of the table."""
    return {name: next(line for line in text.splitlines() if name in line and "│" in line) for name in TEST_NAMES}


@pytest.fixture(autouse=True)
def _pictures(request):
    """The first test has the real sizes."""
    if request.node.originalname != "test_a_conversion_is_verified_unless_refused":
        request.getfixturevalue("small_pictures")


# -------------------------------------------------------------------- sound checkpoints


@pytest.mark.parametrize(
    ("dtype", "threshold"), [("float32", 0.99999), pytest.param("bfloat16", 0.99, marks=pytest.mark.long)]
)
def test_a_conversion_is_verified_unless_refused(pair, tmp_path, capsys, dtype, threshold):
    out = tmp_path / "out"
    assert main(["convert", str(pair[0]), "--output_dir", str(out), "--dtype", dtype]) == 0
    text = capsys.readouterr().out
    assert f"minimum cosine above {threshold}" in text
    assert all("PASS" in line for line in lines(text).values())
    for words in ("image 448x448", "8 frames 224x224", "image 992x992", "3 frames 352x352", "2 frames 512x512"):
        assert words in text, words  # the sides are rounded down to patches of 32
    assert "verifying, standard model: image 992x992" in text  # progress
    for row in json.loads((out / "conversion.json").read_text())["verification"][:4]:
        assert threshold < row["min_cosine"] <= row["mean_cosine"] <= 1 + 1e-12
        assert 0 < row["max_difference"] < (1e-4 if dtype == "float32" else 0.5)
    assert main(["convert", str(pair[0]), "--output_dir", str(tmp_path / "quick"), "--no-verify"]) == 0
    assert "(not verified)" in capsys.readouterr().out


def test_packing_back_to_standard_is_verified_the_other_way_round(pair, tmp_path, capsys):
    assert main(["convert", str(pair[1]), "--output_dir", str(tmp_path / "back")]) == 0
    assert all("PASS" in line for line in lines(capsys.readouterr().out).values())
    same_bits(pair[0], tmp_path / "back")


def test_a_onevision_encoder_with_a_shorter_context(pair, tmp_path):
    """Its model cannot count to 64 frames, and is told the positions instead."""
    config = json.loads((pair[0] / "config.json").read_text())
    (pair[0] / "config.json").write_text(
        json.dumps({**config, "model_type": "onevision_encoder", "rope_temporal_size": 16})
    )
    assert main(["convert", str(pair[0]), "--output_dir", str(tmp_path / "out")]) == 0


# -------------------------------------------------------------------- damage, and the tests that see it


def swap_q_and_k(tensors):
    for name in [name for name in tensors if ".qkv." in name]:
        q, k, v = tensors[name].chunk(3)
        tensors[name] = torch.cat([k, q, v])


def perturb_one_layer(tensors):
    weight = tensors["encoder.layers.1.mlp.fc1.weight"]
    weight += 0.05 * weight.std() * torch.randn(weight.shape)


def damage_weights(change, pair, monkeypatch):
    change_weights(pair[1], change)


def frames_not_interpolated(pair, monkeypatch):
    prepare = LlavaViTPackingModel.prepare
    monkeypatch.setattr(
        LlavaViTPackingModel, "prepare", lambda self, tokens, grids, patch_positions: prepare(self, tokens, grids, None)
    )


def wrong_pairing(pair, monkeypatch):
    """The usual rotation of halves in place of LlavaViT's of neighbours."""
    of = packed.BlockConfig.of
    half = staticmethod(lambda config, **fields: of(config, **{**fields, "rotary": "half"}))
    monkeypatch.setattr(packed.BlockConfig, "of", half)


def saving_rounds(pair, monkeypatch):
    save = LlavaViTPackingModel.save_pretrained
    monkeypatch.setattr(LlavaViTPackingModel, "save_pretrained", lambda self, folder: save(self.half().float(), folder))


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda *_: None, "PPPPP"),
        (partial(damage_weights, swap_q_and_k), "FFFFP"),
        (partial(damage_weights, perturb_one_layer), "FFFFP"),
        (wrong_pairing, "FFFFP"),
        (frames_not_interpolated, "PFFFP"),
        (saving_rounds, "PPPPF"),
    ],
    ids=["sound", "q and k", "one layer", "pairing", "frames", "saving"],
)
def test_each_damage_fails_the_tests_that_it_concerns(pair, monkeypatch, damage, expected):
    damage(pair, monkeypatch)
    results, threshold = verify_pair(str(pair[0]), str(pair[1]), Options())
    assert threshold == 0.99999
    assert "".join("P" if result.passed else "F" for result in results) == expected, results
    assert [result.name for result in results] == list(TEST_NAMES)


def test_verify_command_says_pass_and_fail(pair, capsys):
    assert main(["verify", *map(str, pair)]) == 0
    assert "agrees with A" in (text := capsys.readouterr().out)
    assert all("PASS" in line for line in lines(text).values())
    change_weights(pair[1], swap_q_and_k)
    assert main(["verify", *map(str, pair)]) == 1
    assert "FAILED: it differs from A" in (text := capsys.readouterr().out)
    assert ["FAIL" in line for line in lines(text).values()] == [True] * 4 + [False]


@pytest.mark.parametrize("which", [0, 1])
def test_verify_of_a_checkpoint_that_cannot_be_read(pair, capsys, which):
    """No test ran, so none failed."""
    change_weights(pair[which], lambda tensors: next(iter(tensors.values())).view(-1)[:1].fill_(torch.nan))
    assert main(["verify", *map(str, pair)]) == 2
    assert re.fullmatch("ERROR: the weights of .* are damaged: NaN or infinity in .*\n", capsys.readouterr().err)
    file = pair[which] / "model.safetensors"
    os.truncate(file, file.stat().st_size // 2)
    assert main(["verify", *map(str, pair)]) == 2
    assert (text := capsys.readouterr().err).startswith(f"ERROR: cannot read {file}, it is damaged")
    assert text.count("\n") == 1


def test_verify_of_two_of_a_kind_and_in_another_dtype(pair, tmp_path):
    for a, b in ((pair[1], pair[1]), (pair[1], pair[0])):
        assert passed(verify_pair(str(a), str(b), Options())[0]) == [True] * 5
    results, threshold = verify_pair(str(pair[0]), str(pair[1]), Options(dtype="bfloat16"))
    assert threshold == 0.99 and passed(results) == [True] * 5 and results[0].max_difference > 1e-3


def test_verify_refuses_other_families(pair, golden, capsys):
    assert main(["verify", str(pair[0]), str(golden / "siglip2")]) == 2
    assert "llava-packing align" in capsys.readouterr().err


# -------------------------------------------------------------------- a conversion that went wrong


def test_a_result_that_fails_is_moved_aside(pair, tmp_path, capsys, monkeypatch):
    """A converter that fuses in another order writes what it meant to write: test 5 passes, the others do not."""
    fused = KeyMap._fused

    def wrong(match, biases):
        target, (q, k, v) = fused(match, biases)
        return target, [k, q, v]

    monkeypatch.setattr(KeyMap, "_fused", staticmethod(wrong))
    shutil.rmtree(pair[1])
    for name in ("standard_packing.failed", "standard_packing.2.failed"):
        assert main(["convert", str(pair[0])]) == 1
        text, said = capsys.readouterr()
        assert said == f"FAILED: the result differs from the source; it was moved to {tmp_path / name}\n"
        assert ["FAIL" in line for line in lines(text).values()] == [True] * 4 + [False]
    assert sorted(os.listdir(tmp_path)) == ["standard", "standard_packing.2.failed", "standard_packing.failed"]
    report = json.loads((tmp_path / name / "conversion.json").read_text())
    assert [row["passed"] for row in report["verification"]] == [False] * 4 + [True]


@pytest.mark.parametrize(("damage", "expected"), [("flip", "PPPPF"), ("truncate", "FFFFF")])
def test_what_lies_on_disk_is_what_is_verified(pair, tmp_path, capsys, monkeypatch, damage, expected):
    """One bit that flips on the way to the disk moves no cosine: test 5 sees it."""
    write = pipeline.write_conversion

    def flip(tensors):
        tensors["layernorm_pre.weight"].view(torch.int32)[7] ^= 1

    def write_and_damage(conversion, folder, step):
        report = write(conversion, folder, step)
        if damage == "flip":
            change_weights(folder, flip)
        else:
            os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size // 2)
        return report

    monkeypatch.setattr(pipeline, "write_conversion", write_and_damage)
    assert main(["convert", str(pair[0]), "--output_dir", str(tmp_path / "out")]) == 1
    text = capsys.readouterr().out
    assert "".join("P" if "PASS" in line else "F" for line in lines(text).values()) == expected
    if damage == "flip":
        row = json.loads((tmp_path / "out.failed" / "conversion.json").read_text())["verification"][4]
        assert row["note"] == "1 tensors on disk differ from the converted ones, e.g. layernorm_pre.weight"
    assert (tmp_path / "out.failed").is_dir() and not (tmp_path / "out").exists()


# -------------------------------------------------------------------- the measure itself


def test_thresholds():
    assert THRESHOLDS[torch.float32] == 0.99999 and THRESHOLDS[torch.bfloat16] == 0.99


def test_one_bad_token_or_pooled_vector_fails():
    tokens, pooled = torch.randn(50, 16), torch.randn(16)
    assert compare("x", [(tokens, pooled)], [(tokens * 1.5, pooled)], 0.99999).passed
    for where in ("token", "pooled", "nan"):
        other = tokens.clone(), pooled.clone()
        vector = other[1] if where == "pooled" else other[0][33]
        vector += 0.05 * torch.randn(16) if where != "nan" else torch.nan
        row = compare("x", [(tokens, pooled)], [other], 0.99999)
        assert row.passed is False and row.vectors == 51
        if where != "nan":
            assert row.min_cosine < 0.99999 < row.mean_cosine + 1e-3
    assert compare("x", [(tokens, pooled)], [(tokens[:49], pooled)], 0.9).passed is False
    assert compare("x", [(tokens, pooled)], [(tokens, None)], 0.9).passed is False
