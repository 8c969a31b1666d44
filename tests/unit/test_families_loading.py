"""Published checkpoints of the families: every naming, strict loading, image processors, towers."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import assert_close
from families import ALL_FAMILIES, GOLDEN_FAMILIES, TINY, pack
from PIL import Image
from safetensors.torch import load_file, save_file

from llava_packing_tower import (
    AIMv2Packing,
    DINOv3ViTPacking,
    HEVCViTPackingVisionTower,
    LlavaViTPackingModel,
    Siglip2NaflexPacking,
)
from llava_packing_tower.checkpoint.weights import WeightFiles
from llava_packing_tower.models.registry import CLASSES, FAMILIES, family_for
from llava_packing_tower.tools.bench.models import PRESETS
from llava_packing_tower.utils.files import read_json

pytestmark = pytest.mark.newest
NAMES = list(GOLDEN_FAMILIES)


def write(folder, config, tensors):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / "model.safetensors")
    return folder


@pytest.fixture
def source(golden):
    """config.json and tensors of a golden checkpoint."""
    return lambda name: (read_json(golden / name / "config.json"), load_file(golden / name / "model.safetensors"))


def dropped(cls, folder):
    config = read_json(folder / "config.json")
    shapes = WeightFiles(folder).shapes()
    return cls.plan_from_source(config, cls.config_from_source(config, shapes), shapes).dropped


def check(cls, folder, expected):
    model = cls.from_pretrained(folder)
    assert_close(model(expected["patches"], expected["grid_thw"]), expected["last_hidden_state"])
    return model


TEXT = {"text_model.embeddings.token_embedding.weight": torch.ones(5, 2), "logit_scale": torch.ones(1)}


def test_full_siglip2_with_text_tower(tmp_path, source, golden_case):
    config, tensors = source("siglip2")
    vision = {key: value for key, value in config.items() if key not in ("architectures", "dtype")}
    full = {"model_type": "siglip2", "architectures": ["Siglip2Model"], "vision_config": vision}
    full["text_config"] = {"model_type": "siglip2_text_model", "hidden_size": 2, "num_hidden_layers": 99}
    folder = write(tmp_path / "full", full, {**tensors, **TEXT, "logit_bias": torch.ones(1)})
    model = check(Siglip2NaflexPacking, folder, golden_case("siglip2", "images"))
    assert model.config.num_hidden_layers == 2 and model.config.image_size == 24
    reasons = dropped(Siglip2NaflexPacking, folder)
    assert reasons["logit_bias"] == reasons["logit_scale"] == "image-text similarity"
    assert reasons["text_model.embeddings.token_embedding.weight"] == "text tower"
    heads = {key for key, why in reasons.items() if why.startswith("pooling head")}
    assert heads == {key for key in tensors if ".head." in key} and len(heads) == 11


def test_siglip2_without_prefix_and_with_other_spellings(tmp_path, source, golden_case):
    config, tensors = source("siglip2")
    config["embed_dim"], config["layer_norm_epsilon"] = config.pop("hidden_size"), config.pop("layer_norm_eps")
    bare = {key.removeprefix("vision_model."): value for key, value in tensors.items()}
    model = check(Siglip2NaflexPacking, write(tmp_path / "x", config, bare), golden_case("siglip2", "images"))
    assert model.config.hidden_size == 48 and model.config.layer_norm_eps == 1e-6
    config["layer_norm_epsilon"] = 1e-3
    assert Siglip2NaflexPacking.config_from_source(config).layer_norm_eps == 1e-3


def test_aimv2_lit_with_text_tower(tmp_path, source, golden_case):
    config, tensors = source("aimv2_learned")
    full = {"model_type": "aimv2", "projection_dim": 4, "vision_config": config, "text_config": {"hidden_size": 2}}
    prefixed = {f"vision_model.{key}": value for key, value in tensors.items()}
    extra = {"visual_projection.weight": torch.ones(4, 32), "text_projection.weight": torch.ones(4, 2)}
    folder = write(tmp_path / "lit", full, {**prefixed, **TEXT, **extra})
    check(AIMv2Packing, folder, golden_case("aimv2_learned", "images"))
    assert len(dropped(AIMv2Packing, folder)) == 5 + 2 + 2


def remote_code_names(tensors):
    """The golden tensors under the names of the earlier files: fused qkv, fc1 the gate, fc3 up, fc2 down."""
    renamed = {}
    for key, value in tensors.items():
        for old, new in (
            ("embeddings.patch_embed.", "preprocessor.patchifier.proj."),
            ("embeddings.rms_norm.", "preprocessor.patchifier.norm."),
            ("embeddings.position_embedding.weight", "preprocessor.pos_embed"),
            ("encoder.layers.", "trunk.blocks."),
            (".rms_norm1.", ".norm_1."),
            (".rms_norm2.", ".norm_2."),
            (".attention.out_proj.", ".attn.proj."),
            (".ffn.gate_proj.", ".mlp.fc1."),
            (".ffn.up_proj.", ".mlp.fc3."),
            (".ffn.down_proj.", ".mlp.fc2."),
            ("head.k_proj.", "head.k."),
            ("head.v_proj.", "head.v."),
            ("head.output_proj.", "head.linear."),
        ):
            key = key.replace(old, new)
        renamed["trunk.post_trunk_norm.weight" if key == "rms_norm.weight" else key] = value
    for key in [key for key in renamed if ".attention.q_proj." in key]:
        parts = [renamed.pop(key.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        renamed[key.replace("attention.q_proj", "attn.qkv")] = torch.cat(parts)
    if "preprocessor.pos_embed" in renamed:
        renamed["preprocessor.pos_embed"] = renamed["preprocessor.pos_embed"].unsqueeze(0)
    return renamed


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("name", ["aimv2_native", "aimv2_learned"])
def test_aimv2_remote_code_files(tmp_path, source, golden_case, name, whole):
    """Their config has model_type aimv2, other field names, and does not say whether positions are learned."""
    config, tensors = source(name)
    for key in ("is_native", "use_head", "mlp_bias", "hidden_act", "initializer_range"):
        del config[key]
    config.update(model_type="aimv2", use_bias=False, projection_dropout=0.0, auto_map={"AutoModel": "x.Y"})
    tensors = remote_code_names(tensors)
    if whole:
        config = {"model_type": "aimv2", "vision_config": config}
        tensors = {f"image_encoder.{key}": value for key, value in tensors.items()}
        tensors |= {"text_encoder.trunk.x.weight": torch.ones(1), "log_logit_scale": torch.ones(1)}
        tensors |= {"image_projector.weight": torch.ones(1), "text_projector.weight": torch.ones(1)}
    folder = write(tmp_path / "legacy", config, tensors)
    model = check(AIMv2Packing, folder, golden_case(name, "images"))
    assert model.config.is_native == (name == "aimv2_native")
    assert not any("trunk.blocks" in key and "text" not in key for key in dropped(AIMv2Packing, folder))


def test_aimv2_remote_code_biases():
    legacy = {"model_type": "aimv2", "use_bias": True, "qkv_bias": False}
    config = AIMv2Packing.config_from_source(legacy, {"preprocessor.pos_embed": (1, 256, 1024)})
    assert (config.qkv_bias, config.proj_bias, config.mlp_bias, config.is_native) == (False, True, True, False)
    model = AIMv2Packing(AIMv2Packing.config_class(**{**config.to_dict(), "num_hidden_layers": 1, "hidden_size": 32}))
    block = model.encoder.layers[0]
    assert (
        block.self_attn.qkv.bias is None and block.self_attn.proj.bias is not None and block.mlp.gate.bias is not None
    )


def test_dinov3_in_memory_names_and_mask_token(tmp_path, source, golden_case):
    config, tensors = source("dinov3")
    renamed = {f"model.{key}" if key.startswith("layer.") else key: value for key, value in tensors.items()}
    folder = write(tmp_path / "x", config, renamed)
    check(DINOv3ViTPacking, folder, golden_case("dinov3", "images"))
    assert list(dropped(DINOv3ViTPacking, folder)) == ["embeddings.mask_token"]


def test_dinov3_key_has_no_bias_to_train(golden):
    model = DINOv3ViTPacking.from_pretrained(golden / "dinov3")
    biases = [name for name, _ in model.encoder.layers[0].self_attn.qkv.named_parameters()]
    assert biases == ["weight", "q_bias", "v_bias"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("damage", ["missing", "unexpected", "mis-shaped"])
def test_strict(tmp_path, source, name, damage):
    config, tensors = source(name)
    key = next(k for k in tensors if k.endswith("v_proj.weight"))
    if damage == "missing":
        del tensors[key]
        named = r"qkv\.weight.*v_proj"
    elif damage == "unexpected":
        tensors["vision_model.encoder.layers.0.adapter.weight"] = torch.ones(3)
        named = "adapter"
    else:
        tensors[key] = tensors[key][:, :-1]
        named = r"qkv\.weight"
    with pytest.raises(ValueError, match=rf"(?s)1 {damage}.*{named}"):
        GOLDEN_FAMILIES[name].from_pretrained(write(tmp_path / "x", config, tensors))


@pytest.mark.parametrize("name", NAMES)
def test_every_field_of_the_source_is_carried(source, name):
    config, _ = source(name)
    ours = GOLDEN_FAMILIES[name].config_from_source(config).to_dict()
    skipped = {"architectures", "dtype", "model_type", "transformers_version"}
    assert {key: ours[key] for key in config.keys() - skipped} == {k: v for k, v in config.items() if k not in skipped}


@pytest.mark.parametrize("name", NAMES)
def test_packing_folder_round_trip(tmp_path, golden, golden_case, name):
    from transformers import AutoConfig, AutoModel

    cls, expected = GOLDEN_FAMILIES[name], golden_case(name, "images")
    model = cls.from_pretrained(golden / name)
    model.save_pretrained(tmp_path / "packing")
    again = cls.from_pretrained(tmp_path / "packing")
    assert again.config.to_dict().items() >= {"model_type": cls.config_class.model_type, "patch_size": 4}.items()
    assert all(torch.equal(a, again.state_dict()[key]) for key, a in model.state_dict().items())
    assert torch.equal(again(*pack(again, [expected["pixels.0"]])), model(*pack(model, [expected["pixels.0"]])))
    assert type(AutoConfig.from_pretrained(tmp_path / "packing")) is cls.config_class
    assert type(AutoModel.from_pretrained(tmp_path / "packing")) is cls


@pytest.mark.parametrize("name", NAMES)
def test_constructors_of_the_documents(golden, golden_case, name):
    cls, expected = GOLDEN_FAMILIES[name], golden_case(name, "images")
    inputs = expected["patches"], expected["grid_thw"]
    for model in (cls(ckpt=golden / name, device="cpu"), cls(str(golden / name), "cpu"), cls(ckpt=str(golden / name))):
        assert not model.training
        assert_close(model(*inputs), expected["last_hidden_state"])
    with pytest.raises(ValueError, match="needs a config, or ckpt="):
        cls()
    assert cls(ckpt=golden / name, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_every_family_line_resolves():
    for model_type in FAMILIES:
        cls = family_for(model_type)
        assert model_type in (cls.config_class.model_type, *cls.source_model_types)


def test_every_family_has_a_bench_tests_and_a_page():
    """The registry is the list of families; configurations follow the bench's (tests/hosts/test_shipped_configs.py)."""
    classes = {family_for(types[0]) for types in CLASSES.values()}
    assert classes == {family_for(preset.model_type) for preset in PRESETS.values()}
    assert classes == {cls for cls, _ in TINY.values()} == {*ALL_FAMILIES.values(), LlavaViTPackingModel}
    page = (Path(__file__).parents[2] / "docs" / "families.md").read_text()
    others = classes - {LlavaViTPackingModel}  # the first, which has pages of its own
    assert [cls.__name__ for cls in others if f"`{cls.__name__}`" not in page] == []


