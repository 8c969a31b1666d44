"""The checkpoints as they are published: every size, every naming, by hub id. Sizes on the meta device, no weights."""

from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import assert_close
from families import ALL_FAMILIES, GOLDEN_FAMILIES
from published import HUB_IDS, make_hub

from llava_packing_tower import AIMv2Packing, DINOv3ViTPacking, Siglip2NaflexPacking
from llava_packing_tower.checkpoint.weights import construction, parameter_shapes, plan_problems
from llava_packing_tower.cli.main import main
from llava_packing_tower.convert.hf_reference import IN_TRANSFORMERS
from llava_packing_tower.integrations.llava import tower_builder
from llava_packing_tower.models.registry import family_for

pytestmark = pytest.mark.newest


def sizes(hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, **more):
    return dict(
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        **more,
    )


def linear(name, rows, columns, bias=True):
    return {f"{name}.weight": (rows, columns), **({f"{name}.bias": (rows,)} if bias else {})}


def layer_norm(name, width):
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def check(source, shapes):
    """The plan fills every parameter, uses every tensor, and loses no number. Returns config, plan and model."""
    cls = family_for(source["model_type"])
    config, plan = cls.plan(source, shapes)
    with construction(torch.float32):
        model = cls(config)
    assert plan_problems(plan, shapes, parameter_shapes(model)) == []
    kept = sum(torch.Size(shape).numel() for name, shape in shapes.items() if name not in plan.dropped)
    assert sum(p.numel() for p in model.parameters()) == kept
    return config, plan, model


# ---------------------------------------------------------------- SigLIP2 NaFlex

SIGLIP2 = {"base": sizes(768, 3072, 12, 12), "so400m": sizes(1152, 4304, 27, 16)}


def siglip2_tensors(c):
    d, wide = c["hidden_size"], c["intermediate_size"]
    shapes = linear("embeddings.patch_embedding", d, 3 * 16 * 16) | {"embeddings.position_embedding.weight": (256, d)}
    for i in range(c["num_hidden_layers"]):
        block = f"encoder.layers.{i}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= linear(f"{block}.self_attn.{part}", d, d)
        shapes |= linear(f"{block}.mlp.fc1", wide, d) | linear(f"{block}.mlp.fc2", d, wide)
        shapes |= layer_norm(f"{block}.layer_norm1", d) | layer_norm(f"{block}.layer_norm2", d)
    shapes |= layer_norm("post_layernorm", d)
    head = {
        "head.probe": (1, 1, d),
        "head.attention.in_proj_weight": (3 * d, d),
        "head.attention.in_proj_bias": (3 * d,),
    }
    head |= linear("head.attention.out_proj", d, d) | layer_norm("head.layernorm", d)
    head |= linear("head.mlp.fc1", wide, d) | linear("head.mlp.fc2", d, wide)
    return {f"vision_model.{name}": shape for name, shape in (shapes | head).items()}


@pytest.mark.parametrize("text", [True, False])
@pytest.mark.parametrize("size", SIGLIP2)
def test_siglip2(size, text):
    vision, shapes = SIGLIP2[size], siglip2_tensors(SIGLIP2[size])
    source = {"model_type": "siglip2_vision_model", **vision}
    if text:  # sizes of the text tower must not be taken for those of the vision tower
        other = {"hidden_size": 640, "num_hidden_layers": 3, "intermediate_size": 5, "num_attention_heads": 5}
        source = {"model_type": "siglip2", "vision_config": source, "text_config": other, "initializer_factor": 1.0}
        shapes |= {"logit_scale": (1,), "logit_bias": (1,), "text_model.embeddings.token_embedding.weight": (256000, 9)}
        shapes |= linear("text_model.encoder.layers.0.self_attn.q_proj", 640, 640) | linear("text_model.head", 9, 9)
    config, plan, model = check(source, shapes)
    assert (config.hidden_size, model.encoder.head_dim) == (vision["hidden_size"], 64 if size == "base" else 72)
    assert {name for name in plan.dropped if "head." not in name and "text" not in name} == (
        {"logit_scale", "logit_bias"} if text else set()
    )
    assert plan.recipes["encoder.layers.11.self_attn.qkv.bias"].sources == tuple(
        f"vision_model.encoder.layers.11.self_attn.{part}_proj.bias" for part in "qkv"
    )


