"""What four of the five documents of the LLaVA-ViT time promise: each of their blocks of code, done here.

Paths, devices and checkpoints are ours: no GPU, no download, small models with random weights. Where a document is
wrong, docs/documents.md says how.

- "Weight Conversion Tool Implementation Summary" (000)
- "vit_aim_v2_packing_hf.py Modification Summary" (002)
- "Vision Transformer Packing Format Implementation" (003)
- "HEVC ViT Packing Tower - Usage Guide" (004)

"LlavaViT Packing Model" (001) is in test_documents.py.
"""

import inspect
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import assert_close
from conversions import SIZES, config_of, source_state_dict, standard_folder
from families import tiny
from safetensors.torch import load_file
from torch.nn import functional as F

from llava_packing_tower import (
    AIMv2Packing,
    DINOv3ViTPacking,
    HEVCViTPackingVisionTower,
    LlavaViTPackingModel,
    PatchLayout,
    Siglip2NaflexPacking,
    batch_images_to_packing_input,
    patchify,
    remap_state_dict_hf_to_packing,
)
from llava_packing_tower.convert import alignment_utils
from llava_packing_tower.convert.hf_reference import IN_TRANSFORMERS
from llava_packing_tower.models.llava_vit.presets import PACKING, PRESETS, SOURCE, STANDARD, register_preset
from llava_packing_tower.towers.names import tower_kind

pytestmark = pytest.mark.newest
SCRIPTS = Path(__file__).parents[2] / "model_factory"
HAS_FAMILIES = all(hasattr(transformers, names.vision) for names in IN_TRANSFORMERS.values())


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def scripts(monkeypatch):
    """The folder of the documents' scripts, as Python has it when one of them is run."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(SCRIPTS))
    yield SCRIPTS
    for name in set(sys.modules) - before:
        if (SCRIPTS / f"{name}.py").exists():
            del sys.modules[name]


def script(name, *arguments, monkeypatch):
    """Exit status of a script of the documents, run as a program."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPTS / name), run_name="__main__")
    return ended.value.code


# ---------------------------------------------------------------- 000: the conversion of standard checkpoints


@pytest.fixture
def named():
    """The sizes of the small test models under the documents' kinds of names."""
    sizes = {name: SIZES[name] for name in SIZES}
    for name, form in (("hf_llava_vit_tiny_ln", STANDARD), ("hf_llava_vit_packing_tiny_ln", PACKING)):
        register_preset(name, form, **sizes)
    register_preset("llava_vit_tiny_ln", SOURCE, **sizes)
    yield
    for name in ("hf_llava_vit_tiny_ln", "hf_llava_vit_packing_tiny_ln", "llava_vit_tiny_ln"):
        del PRESETS[name]


@pytest.mark.usefixtures("small_pictures")
def test_000_the_script_and_its_five_tests(named, tmp_path, monkeypatch, capsys):
    """Model's name, then weights; with a target name; the five tests are run and the folder loads."""
    standard_folder(tmp_path / "standard")
    weights = load_file(tmp_path / "standard" / "model.safetensors")
    torch.save(weights, tmp_path / "weights.pth")
    name, out = "convert_vit_preview_v0_hf_to_packing.py", tmp_path / "output_packing"
    arguments = ("hf_llava_vit_tiny_ln", tmp_path / "weights.pth", "--output_dir", out)
    assert script(name, *arguments, "--target_model_name", "hf_llava_vit_packing_tiny_ln", monkeypatch=monkeypatch) == 0
    printed = capsys.readouterr().out
    assert printed.count("PASS") == 5 and "three images, two videos" in printed
    model = LlavaViTPackingModel.from_pretrained(out)
    key = weights["encoder.layers.1.self_attn.k_proj.weight"]
    assert torch.equal(model.encoder.layers[1].self_attn.qkv.weight.chunk(3)[1], key)
    assert script(name, monkeypatch=monkeypatch) == 2 and "MODEL_NAME WEIGHT_PATH" in capsys.readouterr().err


