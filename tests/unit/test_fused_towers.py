"""``packing:A + packing:B``: two towers on one grid, features joined by channel."""

import copy
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import assert_close
from families import tiny
from PIL import Image
from safetensors.torch import save_file

from llava_packing_tower import HEVCViTPackingVisionTower
from llava_packing_tower.cli.main import main
from llava_packing_tower.data.image_processor import raw_pixels
from llava_packing_tower.data.native_config import NativeSettings
from llava_packing_tower.eval.probe import load_tower
from llava_packing_tower.export.plan import read_source
from llava_packing_tower.integrations.llava.gradients import idle_names
from llava_packing_tower.integrations.llava.restore_frozen import restore
from llava_packing_tower.integrations.llava.tower_builder import hooked, tower_class
from llava_packing_tower.towers.fused_tower import FusedPackingVisionTower
from llava_packing_tower.towers.names import tower_kind, tower_names
from llava_packing_tower.train import launcher
from llava_packing_tower.utils.errors import UsageError

FIRST, SECOND = 4, 6
"""Sides of the patches of the two towers."""
COLORS = np.linspace(0, 255, 50 * 70 * 3).reshape(50, 70, 3).astype(np.uint8)
PHOTO = Image.fromarray(COLORS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """SigLIP2 and RADIO: other patches, widths, numbers of layers and ways to normalize."""
    root = tmp_path_factory.mktemp("towers")
    tiny("siglip2").save_pretrained(root / "a")
    wide = {"patch_size": SECOND, "hidden_size": 32, "num_hidden_layers": 3, "image_size": 36, "max_img_size": 36}
    tiny("radio", seed=1, **wide).save_pretrained(root / "b")
    for name, side, mean in (("a", 16, 0.5), ("b", 36, 0.25)):
        size = {"height": side, "width": side}
        content = {"size": size, "do_center_crop": False, "image_mean": [mean] * 3, "image_std": [mean] * 3}
        (root / name / "preprocessor_config.json").write_text(json.dumps(content))
    return root


def name_of(folders):
    return f"packing:{folders / 'a'} + packing:{folders / 'b'}"


def arguments(**more):
    return SimpleNamespace(**{"mm_vision_select_layer": -1, "mm_projector_type": "mlp2x_gelu", **more})


def fused(folders, native=False, **more):
    tower = FusedPackingVisionTower(name_of(folders), arguments(**more))
    if native:
        tower.set_native(NativeSettings(4, 30, "frames"))
    return tower


def single(folders, name, **more):
    return HEVCViTPackingVisionTower(f"packing:{folders / name}", arguments(**more))


def own_pixels(tower, image, rows, columns):
    """An image as a tower alone would get it at this grid."""
    patch, processor = tower.config.patch_size, copy.deepcopy(tower.image_processor)
    processor.size = {"height": rows * patch, "width": columns * patch}
    processor.do_center_crop = False
    return processor.preprocess(image, return_tensors="pt")["pixel_values"][0]


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("raw", [True, False])
def test_each_tower_sees_the_image_on_the_first_ones_grid(folders, native, raw):
    tower = fused(folders, native)
    photos = [PHOTO, PHOTO.resize((33, 90)), PHOTO.resize((8, 8))]
    with raw_pixels() if raw else torch.no_grad():
        images = [tower.image_processor.preprocess(x, return_tensors="pt")["pixel_values"][0] for x in photos]
    assert all(image.is_floating_point() is not raw and image.shape[0] == 6 for image in images)
    first, second = single(folders, "a"), single(folders, "b")
    if native:
        first.set_native(NativeSettings(4, 30, "frames"))
    found = tower(images)
    grids = [[side // SECOND for side in image.shape[1:]] for image in images]
    assert len({tuple(grid) for grid in grids}) == (3 if native else 1)
    for photo, features, (rows, columns) in zip(photos, found, grids, strict=True):
        alone = first.image_processor.preprocess(photo, return_tensors="pt")["pixel_values"][0]
        assert alone.shape == (3, rows * FIRST, columns * FIRST)
        beside = own_pixels(second, photo, rows, columns)
        expected = torch.cat([first([alone])[0], second([beside])[0]], dim=-1)
        assert features.shape == (rows * columns, tower.hidden_size) and tower.hidden_size == 64 + 32
        assert_close(features, expected, atol=1e-5)


def test_what_llava_reads(folders):
    tower = fused(folders)
    assert tower.is_loaded and tower.num_patches == 16 and tower.num_patches_per_side == 4
    assert tower.config.patch_size == SECOND and tower.config.num_channels == 6
    size = tower.image_processor.crop_size
    assert size == {"height": 24, "width": 24} and tower.image_processor.size["shortest_edge"] == 24 == tower.image_size
    assert tower.dummy_feature.shape == (1, 96)
    batch = tower.image_processor([PHOTO, PHOTO], return_tensors="pt")["pixel_values"]
    assert batch.shape == (2, 6, 24, 24) and tower(batch).shape == (2, 16, 96)
    assert torch.equal(tower(batch)[1], tower([batch[1]])[0])
    blank = torch.zeros(3, *size.values())  # for a sample without an image
    assert_close(tower([blank])[0], tower([torch.zeros(6, *size.values())])[0])
    waiting = FusedPackingVisionTower(name_of(folders), arguments(), delay_load=True)
    assert not waiting.is_loaded and waiting.hidden_size == 96 and waiting.num_patches == 16
    with pytest.raises(ValueError, match="is not loaded"):
        waiting(batch)


def test_several_passes_are_as_one(folders):
    tower = fused(folders, native=True)
    images = [torch.randn(6, SECOND * rows, SECOND * columns) for rows, columns in ((2, 3), (5, 1), (4, 4))]
    expected = tower(images)
    tower.set_encoder_tokens(8)
    for found, wanted in zip(tower(images), expected, strict=True):
        assert_close(found, wanted, atol=1e-5)


def test_gradients_reach_both_and_what_is_idle_is_known(folders):
    tower = fused(folders, mm_vision_select_layer=-2, mm_tunable_parts="mm_vision_tower")
    assert not any(parameter.requires_grad for parameter in tower.parameters())  # the trainer unfreezes
    tower.requires_grad_(True)
    images = [torch.randn(6, 12, 18)]
    tower(images)[0].square().sum().backward()
    plain = {name: parameter.grad for name, parameter in tower.named_parameters()}
    nothing = {name for name, gradient in plain.items() if gradient is None or not gradient.any()}
    assert {f"0.{name}" for name in nothing} <= idle_names(torch.nn.ModuleList([tower]))
    assert any("towers.1.encoder.layers.2." in name for name in nothing)
    assert not any("towers.1.encoder.layers.1." in name for name in nothing)
    tower.zero_grad()
    tower.train()
    tower.vision_tower.gradient_checkpointing_enable()
    tower(images)[0].square().sum().backward()
    for name, parameter in tower.named_parameters():
        if name not in nothing:
            assert_close(parameter.grad, plain[name], atol=1e-4)


@pytest.mark.parametrize("weights", ["checkpoint", "folder"])
def test_saved_and_reloaded_as_one(folders, weights):
    tower = fused(folders)
    note = json.loads(json.dumps(tower.packing_config(weights)))
    if weights == "checkpoint":
        for parameter in tower.parameters():
            parameter.data.normal_(std=0.1)
    where = folders if weights == "folder" else folders / "gone"
    again = FusedPackingVisionTower(name_of(where), arguments(mm_packing_config=note))
    images = [torch.randn(6, 12, 18)]
    if weights == "checkpoint":
        with pytest.raises(ValueError, match="were not in the LLaVA checkpoint"):
            again(images)
        again.load_state_dict(tower.state_dict())
    assert torch.equal(tower(images)[0], again(images)[0])
    noted = json.loads(json.dumps(again.packing_config(weights)))
    own = [[{**tower, "config": tower["config"]["model_type"]} for tower in x.pop("towers")] for x in (note, noted)]
    assert own[0] == own[1] and noted == note
    assert again.image_processor.to_dict() == tower.image_processor.to_dict()
    assert torch.equal(
        *(x.image_processor.preprocess(PHOTO, return_tensors="pt")["pixel_values"] for x in (tower, again))
    )


def test_a_frozen_one_gets_its_own_weights_again(folders, tmp_path):
    tower = fused(folders)
    before = {name: value.clone() for name, value in tower.state_dict().items()}
    for parameter in tower.parameters():
        parameter.data.zero_()
    (tmp_path / "config.json").write_text("{}")
    save_file({"lm_head.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert set(restore(tower, str(tmp_path))) == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in tower.state_dict().items())


def test_a_frozen_one_that_has_changed_is_refused(folders):
    note = fused(folders).packing_config("folder")
    note["towers"][1]["fingerprint"] = "0" * 64
    with pytest.raises(ValueError, match=r"b has changed since this LLaVA checkpoint was trained"):
        fused(folders, mm_packing_config=note)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"mm_packing_fusion": "tokens"}, "mm_packing_fusion is 'tokens'; towers are joined by 'channel'"),
        ({"mm_projector_type": "checkpoint"}, "several towers have no projector in common"),
        ({"mm_vision_select_layer": -4}, "mm_vision_select_layer"),
    ],
)
def test_what_cannot_be_joined(folders, given, match):
    with pytest.raises(ValueError, match=match):
        fused(folders, **given)


def test_a_note_of_other_towers_is_refused(folders):
    note = fused(folders).packing_config()
    with pytest.raises(ValueError, match="are 2 towers, but mm_packing_config has 1"):
        fused(folders, mm_packing_config={**note, "towers": note["towers"][:1]})
    del note["towers"]
    with pytest.raises(ValueError, match="are 2 towers, but mm_packing_config is of one"):
        fused(folders, mm_packing_config=note)


@pytest.mark.parametrize(
    ("image", "match"),
    [
        (torch.zeros(9, 12, 12), "image 0 has 9 channels; 2 towers take 6, or 3 for all"),
        (
            torch.zeros(6, 12, 16),
            r"height and width \[12, 16\], which for these towers must be positive multiples of 6",
        ),
        (torch.zeros(6, 2, 12, 12), r"image 0 must be a tensor \[6, H, W\] for 2 towers"),
        (PHOTO, r"must be a tensor \[6, H, W\] for 2 towers, got Image"),
    ],
)
def test_images_that_are_no_canvas(folders, image, match):
    with pytest.raises(ValueError, match=match):
        fused(folders)([image])


def test_positions_of_its_own_are_refused(folders):
    tower = fused(folders, native=True)
    with pytest.raises(ValueError, match="several towers take no patch_positions"):
        tower([torch.zeros(6, 12, 12)], patch_positions=torch.zeros(4, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="cannot be used with several towers"), tower.image_processor.placed(4):
        pass
    with pytest.raises(ValueError, match="takes no do_resize for one call"):
        tower.image_processor(PHOTO, do_resize=False)


def test_the_name(folders, files):
    name = name_of(folders)
    assert tower_kind(name) == "fused" and tower_kind(f"packing:{folders / 'a'}") == "packing"
    assert tower_names(name) == [str(folders / "a"), str(folders / "b")] and tower_names("a + b") == ["a + b"]
    assert tower_kind("packing:/a/b + c") == "packing"  # of one folder
    assert tower_class(name) is FusedPackingVisionTower
    config = SimpleNamespace(mm_vision_tower=name, **vars(arguments()))
    assert type(hooked(lambda vision_tower_cfg, **kwargs: None)(config)) is FusedPackingVisionTower
    plan = launcher.make_plan(files(mm_vision_tower=name), num_processes=1)
    assert f"{name} (packing towers, joined by channel)" in plan.describe()
    with pytest.raises(UsageError, match=r"vision_tower: folder .*gone does not exist"):
        launcher.make_plan(files(mm_vision_tower=f"{name} + packing:{folders / 'gone'}"), num_processes=1)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"mm_packing_fusion": "tokens"}, "mm_packing_fusion.*tokens.*channel"),
        ({"mm_projector_type": "checkpoint"}, "mm_projector_type checkpoint: the several towers .* in common"),
    ],
)
def test_what_cannot_be_joined_is_said_before_the_start(folders, files, given, match):
    with pytest.raises(UsageError, match=match):
        launcher.make_plan(files(mm_vision_tower=name_of(folders), **given), num_processes=1)