# ---------------------------------------------------------------- image processors of published checkpoints

NAFLEX_FILE = {
    "do_convert_rgb": None,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_processor_type": "Siglip2ImageProcessor",
    "image_std": [0.5, 0.5, 0.5],
    "max_num_patches": 256,
    "patch_size": 16,
    "processor_class": "Siglip2Processor",
    "resample": 2,
    "rescale_factor": 0.00392156862745098,
}
AIMV2_FILE = {
    "crop_size": {"height": 224, "width": 224},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_processor_type": "CLIPImageProcessor",
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"shortest_edge": 224},
}
DINOV3_FILE = {
    "crop_size": None,
    "data_format": "channels_first",
    "default_to_square": True,
    "do_center_crop": None,
    "do_convert_rgb": None,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_processor_type": "DINOv3ViTImageProcessorFast",
    "image_std": [0.229, 0.224, 0.225],
    "resample": 2,
    "rescale_factor": 0.00392156862745098,
    "size": {"height": 224, "width": 224},
}
PUBLISHED = [
    (Siglip2NaflexPacking, {}, NAFLEX_FILE, 256),
    (AIMv2Packing, {}, AIMV2_FILE, 224),
    (DINOv3ViTPacking, {}, DINOV3_FILE, 224),
]


def noise(width, height):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("from_file", [True, False])
@pytest.mark.parametrize(("cls", "options", "file", "side"), PUBLISHED)
def test_published_image_processors(tmp_path, cls, options, file, side, from_file):
    """With and without the file: the family's statistics and filter, and a square that the patch divides."""
    config = cls.config_class(**options)
    if from_file:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(file))
    processor = cls.load_image_processor(tmp_path, config)
    assert processor.image_mean == file["image_mean"] and processor.image_std == file["image_std"]
    assert processor.resample == file["resample"] and processor.patch_size == config.patch_size
    assert processor.crop_size == {"height": side, "width": side}
    assert processor.size["shortest_edge"] == side  # what LLaVA asks of any processor
    assert side % config.patch_size == 0 and config.image_size == side
    pixels = processor.preprocess(noise(301, 150), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, side, side)
    processor.save_pretrained(tmp_path / "again")
    again = cls.load_image_processor(tmp_path / "again", config)
    assert again.to_dict() == processor.to_dict()
    assert torch.equal(again(noise(301, 150), return_tensors="pt")["pixel_values"], pixels)