def test_000_the_table_of_names():
    """q, k and v become one tensor, in this order; two other renames; the rest keeps its name."""
    d, layer = 4, "encoder.layers.7"
    shapes = {"weight": (d, d), "bias": (d,)}
    parts = {
        f"{layer}.self_attn.{part}_proj.{kind}": torch.randn(shape) for part in "qkv" for kind, shape in shapes.items()
    }
    same = [f"{layer}.layer_norm1.weight", f"{layer}.mlp.fc1.bias", "head.probe", "layernorm_post.weight"]
    state = parts | {name: torch.randn(d) for name in same}
    state |= {"embeddings.patch_embedding.weight": torch.randn(d, 3, 2, 2), "video_rope.inv_freq_t": torch.ones(2)}
    state |= {f"{layer}.self_attn.out_proj.weight": torch.randn(d, d)}
    found = remap_state_dict_hf_to_packing(state)
    assert found.keys() == {
        *same,
        "patch_embed.proj.weight",
        f"{layer}.self_attn.proj.weight",
        f"{layer}.self_attn.qkv.weight",
        f"{layer}.self_attn.qkv.bias",
    }
    expected = torch.cat([parts[f"{layer}.self_attn.{part}_proj.weight"] for part in "qkv"])
    assert torch.equal(found[f"{layer}.self_attn.qkv.weight"], expected)
    del state[f"{layer}.self_attn.k_proj.bias"]
    with pytest.raises(ValueError, match=r"k_proj\.bias missing"):
        remap_state_dict_hf_to_packing(state)


def test_001_the_script_for_training_checkpoints(named, tmp_path, monkeypatch):
    """Also what it hands on: the helpers that the guide to the LlavaViT packing model imports from it."""
    standard_folder(tmp_path / "standard")
    weights = source_state_dict(load_file(tmp_path / "standard" / "model.safetensors"))
    torch.save({"state_dict": weights}, tmp_path / "backbone.pt")
    arguments = ("llava_vit_tiny_ln", tmp_path / "backbone.pt", "--output_dir", tmp_path / "out", "--no-verify")
    assert script("convert_llava_vit_packing_to_hf.py", *arguments, monkeypatch=monkeypatch) == 0
    assert config_of(tmp_path / "out")["model_type"] == "llava_vit_packing"


def test_the_documents_imports(scripts):
    """Every import line of the five documents, with the folder of the scripts in the path."""
    exec(
        "from alignment_utils import compute_similarity_metrics, convert_to_patches, generate_test_image\n"
        "from alignment_utils import load_image_as_tensor\n"
        "from convert_llava_vit_packing_to_hf import compute_patch_positions_with_interpolated_temporal\n"
        "from convert_llava_vit_packing_to_hf import interpolate_frame_indices\n"
        "from convert_vit_preview_v0_hf_to_packing import remap_state_dict_hf_to_packing\n"
        "from hevc_vit_packing_tower import HEVCViTPackingVisionTower\n"
        "from vit_aim_v2_packing_hf import AIMv2Packing\n"
        "from vit_dinov3_packing_hf import DINOv3ViTPacking\n"
        "from vit_preview_v0_packing_hf import LlavaViTPackingConfig, LlavaViTPackingModel\n"
        "from vit_preview_v0_packing_hf import compute_patch_positions_from_grid_thw\n"
        "from vit_siglip2_packing_hf import Siglip2NaflexPacking\n",
        {},
    )


# ---------------------------------------------------------------- 002 and 003: the three families


FAMILIES = {"aimv2": (AIMv2Packing, 14), "dinov3": (DINOv3ViTPacking, 14), "siglip2": (Siglip2NaflexPacking, 16)}


@pytest.fixture(params=FAMILIES)
def family(request, tmp_path):
    """Class, patch size and a checkpoint folder of a small model, of the documents' patch size."""
    cls, patch = FAMILIES[request.param]
    tiny(request.param, patch_size=patch).save_pretrained(tmp_path / request.param)
    return cls, patch, tmp_path / request.param


