"""Weights as their authors and timm publish them, against what their own code computes (tests/golden/authors)."""

import json
import re
import shutil
from fnmatch import fnmatch
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import assert_close
from safetensors.torch import save_file

from llava_packing_tower import (
    AIMv2Packing,
    DINOv3ViTPacking,
    HEVCViTPackingVisionTower,
    PerceptionEncoderPacking,
    Siglip2NaflexPacking,
)
from llava_packing_tower.checkpoint.hub import resolve_folder
from llava_packing_tower.checkpoint.namings import recognized
from llava_packing_tower.checkpoint.opening import open_checkpoint
from llava_packing_tower.checkpoint.weights import construction, parameter_shapes, plan_problems
from llava_packing_tower.cli.main import main
from llava_packing_tower.data.patches import batch_images_to_packing_input
from llava_packing_tower.models.dinov3_names import theta_of

pytestmark = [pytest.mark.newest, pytest.mark.usefixtures("small_pictures")]
HEADS = {"num_attention_heads": 2}
# what is given, its family, what the weights do not say themselves
KINDS = {
    "dinov3_meta.pth": (DINOv3ViTPacking, {}),
    "dinov3_meta_gated.pth": (DINOv3ViTPacking, {}),
    "dinov3_timm": (DINOv3ViTPacking, {}),
    "dinov3_timm_gated": (DINOv3ViTPacking, {}),
    "siglip2_timm": (Siglip2NaflexPacking, {}),
    "siglip2_big_vision.npz": (Siglip2NaflexPacking, {}),
    "siglip2_big_vision_scan.npz": (Siglip2NaflexPacking, {}),
    "aimv2_timm": (AIMv2Packing, {}),
    "pe_core_timm": (PerceptionEncoderPacking, {}),
    "pe_lang_timm": (PerceptionEncoderPacking, {}),
    "pe_spatial_timm": (PerceptionEncoderPacking, {}),
    "pe_spatial_timm_giant": (PerceptionEncoderPacking, {}),
    "aimv2_apple_native": (AIMv2Packing, HEADS),
    "aimv2_apple_learned": (AIMv2Packing, HEADS),
}


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def source(golden, tmp_path, kind):
    """The weights; Apple's in a folder, whose config.json says only what weights of this width leave open."""
    authors = golden / "authors"
    if not kind.startswith("aimv2_apple"):
        return authors / kind
    folder = tmp_path / kind
    folder.mkdir()
    shutil.copy(authors / f"{kind}.safetensors", folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(HEADS))
    return folder


def case_of(golden, kind):
    with np.load(golden / "authors" / f"{kind.partition('.')[0]}.case.npz") as saved:
        count = sum(name.startswith("pixels") for name in saved)
        return [[torch.from_numpy(saved[f"{part}.{i}"]) for i in range(count)] for part in ("pixels", "tokens")]


def test_the_authors_tokens_in_one_packed_pass(golden, source, kind, caplog):
    images, expected = case_of(golden, kind)
    model = KINDS[kind][0].from_pretrained(source)
    rows, grid = batch_images_to_packing_input(images, 4, model.patch_layout)
    assert_close(model(rows, grid), torch.cat(expected))
    assert "converted to" in caplog.text and model.config.num_attention_heads == 2


def test_a_tower_by_its_path(golden, source, kind):
    """Loaded, or first its config alone; and the features of a frozen tower are found again from its note."""
    images, _ = case_of(golden, kind)
    args = SimpleNamespace(mm_vision_select_layer=-1)
    late = HEVCViTPackingVisionTower(f"packing:{source}", args, delay_load=True)
    assert late.config.hidden_size == late.hidden_size == 48 and not late.is_loaded
    tower = HEVCViTPackingVisionTower(f"packing:{source}", args)
    model = KINDS[kind][0].from_pretrained(source)
    rows, grid = batch_images_to_packing_input(images, 4, model.patch_layout)
    _, states = model(rows, grid, output_hidden_states=True)
    assert_close(torch.cat(tower(images)), states[-1])
    note = {"mm_packing_config": tower.packing_config("folder"), **vars(args)}
    again = HEVCViTPackingVisionTower(f"packing:{source}", SimpleNamespace(**note))
    assert torch.equal(again(images)[0], tower(images)[0])


