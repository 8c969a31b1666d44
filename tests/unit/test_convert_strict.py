"""`llava-packing convert`: what does not fit is refused, with a table; names are checked against the weights."""

import json
import os

import pytest
import torch
from conversions import SIZES, change_weights, config_of, packing_folder, same_bits, source_state_dict, standard_folder
from safetensors.torch import load_file

from llava_packing_tower.cli.main import main


@pytest.fixture
def standard(tmp_path):
    return standard_folder(tmp_path / "standard")


def convert(*args):
    return main(["convert", *map(str, args), "--no-verify"])


# -------------------------------------------------------------------- strict


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda t: t.pop("encoder.layers.1.self_attn.k_proj.weight"),
            ("missing", "encoder.layers.1.self_attn.qkv.weight"),
        ),
        (lambda t: t.update({"decoder.weight": torch.zeros(2, 3)}), ("unexpected", "decoder.weight")),
        (
            lambda t: t.update({"layernorm_pre.bias": torch.zeros(63)}),
            ("mis-shaped", "layernorm_pre.bias", "(63,)", "(64,)"),
        ),
        (
            lambda t: t.update({"layernorm_pre.bias": torch.zeros(64, dtype=torch.int32)}),
            ("wrong dtype", "layernorm_pre.bias"),
        ),
        (lambda t: t.pop("head.probe"), ("missing", "head.probe")),
    ],
)
def test_tensors_that_do_not_fit_are_a_table_and_no_output(standard, tmp_path, capsys, change, words):
    change_weights(standard, change)
    assert convert(standard, "--output_dir", tmp_path / "out") == 2
    text = capsys.readouterr().err
    for word in words:
        assert word in text
    assert os.listdir(tmp_path) == ["standard"]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"hidden_size": 128}, ("mis-shaped", "patch_embed.proj.weight")),
        ({"num_hidden_layers": 4}, ("missing", "encoder.layers.3.")),
        ({"num_hidden_layers": 2}, ("unexpected", "encoder.layers.2.")),
        ({"num_hidden_layers": 10**9}, ("config has 1000000000 layers",)),
        ({"num_attention_heads": 4}, ("head width 16",)),
        ({"num_attention_heads": 3}, ("not a multiple of 3 heads",)),
        ({"hidden_size": "wide"}, ("hidden_size in its config is 'wide'",)),
        ({"hidden_size": -64}, ("ERROR",)),
        ({"layer_norm_type": "batch_norm"}, ("batch_norm",)),
        ({"use_head": False}, ("unexpected", "head.probe", "layernorm_post.weight")),
        ({"attention_dropout": 1.5}, ("attention_dropout",)),
        ({"model_type": "clip"}, ("clip", "llava_vit")),
    ],
)
def test_a_config_that_claims_something_else(standard, tmp_path, capsys, fields, words):
    (standard / "config.json").write_text(json.dumps({**config_of(standard), **fields}))
    assert convert(standard, "--output_dir", tmp_path / "out") == 2
    text = capsys.readouterr().err
    for word in words:
        assert word in text
    assert os.listdir(tmp_path) == ["standard"]


def test_frequency_tables_are_left_out_by_name(standard, tmp_path, capsys):
    change_weights(standard, lambda tensors: tensors.update({"video_rope.inv_freq_t": torch.zeros(4)}))
    assert convert(standard, "--output_dir", tmp_path / "out") == 0
    assert "left out (rotary frequencies, computed from rope_theta): video_rope.inv_freq_t" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "conversion.json").read_text())["left_out"].keys() == {
        "video_rope.inv_freq_t"
    }


def test_mixed_dtypes_need_a_choice(standard, tmp_path, capsys):
    change_weights(standard, lambda t: t.update({"layernorm_pre.bias": t["layernorm_pre.bias"].bfloat16()}))
    assert convert(standard, "--output_dir", tmp_path / "out") == 2
    assert (
        "62 tensors float32" in (text := capsys.readouterr().err) and "1 tensors bfloat16" in text and "--dtype" in text
    )
    assert convert(standard, "--output_dir", tmp_path / "out", "--dtype", "float32") == 0


# -------------------------------------------------------------------- names