# ---------------------------------------------------------------- AIMv2

AIMV2 = {
    "large": (sizes(1024, 2816, 24, 8), 309),
    "huge": (sizes(1536, 4096, 24, 12), 681),
    "1B": (sizes(2048, 5632, 24, 16), 1234),
    "3B": (sizes(3072, 8192, 24, 24), 2720),
}  # millions of parameters: AIMv2 paper, table 1


def aimv2_tensors(c, image_size, native, head):
    d, wide = c["hidden_size"], c["intermediate_size"]
    shapes = {"embeddings.patch_embed.weight": (d, 3, 14, 14), "embeddings.patch_embed.bias": (d,)}
    shapes |= {"embeddings.rms_norm.weight": (d,), "rms_norm.weight": (d,)}
    if not native:
        shapes["embeddings.position_embedding.weight"] = ((image_size // 14) ** 2, d)
    for i in range(c["num_hidden_layers"]):
        block = f"encoder.layers.{i}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= linear(f"{block}.attention.{part}", d, d, bias=False)
        shapes |= {f"{block}.ffn.gate_proj.weight": (wide, d), f"{block}.ffn.up_proj.weight": (wide, d)}
        shapes |= {f"{block}.ffn.down_proj.weight": (d, wide)}
        shapes |= {f"{block}.rms_norm1.weight": (d,), f"{block}.rms_norm2.weight": (d,)}
    if head:
        shapes |= {"head.cls_token": (1, 1, d), "head.k_proj.weight": (d, d), "head.v_proj.weight": (d, d)}
        shapes |= linear("head.output_proj", d, d)
    return shapes


def aimv2_legacy_tensors(c, image_size, native, head):
    """The files of the remote-code revisions."""
    d, wide = c["hidden_size"], c["intermediate_size"]
    shapes = {"preprocessor.patchifier.proj.weight": (d, 3, 14, 14), "preprocessor.patchifier.proj.bias": (d,)}
    shapes |= {"preprocessor.patchifier.norm.weight": (d,), "trunk.post_trunk_norm.weight": (d,)}
    if not native:
        shapes["preprocessor.pos_embed"] = (1, (image_size // 14) ** 2, d)
    for i in range(c["num_hidden_layers"]):
        block = f"trunk.blocks.{i}"
        shapes |= {f"{block}.attn.qkv.weight": (3 * d, d), f"{block}.attn.proj.weight": (d, d)}
        shapes |= {f"{block}.mlp.{fc}.weight": (wide, d) for fc in ("fc1", "fc3")}
        shapes |= {f"{block}.mlp.fc2.weight": (d, wide)}
        shapes |= {f"{block}.norm_1.weight": (d,), f"{block}.norm_2.weight": (d,)}
    if head:
        shapes |= {"head.cls_token": (1, 1, d), "head.k.weight": (d, d), "head.v.weight": (d, d)}
        shapes |= linear("head.linear", d, d)
    return shapes


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    ("size", "kind", "image_size"),
    [(size, "learned", image_size) for size in AIMV2 for image_size in (224, 336, 448)]
    + [("large", "native", 224), ("large", "lit", 224)],
)
def test_aimv2(size, kind, image_size, legacy):
    vision, millions = AIMV2[size]
    native, lit = kind == "native", kind == "lit"
    make = aimv2_legacy_tensors if legacy else aimv2_tensors
    shapes = make(vision, image_size, native, head=lit)
    source = {**vision, "image_size": image_size, "patch_size": 14}
    if legacy:  # does not say whether positions are learned
        source |= {"model_type": "aimv2", "use_bias": False, "qkv_bias": False, "projection_dropout": 0.0}
    else:
        source |= {"model_type": "aimv2_vision_model", "is_native": native, "use_head": lit}
    if lit:
        prefix = "image_encoder" if legacy else "vision_model"
        shapes = {f"{prefix}.{name}": shape for name, shape in shapes.items()}
        source = {"model_type": "aimv2", "vision_config": source, "text_config": {"hidden_size": 5, "image_size": 9}}
        if legacy:
            shapes |= {"log_logit_scale": (), "text_encoder.trunk.blocks.0.mlp.fc1.weight": (7, 5)}
            shapes |= {"image_projector.weight": (768, 1024), "text_projector.weight": (768, 5)}
        else:
            shapes |= {"logit_scale": (), "text_model.encoder.layers.0.ffn.up_proj.weight": (7, 5)}
            shapes |= {"visual_projection.weight": (768, 1024), "text_projection.weight": (768, 5)}
    config, plan, model = check(source, shapes)
    assert (config.is_native, config.image_size, model.encoder.head_dim) == (native, image_size, 128)
    assert model.fixed_side == (None if native else image_size // 14)
    assert len(plan.dropped) == (9 if lit else 0)
    if image_size == 224:
        assert sum(p.numel() for p in model.parameters()) == pytest.approx(millions * 1e6, rel=0.01)


# ---------------------------------------------------------------- DINOv3

GATED = {"use_gated_mlp": True, "hidden_act": "silu"}
DINOV3 = {
    "vits16": (sizes(384, 1536, 12, 6), 21),
    "vits16plus": (sizes(384, 1536, 12, 6, **GATED), 29),
    "vitb16": (sizes(768, 3072, 12, 12), 86),
    "vitl16": (sizes(1024, 4096, 24, 16), 300),
    "vith16plus": (sizes(1280, 5120, 32, 20, **GATED), 840),
    "vit7b16": (sizes(4096, 8192, 40, 32, query_bias=False, value_bias=False, **GATED), 6716),
}  # millions of parameters: DINOv3 paper, table 2


def dinov3_tensors(c, registers):
    d, wide = c["hidden_size"], c["intermediate_size"]
    shapes = {"embeddings.cls_token": (1, 1, d), "embeddings.mask_token": (1, 1, d)}
    if registers is not None:
        shapes["embeddings.register_tokens"] = (1, registers, d)
    shapes |= {"embeddings.patch_embeddings.weight": (d, 3, 16, 16), "embeddings.patch_embeddings.bias": (d,)}
    for i in range(c["num_hidden_layers"]):
        block = f"layer.{i}"
        for part, flag in (
            ("q", c.get("query_bias", True)),
            ("k", False),
            ("v", c.get("value_bias", True)),
            ("o", True),
        ):
            shapes |= linear(f"{block}.attention.{part}_proj", d, d, bias=flag)
        names = ("gate_proj", "up_proj") if c.get("use_gated_mlp") else ("up_proj",)
        for name in names:
            shapes |= linear(f"{block}.mlp.{name}", wide, d)
        shapes |= linear(f"{block}.mlp.down_proj", d, wide)
        shapes |= layer_norm(f"{block}.norm1", d) | layer_norm(f"{block}.norm2", d)
        shapes |= {f"{block}.layer_scale{n}.lambda1": (d,) for n in (1, 2)}
    return shapes | layer_norm("norm", d)


@pytest.mark.parametrize(
    ("size", "registers"), [*((size, 4) for size in DINOV3), ("vits16", 0), ("vits16", None), ("vits16plus", 7)]
)
def test_dinov3(size, registers):
    settings, millions = DINOV3[size]
    shapes = dinov3_tensors(settings, registers)
    source = {"model_type": "dinov3_vit", "num_register_tokens": registers or 0, **settings}
    config, plan, model = check(source, shapes)
    assert plan.dropped.keys() == {"embeddings.mask_token"} | (
        {"embeddings.register_tokens"} if registers == 0 else set()
    )
    assert model.prefix.weight.shape[0] == 1 + (registers or 0) and config.patch_size == 16
    biases = {name for name, _ in model.encoder.layers[0].self_attn.qkv.named_parameters()} - {"weight"}
    assert biases == (set() if size == "vit7b16" else {"q_bias", "v_bias"})
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(millions * 1e6, rel=0.03)


@pytest.mark.parametrize(
    ("source", "shapes"),
    [
        ({"model_type": "siglip2_vision_model", **SIGLIP2["base"]}, siglip2_tensors(SIGLIP2["base"])),
        ({"model_type": "aimv2_vision_model", **AIMV2["large"][0]}, aimv2_tensors(AIMV2["large"][0], 224, False, True)),
        ({"model_type": "aimv2", **AIMV2["large"][0]}, aimv2_legacy_tensors(AIMV2["large"][0], 224, False, False)),
        ({"model_type": "dinov3_vit", **DINOV3["vits16"][0]}, dinov3_tensors(DINOV3["vits16"][0], None)),
    ],
)
def test_no_tensor_can_be_missing(source, shapes):
    """Each tensor in turn taken away is missed, unless it is one that the packed encoder does not use."""
    cls = family_for(source["model_type"])
    config, plan = cls.plan(source, shapes)
    with construction(torch.float32):
        targets = parameter_shapes(cls(config))
    for name in shapes:
        if name not in plan.dropped and "layers.1" not in name:
            rest = {other: shape for other, shape in shapes.items() if other != name}
            problems = plan_problems(cls.plan_from_source(source, config, rest), rest, targets)
            assert [kind for kind, _, _ in problems].count("missing") == 1, name


def test_fixed_resolution_siglip2_is_not_taken_for_naflex():
    """Its config says siglip: another embedding, which these weights would half fit."""
    with pytest.raises(ValueError, match=r"no packed encoder for model_type 'siglip'; known: .*siglip2_vision_model"):
        family_for("siglip")


# ---------------------------------------------------------------- by hub id


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub cache, as a download leaves it, that holds the golden checkpoints under published names."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    make_hub(tmp_path)


@pytest.mark.parametrize("name", HUB_IDS)
def test_hub_id_in_the_yaml_selects_the_family(hub, golden_case, name):
    """``mm_vision_tower: packing:google/siglip2-...``, through the hook that LLaVA's builder gets."""

    def never(vision_tower_cfg, **_kwargs):
        raise AssertionError("LLaVA's own builder was asked")

    build = tower_builder.hooked(never)
    tower = build(SimpleNamespace(mm_vision_tower=f"packing:{HUB_IDS[name]}", mm_vision_select_layer=-1))
    expected = golden_case(name, "images")
    images = [expected[f"pixels.{i}"] for i in range(sum(key.startswith("pixels.") for key in expected))]
    assert type(tower.vision_tower) is ALL_FAMILIES[name]
    assert_close(torch.cat(tower(images)), expected["hidden_states"][-1])


@pytest.mark.parametrize("cls", [Siglip2NaflexPacking, AIMv2Packing, DINOv3ViTPacking])
def test_hub_id_in_python(hub, golden_case, cls):
    name = next(name for name, family in GOLDEN_FAMILIES.items() if family is cls)
    expected = golden_case(name, "images")
    for model in (cls.from_pretrained(HUB_IDS[name]), cls(ckpt=HUB_IDS[name], device="cpu"), cls(HUB_IDS[name], "cpu")):
        assert_close(model(expected["patches"], expected["grid_thw"]), expected["last_hidden_state"])
    with pytest.raises(ValueError, match="neither a local folder nor a hub id"):
        cls(ckpt="facebook/dinov3-large")  # a name of older guides that was never published


@pytest.mark.usefixtures("small_pictures")
@pytest.mark.parametrize("name", HUB_IDS)
def test_align_takes_a_hub_id(hub, capsys, name):
    if not all(hasattr(transformers, names.vision) for names in IN_TRANSFORMERS.values()):
        pytest.skip(f"transformers {transformers.__version__} lacks the families")
    assert main(["align", "--ckpt", HUB_IDS[name], "--device", "cpu", "--image_size", "16"]) == 0
    assert capsys.readouterr().out.endswith("ALL TESTS PASSED\n")