def test_convert(golden, source, kind, tmp_path, capsys):
    out = tmp_path / "out_packing"
    assert main(["convert", str(source), "--output_dir", str(out)]) == 0
    images, expected = case_of(golden, kind)
    model = KINDS[kind][0].from_pretrained(out)
    rows, grid = batch_images_to_packing_input(images, 4, model.patch_layout)
    assert_close(model(rows, grid), torch.cat(expected))
    assert "not compared" in capsys.readouterr().out  # transformers reads none of these


TOLD_BY_PRESENCE = ("storage_tokens", "preprocessor.pos_embed")


def test_a_tensor_more_or_less_is_an_error(source, kind, tmp_path):
    """Each tensor that is used is missed, but for those whose absence means another model; a strange one is refused."""
    opened = open_checkpoint(source)
    shapes, cls = opened.files.shapes(), KINDS[kind][0]
    _, plan = cls.plan(opened.raw, shapes)
    used = {name for recipe in plan.recipes.values() for name in recipe.sources}
    for name in sorted(used - {*TOLD_BY_PRESENCE}):
        rest = {other: shape for other, shape in shapes.items() if other != name}
        if name.endswith("_mask"):
            continue  # the values tell, see below
        try:
            if recognized(given(opened), rest, source) is None:
                continue
            config, less = cls.plan(opened.raw, rest)
        except ValueError:
            continue
        with construction(torch.float32):
            assert plan_problems(less, rest, parameter_shapes(cls(config))), name
    tensors = {name: opened.files[name].contiguous() for name in shapes}
    folder = tmp_path / "more"
    folder.mkdir()
    save_file({**tensors, "blocks.0.strange": torch.zeros(3)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(given(opened)))
    with pytest.raises(ValueError, match=r"1 unexpected\n  unexpected: blocks\.0\.strange"):
        cls.from_pretrained(folder)


def given(opened):
    """What the config.json said."""
    return {name: value for name, value in opened.raw.items() if name not in ("model_type", "rope_embed.periods")}


# ---------------------------------------------------------------- Meta's files


def change_meta(golden, tmp_path, change, name="changed.pth", source="dinov3_meta.pth"):
    tensors = torch.load(golden / "authors" / source, weights_only=True)
    change(tensors)
    torch.save(tensors, tmp_path / name)
    return tmp_path / name


def test_a_bias_of_k_that_is_not_masked_is_refused(golden, tmp_path):
    """transformers' config has no bias of k, so a file with one would lose it."""
    file = change_meta(golden, tmp_path, lambda t: t["blocks.1.attn.qkv.bias_mask"].fill_(1))
    with pytest.raises(ValueError, match="bias of k is not masked"):
        DINOv3ViTPacking.from_pretrained(file)


def test_a_bias_without_a_mask_is_kept_whole(golden, tmp_path):
    def unmask(tensors):
        for name in [name for name in tensors if name.endswith("bias_mask")]:
            tensors[name.removesuffix("_mask")].mul_(tensors.pop(name))

    file = change_meta(golden, tmp_path, unmask)
    model = DINOv3ViTPacking.from_pretrained(file)
    assert model.config.key_bias and model.encoder.layers[0].self_attn.qkv.bias.shape == (144,)
    images, expected = case_of(golden, "dinov3_meta")
    assert_close(model(*batch_images_to_packing_input(images, 4, model.patch_layout)), torch.cat(expected))


def test_the_rotary_base_is_read_from_the_periods(golden, tmp_path):
    def other_base(tensors):
        periods = tensors["rope_embed.periods"]
        periods.copy_(50.0 ** (torch.arange(len(periods)) / len(periods)))

    assert DINOv3ViTPacking.from_pretrained(
        change_meta(golden, tmp_path, other_base)
    ).config.rope_theta == pytest.approx(50)
    assert theta_of(torch.tensor([100 ** (k / 16) for k in range(16)]).bfloat16().tolist()) == 100
    with pytest.raises(ValueError, match="no powers of one base"):
        theta_of([0.5, 1.0, 90.0])


def test_satellite_statistics(golden, tmp_path):
    """Meta's file says by its name alone that its pixels are those of a satellite."""
    file = change_meta(golden, tmp_path, lambda tensors: None, "dinov3_vitl16_pretrain_sat493m-eadcf0ff.pth")
    tower = HEVCViTPackingVisionTower(f"packing:{file}", SimpleNamespace(mm_vision_select_layer=-1))
    assert tower.image_processor.image_mean == [0.430, 0.411, 0.296]
    tower = HEVCViTPackingVisionTower(
        str(golden / "authors" / "dinov3_meta.pth").replace("/authors", "/./authors"),
        SimpleNamespace(mm_vision_select_layer=-1),
    )
    assert tower.image_processor.image_mean == [0.485, 0.456, 0.406]


META = {
    "vits16": (384, 1536, 12, 6, {}),
    "vits16plus": (384, 1536, 12, 6, {"gated": True}),
    "vitb16": (768, 3072, 12, 12, {}),
    "vitl16": (1024, 4096, 24, 16, {}),
    "vith16plus": (1280, 5120, 32, 20, {"gated": True}),
    "vit7b16": (4096, 8192, 40, 32, {"gated": True, "bias": False}),
}


@pytest.mark.parametrize("size", META)
def test_published_sizes_of_meta(size):
    """Heads, gate, biases and registers from shapes alone; the rotary periods have a quarter of a head's width."""
    d, wide, blocks, heads, more = META[size]
    shapes = {"cls_token": (1, 1, d), "storage_tokens": (1, 4, d), "mask_token": (1, d), "norm.weight": (d,)}
    shapes |= {"norm.bias": (d,), "patch_embed.proj.weight": (d, 3, 16, 16), "patch_embed.proj.bias": (d,)}
    for i in range(blocks):
        own = {"norm1.weight": (d,), "norm1.bias": (d,), "norm2.weight": (d,), "norm2.bias": (d,)}
        own |= {"ls1.gamma": (d,), "ls2.gamma": (d,), "attn.qkv.weight": (3 * d, d)}
        own |= {"attn.proj.weight": (d, d), "attn.proj.bias": (d,)}
        if more.get("bias", True):
            own |= {"attn.qkv.bias": (3 * d,), "attn.qkv.bias_mask": (3 * d,)}
        names = ("w1", "w2", "w3") if more.get("gated") else ("fc1", "fc2")
        for name in names[:-1]:
            own |= {f"mlp.{name}.weight": (wide, d), f"mlp.{name}.bias": (wide,)}
        own |= {f"mlp.{names[-1]}.weight": (d, wide), f"mlp.{names[-1]}.bias": (d,)}
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in own.items()}
    count = d // heads // 4
    raw = {"model_type": "dinov3_meta", "rope_embed.periods": [100 ** (k / count) for k in range(count)]}
    config, plan = DINOv3ViTPacking.plan(raw, {**shapes, "rope_embed.periods": (count,)})
    with construction(torch.float32):
        model = DINOv3ViTPacking(config)
    assert plan_problems(plan, shapes, parameter_shapes(model)) == []
    assert (config.num_attention_heads, config.num_register_tokens, config.rope_theta) == (heads, 4, 100)
    transformers_own = dict(key_bias=False, query_bias=more.get("bias", True), use_gated_mlp=more.get("gated", False))
    assert {name: getattr(config, name) for name in transformers_own} == transformers_own
    assert set(plan.dropped) == {"mask_token", "rope_embed.periods"}