def test_stretched_not_cropped_where_the_file_says_so():
    """DINOv3 and SigLIP2 see the whole photo, AIMv2 (as CLIP) its centre."""
    striped = np.zeros((100, 300, 3), np.uint8)
    striped[:, :60] = 255  # a white band that a centre crop would lose
    for cls, options, file, _ in PUBLISHED:
        processor = cls.image_processor_from_source(file, cls.config_class(**options))
        pixels = processor(Image.fromarray(striped), return_tensors="pt")["pixel_values"][0]
        assert (pixels[:, 100, 2].max() > 0) == (cls is not AIMv2Packing)


def test_sizes_that_the_patch_does_not_divide(caplog):
    config = AIMv2Packing.config_class(is_native=True, patch_size=14)
    odd = AIMv2Packing.image_processor_from_source({**AIMV2_FILE, "crop_size": {"height": 225, "width": 300}}, config)
    assert odd.crop_size == {"height": 224, "width": 294} and "not a multiple of the patch size 14" in caplog.text
    for change in ({"do_center_crop": False}, {"do_resize": False, "do_center_crop": False}):
        free = AIMv2Packing.image_processor_from_source({**AIMV2_FILE, **change}, config)
        pixels = free(noise(301, 150), return_tensors="pt")["pixel_values"]
        expected = (224, 448) if free.do_resize else (154, 308)
        assert tuple(pixels.shape[2:]) == expected
    more = Siglip2NaflexPacking.image_processor_from_source(
        {**NAFLEX_FILE, "max_num_patches": 1024}, Siglip2NaflexPacking.config_class()
    )
    assert more.crop_size == {"height": 512, "width": 512}


