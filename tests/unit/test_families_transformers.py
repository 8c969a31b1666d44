"""The packed encoders against transformers' own models, for checkpoints that transformers itself writes here.

Needs a transformers that has the families; `make test` runs this file a second time, in an environment that does.
"""

import contextlib
import io
import itertools
import json

import pytest
import torch
import transformers
from conftest import assert_close
from families import pack, ragged
from safetensors.torch import load_file, save_file

from llava_packing_tower.checkpoint.weights import WeightFiles
from llava_packing_tower.cli.main import main
from llava_packing_tower.convert.hf_reference import IN_TRANSFORMERS, Reference
from llava_packing_tower.data.patches import split_packed
from llava_packing_tower.data.segments import read_grid
from llava_packing_tower.models.registry import family_for
from llava_packing_tower.utils.files import CONFIG_NAME, read_json

HAS_FAMILIES = all(hasattr(transformers, names.vision) for names in IN_TRANSFORMERS.values())
newest = [
    pytest.mark.newest,
    pytest.mark.skipif(not HAS_FAMILIES, reason=f"transformers {transformers.__version__} lacks the families"),
]

SIGLIP2 = dict(hidden_size=96, intermediate_size=112, num_hidden_layers=3, num_attention_heads=2, num_patches=49)
AIMV2 = dict(hidden_size=96, intermediate_size=112, num_hidden_layers=3, num_attention_heads=2, image_size=112)
DINOV3 = dict(hidden_size=96, intermediate_size=112, num_hidden_layers=3, num_attention_heads=3, image_size=112)
AIMV2_TEXT = dict(hidden_size=32, intermediate_size=40, num_hidden_layers=1, num_attention_heads=2, vocab_size=50)
SIGLIP2_TEXT = {**AIMV2_TEXT, "bos_token_id": 48, "eos_token_id": 49, "projection_size": 96}
OTHER_BIASES = dict(query_bias=False, key_bias=True, value_bias=False, proj_bias=False, mlp_bias=False)