def test_002_the_interface(family):
    """Rows and grid by name, in this order; imports are absolute names of the package."""
    parameters = list(inspect.signature(family[0].forward).parameters)
    assert parameters[:3] == ["self", "hidden_states", "grid_thw"]


def test_003_basic_use(family):
    """``ckpt=`` and ``device=``; two images of 224 pixels; a bare tensor."""
    cls, patch, folder = family
    model = cls(ckpt=str(folder), device="cpu")
    side = 224 // patch
    rows, grid = torch.randn(2 * side**2, patch * patch * 3), torch.tensor([[1, side, side], [1, side, side]])
    output = model(rows, grid)
    assert output.shape == (2 * side**2, 64) and model.patch_size == patch
    assert torch.equal(cls(ckpt=f"{folder}/")(rows, grid), output)


def test_003_the_patch_size_of_upstreams_alignment_script(tmp_path):
    tiny("siglip2", patch_size=16).save_pretrained(tmp_path)
    model = Siglip2NaflexPacking.from_pretrained(tmp_path)
    assert model.config.vision_config.patch_size == model.patch_size == 16
    assert "vision_config" not in config_of(tmp_path)


def test_003_convert_to_packing_format(family):
    """Rows of the images that the model itself reads: channels last, grid on the images' device."""
    images = torch.randn(2, 3, 224, 224)
    for function in (alignment_utils.convert_to_packing_format, alignment_utils.convert_to_patches):
        rows, grid = function(images, patch_size=14)
        assert rows.shape == (512, 588) and grid.tolist() == [[1, 16, 16], [1, 16, 16]] and grid.dtype == torch.int64
        assert torch.equal(rows[1].view(14, 14, 3), images[0, :, :14, 14:28].permute(1, 2, 0))
    with pytest.raises(ValueError, match="nearest widths: 224 or 238"):
        alignment_utils.convert_to_patches(torch.randn(1, 3, 224, 225), 14)


def test_003_images_of_different_sizes(family):
    cls, patch, folder = family
    model = cls(ckpt=folder)
    sizes = ((224, 224), (336, 224), (448, 336)) if patch == 14 else ((224, 224), (384, 384), (16, 64))
    images = [torch.randn(3, height, width) for height, width in sizes]
    packed = [alignment_utils.convert_to_packing_format(image.unsqueeze(0), patch) for image in images]
    rows, grid = torch.cat([rows for rows, _ in packed]), torch.cat([grid for _, grid in packed])
    output, start = model(rows, grid), 0
    for one_rows, one_grid in packed:
        count = int(one_grid[0, 1] * one_grid[0, 2])
        assert_close(output[start : start + count], model(one_rows, one_grid))
        start += count
    assert start == len(output)