# ---------------------------------------------------------------- timm's folders


def test_timms_pixels(golden):
    """Mean, filter, size and crop of ``pretrained_cfg``; a NaFlex has no size of its own."""
    for name, mean, size, crop in (
        ("dinov3_timm", 0.485, {"shortest_edge": 256}, {"height": 256, "width": 256}),
        ("siglip2_timm", 0.5, {"height": 64, "width": 64}, {"height": 64, "width": 64}),
        ("aimv2_timm", 0.48145466, {"shortest_edge": 16}, {"height": 16, "width": 16}),
    ):
        cls = KINDS[name][0]
        model = cls.from_pretrained(golden / "authors" / name)
        processor = cls.load_image_processor(golden / "authors" / name, model.config)
        assert (processor.image_mean[0], processor.size, processor.crop_size, processor.resample) == (
            mean,
            size,
            crop,
            3,
        )


def timm_folder(golden, tmp_path, name, **changes):
    folder = tmp_path / "timm"
    shutil.copytree(golden / "authors" / name, folder)
    config = json.loads((folder / "config.json").read_text())
    for key, value in changes.items():
        config[key] = {**config[key], **value} if isinstance(value, dict) else value
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("dinov3_timm", {"architecture": "vit_small_patch16_lingbot"}, "timm's model 'vit_small_patch16_lingbot'"),
        ("siglip2_timm", {"architecture": "naflexvit_base_patch16_gap"}, "named like timm's SigLIP2 NaFlex"),
        ("dinov3_timm", {"model_args": {"rope_grid_offset": 1}}, "model_args have rope_grid_offset 1"),
        ("aimv2_timm", {"model_args": {"num_heads": None}}, "published in the widths 768, 1024"),
        ("aimv2_timm", {"pretrained_cfg": {"crop_mode": "border"}}, "crop_mode 'border'"),
    ],
)
def test_a_timm_model_that_would_be_another_one_is_refused(golden, tmp_path, name, changes, words):
    folder = timm_folder(golden, tmp_path, name, **changes)
    with pytest.raises(ValueError, match=words):
        HEVCViTPackingVisionTower(f"packing:{folder}", SimpleNamespace(mm_vision_select_layer=-1))