# model class, config class, options
VARIANTS = {
    "siglip2": ("Siglip2VisionModel", "Siglip2VisionConfig", SIGLIP2),
    "siglip2_head96": ("Siglip2VisionModel", "Siglip2VisionConfig", {**SIGLIP2, "num_attention_heads": 1}),
    "siglip2_full": ("Siglip2Model", "Siglip2Config", {"vision_config": SIGLIP2, "text_config": SIGLIP2_TEXT}),
    "aimv2_native": ("Aimv2VisionModel", "Aimv2VisionConfig", {**AIMV2, "is_native": True, "use_head": False}),
    "aimv2_learned": ("Aimv2VisionModel", "Aimv2VisionConfig", {**AIMV2, "is_native": False, "use_head": True}),
    "aimv2_lit": (
        "Aimv2Model",
        "Aimv2Config",
        {
            "vision_config": {**AIMV2, "qkv_bias": True, "mlp_bias": True, "num_attention_heads": 1},
            "text_config": {**AIMV2_TEXT, "eos_token_id": 49},
            "projection_dim": 16,
        },
    ),
    "dinov3": ("DINOv3ViTModel", "DINOv3ViTConfig", {**DINOV3, "num_register_tokens": 4}),
    "dinov3_gated": (
        "DINOv3ViTModel",
        "DINOv3ViTConfig",
        {**DINOV3, **OTHER_BIASES, "num_register_tokens": 2, "use_gated_mlp": True, "hidden_act": "silu"},
    ),
    "dinov3_no_registers_head96": (
        "DINOv3ViTModel",
        "DINOv3ViTConfig",
        {**DINOV3, "num_attention_heads": 1, "key_bias": True, "layer_norm_eps": 1e-3, "rope_theta": 50.0},
    ),
    "dinov3_no_bias": (
        "DINOv3ViTModel",
        "DINOv3ViTConfig",
        {**DINOV3, "query_bias": False, "value_bias": False, "num_register_tokens": 1},
    ),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """``checkpoint("dinov3")`` -> a folder that transformers wrote, with weights that make every part visible."""
    made = {}

    def make(name):
        if name not in made:
            model_name, config_name, options = VARIANTS[name]
            options = (
                {**options, "vision_config": {**options["vision_config"], "patch_size": 28}}
                if ("vision_config" in options)
                else {**options, "patch_size": 28}
            )
            torch.manual_seed(len(name))
            model = getattr(transformers, model_name)(getattr(transformers, config_name)(**options))
            with torch.no_grad():
                for key, parameter in model.named_parameters():
                    around = 1.0 if parameter.dim() == 1 and ("norm" in key or "lambda" in key) else 0.0
                    around = 0.0 if key.endswith("bias") else around
                    spread = 0.8 * max(parameter[0].numel(), 1) ** -0.5 if parameter.dim() > 1 else 0.3
                    parameter.copy_(around + torch.randn_like(parameter) * spread)
            made[name] = tmp_path_factory.mktemp(name)
            model.save_pretrained(made[name])
        return made[name]

    return make


def packed_and_reference(folder):
    family = family_for(read_json(folder / CONFIG_NAME)["model_type"])
    model = family.from_pretrained(folder, attn_implementation="sdpa")
    return model, Reference(family.config_class.model_type, folder, torch.float32)


@pytest.mark.parametrize("name", VARIANTS)
class TestAgainstTransformers:
    pytestmark = newest

    def test_forward_and_hidden_states(self, checkpoint, name):
        model, reference = packed_and_reference(checkpoint(name))
        images = ragged(model, ((3, 5), (1, 7), (9, 8), (3, 5)))
        rows, grid = pack(model, images)
        with torch.no_grad():
            last, states = model(rows, grid, output_hidden_states=True)
            for i, image in enumerate(images):
                assert_close(split_packed(last, read_grid(grid))[i], reference(image))
                mine = torch.stack([split_packed(state, read_grid(grid))[i] for state in states])
                assert_close(mine, reference.hidden_states(image))

    def test_parameter_gradients(self, checkpoint, tmp_path, name):
        """One ragged packed backward equals transformers' backward image by image, to 1e-4 relative per tensor."""
        folder = checkpoint(name)
        model, reference = packed_and_reference(folder)
        images = ragged(model, ((3, 5), (1, 7), (9, 8), (3, 5)))
        rows, grid = pack(model, images)
        weights = [torch.randn(len(part), model.config.hidden_size) for part in rows.split([h * w for _, h, w in grid])]
        outputs = split_packed(model(rows, grid), read_grid(grid))
        sum((out * w).sum() for out, w in zip(outputs, weights)).backward()
        sum((reference(image) * w).sum() for image, w in zip(images, weights)).backward()

        # transformers writes its gradients as a checkpoint: the names on disk are those that our plan reads.
        with torch.no_grad():
            for parameter in reference.model.parameters():
                parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
        reference.model.save_pretrained(tmp_path)
        source, files = read_json(tmp_path / CONFIG_NAME), WeightFiles(tmp_path)
        tensors = {key: files[key] for key in files.shapes()}
        plan = model.plan_from_source(source, model.config, {key: tuple(t.shape) for key, t in tensors.items()})
        for key, parameter in model.named_parameters():
            recipe = plan.recipes[key]
            expected = recipe.build(*(tensors[source] for source in recipe.sources))
            assert parameter.grad is not None and expected.norm() > 0, key
            assert (parameter.grad - expected).norm() <= 1e-4 * expected.norm(), key

    def test_align_passes(self, checkpoint, capsys, name):
        assert main(["align", "--ckpt", str(checkpoint(name)), "--device", "cpu", "--image_size", "112"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[-1] == "ALL TESTS PASSED"
        assert sum(line.endswith("PASS") for line in lines) == (1 if name in ("aimv2_learned", "aimv2_lit") else 2)


def align(*arguments):
    """Exit status and printed lines of `llava-packing align` on the CPU."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        status = main(["align", "--device", "cpu", *map(str, arguments)])
    return status, output.getvalue().splitlines()


WORDS = {
    "nan": "NaN or infinity in",
    "missing": "missing",
    "truncated": "it is damaged",
}  # of checkpoints that cannot be used


class TestAlign:
    pytestmark = newest

    @pytest.mark.parametrize("name", ["siglip2_full", "aimv2_native", "aimv2_lit", "dinov3"])
    def test_all_rows_in_bfloat16_with_photos(self, checkpoint, tmp_path, name):
        """Ten photos at ten sizes; for learned positions all of the one size that there is, and no mixed pack."""
        pytest.importorskip("skimage", reason="the photographs come with scikit-image")
        file, low = tmp_path / "rows.json", ("--dtype", "bfloat16")
        status, lines = align("--ckpt", checkpoint(name), *low, "--use_real_images", "--json", file)
        assert status == 0 and lines[-1] == "ALL TESTS PASSED", lines
        rows = json.loads(file.read_text())
        singles = ["112x112"] if name == "aimv2_lit" else ["224x224", "336x336", "448x448"]
        names = [*singles, *([] if name == "aimv2_lit" else ["mixed pack"]), "real photos"]
        assert [row["name"] for row in rows] == names == [line.split("  ")[0] for line in lines if "PASS" in line][:-1]
        assert [row["images"] for row in rows] == [2] * len(singles) + [4] * (len(names) - len(singles) - 1) + [10]
        assert all(0.99 <= row["min_cosine"] <= row["mean_cosine"] < 1 and row["passed"] for row in rows)
        assert all(0 < row["max_difference"] <= row["allowed_difference"] < 1 for row in rows)
        assert rows[-1]["tokens"] == 160 if name == "aimv2_lit" else rows[-1]["tokens"] % 10

    def test_family_is_checked(self, checkpoint, capsys):
        small = ("--image_size", "28", "--family")
        assert align("--ckpt", checkpoint("dinov3"), *small, "dinov3")[0] == 0
        assert align("--ckpt", checkpoint("dinov3"), *small, "aimv2")[0] == 2
        assert "dinov3_vit checkpoint, which is not of the family 'aimv2'" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (
                ("--image_size", "100"),
                "image_size 100 is not a multiple of 28, the side of a patch or a cell of them; nearest: 84, 112",
            ),
            (("--batch_size", "0"), "must be at least 1"),
            (("--attention", "flash_attention_2", "--image_size", "28"), "flash-attn"),
        ],
    )
    def test_options_that_cannot_be(self, checkpoint, capsys, options, message):
        assert align("--ckpt", checkpoint("dinov3"), *options)[0] == 2
        assert message in capsys.readouterr().err

    def test_threshold(self, checkpoint):
        status, lines = align("--ckpt", checkpoint("siglip2"), "--image_size", "28", "--threshold", "1.1")
        assert status == 1 and lines[-1] == "SOME TESTS FAILED" and lines[-2].endswith("FAIL")

    @pytest.mark.parametrize(
        ("name", "damage"),
        [
            *itertools.product(["siglip2", "aimv2_native", "aimv2_learned", "dinov3_gated"], ["swapped", "layer"]),
            *itertools.product(["siglip2"], ["nan", "missing", "truncated"]),
        ],
    )
    def test_damaged_packing_checkpoint(self, checkpoint, tmp_path, capsys, name, damage):
        """A converted folder against its original: it fails whatever is wrong with it."""
        source, folder = checkpoint(name), tmp_path / "packing"
        family_for(read_json(source / CONFIG_NAME)["model_type"]).from_pretrained(source).save_pretrained(folder)
        assert align("--ckpt", source, "--packed", folder, "--image_size", "112")[0] == 0
        file = folder / "model.safetensors"
        tensors = load_file(file)
        qkv = "encoder.layers.1.self_attn.qkv.weight"
        if damage == "swapped":
            q, k, v = tensors[qkv].chunk(3)
            tensors[qkv] = torch.cat([v, q, k])
        elif damage == "nan":
            tensors[qkv][0, 0] = torch.nan
        elif damage == "layer":
            tensors["encoder.layers.2.mlp.fc2.weight"] += 0.05 * torch.randn(96, 112)
        elif damage == "missing":
            del tensors[qkv]
        save_file(tensors, file)
        if damage == "truncated":
            file.write_bytes(file.read_bytes()[:-100])
        report = tmp_path / "rows.json"
        status, lines = align("--ckpt", source, "--packed", folder, "--image_size", "112", "--json", report)
        if damage in WORDS:  # refused before anything is compared
            said = capsys.readouterr().err
            assert status == 2 and WORDS[damage] in said and lines == [] and not report.exists()
        else:
            assert status == 1 and lines[-1] == "SOME TESTS FAILED" and any("FAIL" in line for line in lines[:-1])

    @pytest.mark.parametrize("damage", ["missing", "truncated"])
    def test_damaged_original(self, checkpoint, tmp_path, capsys, damage):
        """transformers itself would fill the gap with random numbers."""
        source = checkpoint("siglip2")
        tensors = load_file(source / "model.safetensors")
        if damage == "missing":
            del tensors[next(key for key in tensors if key.endswith("encoder.layers.0.mlp.fc1.weight"))]
        (tmp_path / CONFIG_NAME).write_text((source / CONFIG_NAME).read_text())
        save_file(tensors, tmp_path / "model.safetensors")
        if damage == "truncated":
            file = tmp_path / "model.safetensors"
            file.write_bytes(file.read_bytes()[:-100])
        status, lines = align("--ckpt", tmp_path, "--image_size", "112")
        assert status == 2 and lines == [] and WORDS[damage] in capsys.readouterr().err


@pytest.mark.skipif(HAS_FAMILIES, reason=f"transformers {transformers.__version__} has the families")
@pytest.mark.parametrize("name", ["siglip2", "aimv2_native", "dinov3"])
def test_align_says_that_transformers_lacks_the_family(golden, capsys, name):
    assert main(["align", "--ckpt", str(golden / name), "--device", "cpu"]) == 2
    assert f"transformers {transformers.__version__} has no " in capsys.readouterr().err


def test_align_has_nothing_to_compare_llava_vit_with(golden, capsys):
    assert main(["align", "--ckpt", str(golden / "llava_vit"), "--device", "cpu"]) == 2
    assert "compared by `llava-packing verify`" in capsys.readouterr().err


def test_align_wants_the_original(golden, tmp_path, capsys):
    family_for("dinov3_vit").from_pretrained(golden / "dinov3").save_pretrained(tmp_path / "packing")
    assert main(["align", "--ckpt", str(tmp_path / "packing"), "--device", "cpu"]) == 2
    assert "give the original as --ckpt" in capsys.readouterr().err
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / CONFIG_NAME).write_text(json.dumps({"model_type": "clip"}))
    assert main(["align", "--ckpt", str(tmp_path / "other"), "--device", "cpu"]) == 2
    assert "no packed encoder for model_type 'clip'" in capsys.readouterr().err