# ---------------------------------------------------------------- the tower


def args(**options):
    return SimpleNamespace(mm_vision_select_layer=-1, **options)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("converted", [False, True])
def test_tower_of_every_family(tmp_path, golden, golden_case, name, converted):
    """The original folder behind ``packing:``, or a packing folder: the family follows from model_type."""
    expected, cls = golden_case(name, "images"), GOLDEN_FAMILIES[name]
    where = f"packing:{golden / name}"
    if converted:
        cls.from_pretrained(golden / name).save_pretrained(tmp_path / "my-packing")
        where = str(tmp_path / "my-packing")
    tower = HEVCViTPackingVisionTower(where, args())
    assert type(tower.vision_tower) is cls
    images = [expected[f"pixels.{i}"] for i in range(len(expected["grid_thw"]))]
    assert_close(torch.cat(tower(images)), expected["hidden_states"][-1])
    earlier = HEVCViTPackingVisionTower(where, args(mm_vision_select_feature="cls_patch"))
    earlier.select_layer = -2
    assert_close(torch.cat(earlier(images)), expected["hidden_states"][-2])
    same = torch.stack([images[0], images[0].flip(0)])
    features, h, w = tower(same, return_spatial_dims=True)
    assert features.shape == (2, h * w, tower.hidden_size) and (h, w) == tuple(expected["grid_thw"][0, 1:].tolist())
    assert torch.equal(torch.cat(tower(list(same))), features.flatten(0, 1))
    config = tower.vision_tower.config
    assert tower.hidden_size == config.hidden_size and tower.num_patches_per_side == config.image_size // 4
    processor = tower.image_processor
    assert (processor.image_mean, processor.resample) == (
        cls.default_image_processor(config).image_mean,
        2 if name in ("siglip2", "dinov3") else 3,
    )
    # What comes out of the processor goes into the tower.
    pixels = processor.preprocess(noise(50, 31), return_tensors="pt")["pixel_values"]
    assert tower(pixels).shape == (1, tower.num_patches, tower.hidden_size)


@pytest.mark.parametrize("name", NAMES)
def test_tower_config_before_loading(golden, name):
    tower = HEVCViTPackingVisionTower(f"packing:{golden / name}", args(), delay_load=True)
    loaded = HEVCViTPackingVisionTower(f"packing:{golden / name}", args())
    assert not tower.is_loaded and type(tower.config) is GOLDEN_FAMILIES[name].config_class
    assert (tower.hidden_size, tower.num_patches, tower.image_size) == (
        loaded.hidden_size,
        loaded.num_patches,
        loaded.image_size,
    )


@pytest.mark.parametrize("name", NAMES)
def test_tower_rebuilt_from_a_llava_checkpoint(golden, golden_case, name):
    """No folder: the config in the LLaVA checkpoint is enough, JSON types only."""
    tower = HEVCViTPackingVisionTower(f"packing:{golden / name}", args())
    saved = json.loads(json.dumps(tower.packing_config()))
    again = HEVCViTPackingVisionTower("packing:/gone", args(mm_packing_config=saved))
    again.load_state_dict(tower.state_dict())
    images = golden_case(name, "images")["pixels.0"].unsqueeze(0)
    assert torch.equal(again(images), tower(images))
    assert again.image_processor.to_dict() == tower.image_processor.to_dict()