# ---------------------------------------------------------------- Google's files


def test_compressed_and_bfloat16_arrays(golden, tmp_path):
    with np.load(golden / "authors" / "siglip2_big_vision_scan.npz") as saved:
        arrays = dict(saved)
    np.savez_compressed(tmp_path / "small.npz", **arrays)
    exact = Siglip2NaflexPacking.from_pretrained(golden / "authors" / "siglip2_big_vision_scan.npz").state_dict()
    again = Siglip2NaflexPacking.from_pretrained(tmp_path / "small.npz").state_dict()
    assert all(torch.equal(again[name], exact[name]) for name in exact)
    low = {
        name: torch.from_numpy(value).bfloat16().view(torch.int16).numpy().view("V2") for name, value in arrays.items()
    }
    np.savez(tmp_path / "low.npz", **low)
    assert set(open_checkpoint(tmp_path / "low.npz").files.dtypes().values()) == {"bfloat16"}
    rounded = Siglip2NaflexPacking.from_pretrained(tmp_path / "low.npz").state_dict()
    assert all(torch.equal(rounded[name], exact[name].bfloat16().float()) for name in exact)


def test_a_siglip2_of_one_resolution_is_called_one(tmp_path):
    one = {
        "params/img/embedding/kernel": np.zeros((4, 4, 3, 8), np.float32),
        "params/img/pos_embedding": np.zeros((1, 4, 8)),
    }
    np.savez(tmp_path / "siglip2_b16_224.npz", **one)
    with pytest.raises(ValueError, match=r"SigLIP2 .* with one resolution"):
        Siglip2NaflexPacking.from_pretrained(tmp_path / "siglip2_b16_224.npz")