def test_003_resizing_to_whole_patches():
    image = torch.randn(1, 3, 230, 240)
    resized = F.interpolate(image, size=(230 // 14 * 14, 240 // 14 * 14), mode="bilinear")
    assert alignment_utils.convert_to_patches(resized, 14)[1].tolist() == [[1, 16, 17]]


@pytest.mark.usefixtures("small_pictures")
@pytest.mark.parametrize("name", ["aim_v2", "dinov3", "siglip2"])
def test_003_the_alignment_scripts(name, golden, monkeypatch, capsys):
    """Every option that the document lists; exit status 0, and 2 for the checkpoint of another family."""
    folder = {"aim_v2": "aimv2_native"}.get(name, name)
    options = ("--device", "cpu", "--batch_size", 1, "--image_size", 16, "--threshold", 0.98)
    status = script(f"align_{name}_packing.py", "--ckpt", golden / folder, *options, monkeypatch=monkeypatch)
    if not HAS_FAMILIES:
        assert status == 2 and "transformers" in capsys.readouterr().err
        return
    assert status == 0 and "ALL TESTS PASSED" in capsys.readouterr().out
    other = {"siglip2": "dinov3"}.get(name, "siglip2")
    assert script(f"align_{name}_packing.py", "--ckpt", golden / other, *options, monkeypatch=monkeypatch) == 2
    assert "is not of the family" in capsys.readouterr().err


def test_003_alignment_utils(tmp_path, capsys):
    path = tmp_path / "pictures" / "1.png"
    assert alignment_utils.generate_test_image(path, width=40, height=24) == path
    image = alignment_utils.load_image_as_tensor(path, "cpu")
    assert image.shape == (1, 3, 24, 40) and 0 <= image.min() < 0.1 and 0.9 < image.max() <= 1
    left = torch.tensor([[3.0, 0.0], [0.0, 2.0]])
    metrics = alignment_utils.compute_similarity_metrics(left, left * 2)
    assert metrics == {"max_diff": 3, "mean_diff": 1.25, "min_cosine": 1, "mean_cosine": 1, "max_cosine": 1}
    turned = alignment_utils.compute_similarity_metrics(left, left.flip(1))
    assert turned["min_cosine"] == 0
    with pytest.raises(ValueError, match=r"\[2, 2\] and \[1, 2\]"):
        alignment_utils.compute_similarity_metrics(left, left[:1])
    alignment_utils.print_metrics(metrics, "224x224", 2)
    assert "  min_cosine   1.00000000" in capsys.readouterr().out
    assert alignment_utils.round_up_to_multiple(225, 14) == 238 and alignment_utils.round_up_to_multiple(224, 14) == 224


# ---------------------------------------------------------------- 004: the tower


@pytest.fixture
def tower(tmp_path):
    tiny("llava_vit", patch_size=16).save_pretrained(tmp_path / "hevc_vit_packing_model")
    return HEVCViTPackingVisionTower(
        str(tmp_path / "hevc_vit_packing_model"), SimpleNamespace(mm_vision_select_layer=-1)
    )


def test_004_a_batch_and_a_list(tower):
    images = torch.randn(4, 3, 224, 224)
    assert tower(images).shape == (4, 196, tower.hidden_size)
    sizes = [tuple(features.shape) for features in tower([*images[:2], torch.randn(3, 448, 448)])]
    assert sizes == [(196, 64), (196, 64), (784, 64)]


def test_004_the_two_helpers(tower):
    """What the tower feeds to its encoder, by the documents' method names."""
    images = torch.randn(4, 3, 224, 224)
    rows, grid = tower._batch_images_to_packing_input(images)
    assert rows.shape == (784, 768) and grid.tolist() == [[1, 14, 14]] * 4
    assert torch.equal(rows, patchify(images, 16))
    one, grid = tower._image_to_packing_input(images[2])
    assert torch.equal(one, rows[392:588]) and grid.tolist() == [[1, 14, 14]]
    output = tower.vision_tower(hidden_states=one, grid_thw=grid, output_hidden_states=True)
    assert_close(output.hidden_states[-1], tower(images)[2])


def test_004_helpers_of_another_family(tmp_path):
    """Rows are in the order of the tower's own family."""
    tiny("siglip2", patch_size=16).save_pretrained(tmp_path / "siglip2_packing")
    tower = HEVCViTPackingVisionTower(str(tmp_path / "siglip2_packing"), SimpleNamespace(mm_vision_select_layer=-1))
    image = torch.randn(3, 32, 48)
    assert torch.equal(tower._image_to_packing_input(image)[0], patchify(image, 16, PatchLayout.CHANNEL_LAST))
    ragged, _ = batch_images_to_packing_input([image, image[:, :16]], 16, PatchLayout.CHANNEL_LAST)
    assert torch.equal(tower._batch_images_to_packing_input([image, image[:, :16]])[0], ragged)


def test_004_the_rule_of_names():
    for name, kind in {
        "/path/to/hevc_vit_packing_model": "packing",
        "my_packing_tower": "packing",
        "lab/hevc_vit_large": "hevc_vit",
        "openai/clip-vit-large-patch14-336": None,
    }.items():
        assert tower_kind(name) == kind