def huge_like(tmp_path, hidden, layers, mlp):
    """A training file in which a model shows its sizes, and most of the tensors are missing."""
    tensors = {
        "conv1.weight": torch.zeros(hidden, 3, 14, 14),
        "ln_pre.bias": torch.zeros(hidden),
        f"transformer.layers.{layers - 1}.mlp.0.weight": torch.zeros(mlp, 1).expand(mlp, hidden),
        **{f"transformer.layers.{i}.ln_1.weight": torch.zeros(hidden) for i in range(layers)},
    }
    torch.save(tensors, tmp_path / "backbone.pt")
    return tmp_path / "backbone.pt"


def test_the_standard_huge_preset_does_not_fit_older_weights(tmp_path, capsys):
    file = huge_like(tmp_path, 1280, 32, 5120)
    assert convert(file, "--model_name", "hf_llava_vit_huge_ln") == 2
    text = capsys.readouterr().err
    for words in (
        "hidden_size: hf_llava_vit_huge_ln has 1536, the checkpoint 1280",
        "num_hidden_layers: hf_llava_vit_huge_ln has 27, the checkpoint 32",
        "intermediate_size: hf_llava_vit_huge_ln has 4608, the checkpoint 5120",
        "hf_llava_vit_packing_huge_ln, llava_vit_huge_ln",
    ):
        assert words in text
    # The name that fits gets further: to the tensors that this file does not have.
    assert convert(file, "--model_name", "llava_vit_huge_ln") == 2
    assert "missing" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["backbone.pt"]


def test_names_are_checked_against_a_folder_too(standard, capsys, tmp_path):
    for option in ("--model_name", "--target_model_name"):
        assert convert(standard, option, "hf_llava_vit_packing_base_ln", "--output_dir", tmp_path / "out") == 2
        assert "hidden_size: hf_llava_vit_packing_base_ln has 768, the checkpoint 64" in capsys.readouterr().err
    assert convert(standard, "--model_name", "llava_vit_tiny") == 2
    assert "unknown model name 'llava_vit_tiny'; known: hf_llava_vit_base_ln" in capsys.readouterr().err
    assert convert(standard, "--target_model_name", "hf_llava_vit_base_ln") == 2
    assert "becomes a llava_vit_packing one, not hf_llava_vit_base_ln" in capsys.readouterr().err


def test_a_file_without_config_needs_the_name(standard, tmp_path, capsys):
    weights = source_state_dict(load_file(standard / "model.safetensors"))
    torch.save(weights, tmp_path / "backbone.pt")
    assert convert(tmp_path / "backbone.pt") == 2
    assert "--model_name" in (text := capsys.readouterr().err) and "llava_vit_large_ln" in text
    from llava_packing_tower.models.llava_vit.presets import PRESETS, register_preset

    register_preset("llava_vit_toy_ln", "source", **SIZES)
    try:
        assert convert(tmp_path / "backbone.pt", "--model_name", "llava_vit_toy_ln") == 0
    finally:
        del PRESETS["llava_vit_toy_ln"]
    config = config_of(tmp_path / "backbone_hf_packing")
    assert config["num_attention_heads"] == 2 and config["image_size"] == 448 and config["layer_norm_eps"] == 1e-6


def test_rms_training_checkpoint(tmp_path):
    folder = standard_folder(tmp_path / "rms", layer_norm_type="rms_norm")
    torch.save(source_state_dict(load_file(folder / "model.safetensors")), tmp_path / "rms.pt")
    assert convert(tmp_path / "rms.pt", "--num_attention_heads", 2) == 0
    same_bits(tmp_path / "rms_hf_packing", packing_folder(folder, tmp_path / "expected"))
    assert config_of(tmp_path / "rms_hf_packing")["layer_norm_type"] == "rms_norm"


def test_nothing_to_convert(standard, tmp_path, capsys):
    for options, words in (
        (("--layer_norm_eps", "1e-5"), "cannot be given"),
        (("--target_model_name", "llava_vit_base_ln"), "not converted to those"),
    ):
        assert convert(standard, *options, "--output_dir", tmp_path / "out") == 2
        assert words in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["standard"]