@pytest.mark.parametrize("damage", ["cut", "pickle", "text"])
def test_a_damaged_npz(golden, tmp_path, damage):
    file, whole = tmp_path / "weights.npz", (golden / "authors" / "siglip2_big_vision.npz").read_bytes()
    if damage == "pickle":
        np.savez(file, **{"params/img/embedding/kernel": np.array([{}], dtype=object)})
    else:
        file.write_bytes(whole[: len(whole) // 2] if damage == "cut" else b"not a zip")
    with pytest.raises(ValueError, match=r"cannot read .*weights\.npz"):
        Siglip2NaflexPacking.from_pretrained(file)


# ---------------------------------------------------------------- files and folders


def test_a_weight_file_inside_a_checkpoint_folder_is_that_folder(golden):
    file = golden / "dinov3" / "model.safetensors"
    model, same = DINOv3ViTPacking.from_pretrained(file), DINOv3ViTPacking.from_pretrained(file.parent)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), same.state_dict().values(), strict=True))


def test_what_is_no_checkpoint_is_said_in_words_that_help(golden, tmp_path):
    save_file(
        {"conv1.weight": torch.zeros(4, 3, 2, 2), "transformer.layers.0.mlp.0.weight": torch.zeros(8, 4)},
        tmp_path / "a.safetensors",
    )
    save_file({"head.bias": torch.zeros(3)}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"blocks.0.ls1.gamma": torch.zeros(3), "pos_embed": torch.zeros(3)}, tmp_path / "dinov2.safetensors")
    shutil.copy(golden / "siglip2" / "model.safetensors", tmp_path / "siglip.safetensors")
    (tmp_path / "notes.txt").write_text("none")
    for name, words in {
        "a.safetensors": "looks like a LlavaViT checkpoint without config.json: convert it: llava-packing convert",
        "model-00001-of-00002.safetensors": "is one shard of a checkpoint: give its folder",
        "dinov2.safetensors": "looks like a DINOv2: there is no packed encoder",
        "siglip.safetensors": "looks like SigLIP2 with transformers' names: it needs its config.json",
        "notes.txt": "is a file of no known kind: weights end in .pt, .pth",
        "missing.pth": "does not exist",
        ".": "give the file itself",
    }.items():
        with pytest.raises(ValueError, match=re.escape(words)):
            open_checkpoint(str(tmp_path / name))


def test_convert_takes_no_name_for_them_but_the_heads(golden, tmp_path, capsys):
    file = str(golden / "authors" / "aimv2_apple_native.safetensors")
    out = ["--output_dir", str(tmp_path / "out"), "--no-verify"]
    assert main(["convert", file, *out]) == 2 and "--num_attention_heads" in capsys.readouterr().err
    assert main(["convert", file, *out, "--model_name", "llava_vit_large_ln"]) == 2
    assert "is Apple's own file of AIMv2, not a llava_vit_large_ln" in capsys.readouterr().err
    assert main(["convert", file, *out, "--num_attention_heads", "2"]) == 0


# ---------------------------------------------------------------- hub ids


HUB_FILES = {
    "config.json": b"{}",
    "preprocessor_config.json": b"{}",
    "tokenizer.json": b"{}",
    "model.safetensors": b"",
    "model.fp16.safetensors": b"",
    "open_clip_model.safetensors": b"",
    "mlx_model.safetensors": b"",
    "pytorch_model.bin": b"",
    "onnx/model.json": b"",
}


DESCRIBED = {"config.json", "preprocessor_config.json"}
SHARDS = {"w-1-of-2.safetensors", "w-2-of-2.safetensors"}
INDEX = json.dumps({"weight_map": dict(zip("ab", sorted(SHARDS)))}).encode()
SHARDED = HUB_FILES | {"model.safetensors.index.json": INDEX} | dict.fromkeys(SHARDS, b"")