def test_a_weight_file_beside_the_configuration(folders, files, tmp_path, monkeypatch):
    """As the authors publish them: a name without a slash, which is no hub id."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "PE-Lang-L14-448.pt").write_bytes(b"")
    plan = launcher.make_plan(files(mm_vision_tower="packing:PE-Lang-L14-448.pt"), num_processes=1)
    assert plan.values["vision_tower"] == "packing:PE-Lang-L14-448.pt"
    with pytest.raises(UsageError, match="neither a folder here nor a hub id"):
        launcher.make_plan(files(mm_vision_tower="packing:PE-Lang-L14-449.pt"), num_processes=1)


# ---------------------------------------------------------------- commands


@pytest.mark.parametrize(
    "words",
    [
        ("convert", "NAME"),
        ("verify", "a", "NAME"),
        ("align", "--ckpt", "NAME"),
        ("align", "--ckpt", "a", "--packed", "NAME"),
        ("show", "photo.png", "--tower", "NAME"),
    ],
    ids=lambda words: f"{words[0]}-{len(words)}",
)
def test_commands_for_one_tower_say_so(folders, capsys, words):
    name = name_of(folders)
    status = main([name if word == "NAME" else word for word in words])
    said = "".join(capsys.readouterr())
    assert status in (1, 2) and "Traceback" not in said
    assert f"{name} are 2 towers, which a LLaVA joins in training; {words[0]} takes one of them at a time" in said
    assert f"for example {folders / 'a'}" in said


def test_an_export_is_refused(folders, tmp_path):
    pytest.importorskip("llava")
    (tmp_path / "config.json").write_text(
        json.dumps({"architectures": ["LlavaLlamaForCausalLM"], "mm_vision_tower": name_of(folders)})
    )
    with pytest.raises(ValueError, match=r"cannot be exported: it has several vision towers .*, and an export has one"):
        read_source(tmp_path)


def test_it_can_be_probed(folders, tmp_path):
    tower = load_tower(name_of(folders), max_patches=16)
    assert type(tower) is FusedPackingVisionTower
    assert tower.image_processor.preprocess(PHOTO, return_tensors="pt")["pixel_values"].shape == (1, 6, 18, 24)
    for number, kind in enumerate("vwvwvwvw"):
        (tmp_path / kind).mkdir(exist_ok=True)
        PHOTO.resize((20 + number, 30)).save(tmp_path / kind / f"{number}.png")
    words = ["probe", name_of(folders), "--data", str(tmp_path), "--max_patches", "16", "--device", "cpu"]
    assert main([*words, "--cache", str(tmp_path / "c"), "--json", str(tmp_path / "out.json")]) == 0
    (found,) = json.loads((tmp_path / "out.json").read_text())
    assert found["hidden_size"] == 64 + 32 and found["family"] == "fused_packing" and found["tested"] == 2