@pytest.mark.parametrize(
    ("repository", "wanted"),
    [
        (HUB_FILES, DESCRIBED | {"model.safetensors"}),
        (HUB_FILES | {"model.safetensors": None}, DESCRIBED | {"pytorch_model.bin"}),
        (SHARDED, DESCRIBED | SHARDS | {"model.safetensors.index.json"}),
        (
            {f"vision/{name}": content for name, content in HUB_FILES.items()},
            {f"vision/{name}" for name in DESCRIBED | {"model.safetensors"}},
        ),
    ],
)
def test_a_hub_id_fetches_only_what_is_read(tmp_path, monkeypatch, repository, wanted):
    fetched = set()

    def snapshot_download(name, allow_patterns, **_):
        for file, content in repository.items():
            if content is not None and any(fnmatch(file, pattern) for pattern in allow_patterns):
                fetched.add(file)
                (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / file).write_bytes(content)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    subfolder = "vision" if any(name.startswith("vision/") for name in repository) else ""
    assert resolve_folder("owner/name", subfolder) == tmp_path / subfolder
    assert fetched == wanted


def test_rotary_positions_that_timm_stretches_are_refused(golden, tmp_path):
    """A reference grid other than the table's, said by the arguments or by the published model of that name."""
    folder = shutil.copytree(golden / "authors" / "pe_core_timm", tmp_path / "pe")
    told = json.loads((folder / "config.json").read_text())
    for reference in ([3, 4], None):
        told["model_args"]["ref_feat_shape"] = reference
        told["model_args"] = {name: value for name, value in told["model_args"].items() if value is not None}
        (folder / "config.json").write_text(json.dumps(told))
        with pytest.raises(ValueError, match=r"to (3 x 4|24 x 24) \(ref_feat_shape\), and its table has 4 x 4"):
            PerceptionEncoderPacking.from_pretrained(folder)


# Meta's PE-Spatial: width, layers, heads, patch, side, inner width, class token, layer scale.
PE_SPATIAL = {
    "T16-512": (192, 12, 3, 16, 512, 768, True, False),
    "L14-448": (1024, 24, 16, 14, 448, 4096, True, False),
    "G14-448": (1536, 50, 16, 14, 448, 8960, False, True),
}


@pytest.mark.parametrize("size", PE_SPATIAL)
def test_metas_files_of_pe_spatial(size):
    """By their shapes: without pooling and norm they are told from a CLIP by what they lack."""
    width, layers, _, patch, side, inner, token, scaled = PE_SPATIAL[size]
    shapes = {"conv1.weight": (width, 3, patch, patch), "positional_embedding": ((side // patch) ** 2 + token, width)}
    shapes |= {"class_embedding": (width,)} if token else {}
    shapes |= {f"ln_pre.{kind}": (width,) for kind in ("weight", "bias")}
    for i in range(layers):
        block = f"transformer.resblocks.{i}."
        shapes |= {f"{block}ln_{n}.{kind}": (width,) for n in (1, 2) for kind in ("weight", "bias")}
        shapes |= {f"{block}attn.in_proj_weight": (3 * width, width), f"{block}attn.in_proj_bias": (3 * width,)}
        shapes |= {f"{block}attn.out_proj.weight": (width, width), f"{block}attn.out_proj.bias": (width,)}
        shapes |= {f"{block}mlp.c_fc.weight": (inner, width), f"{block}mlp.c_fc.bias": (inner,)}
        shapes |= {f"{block}mlp.c_proj.weight": (width, inner), f"{block}mlp.c_proj.bias": (width,)}
        shapes |= {f"{block}ls_{n}.gamma": (width,) for n in (1, 2) if scaled}
    assert recognized({}, shapes, "file").model_type == "perception_encoder_meta"
    config, plan = PerceptionEncoderPacking.plan({"model_type": "perception_encoder_meta"}, shapes)
    found = (config.hidden_size, config.num_hidden_layers, config.num_attention_heads, config.patch_size)
    assert (*found, config.image_size, config.intermediate_size) == PE_SPATIAL[size][:6]
    assert (config.class_token, config.layer_scale, config.norm_post) == (token, scaled, False)
    with torch.device("meta"):
        model = PerceptionEncoderPacking(config)
    assert not plan_problems(plan, shapes, parameter_shapes(model))
    clip = {**shapes, "ln_post.weight": (width,), "ln_post.bias": (width,), "proj": (width, 512)}
    assert scaled or recognized({}, clip, "file") is None
