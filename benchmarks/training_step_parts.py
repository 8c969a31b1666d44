"""The systems that ``training_step.py`` measures: stock LLaVA-NeXT and ours, what a step of each computes, and how
right ours is."""

from __future__ import annotations

import copy
import statistics
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import native_vs_anyres as photos_of
from two_gpu_parts import host_classes
from two_gpu_training import decoder_attention

SWITCHES = {
    "decoder padded": {"mm_packing_decoder": False},
    "all logits": {"mm_packing_full_logits": True},
    "no liger": {"mm_packing_liger": False},
    "all switches off": {"mm_packing_decoder": False, "mm_packing_full_logits": True, "mm_packing_liger": False},
}


class System(NamedTuple):
    name: str
    stock: bool
    ratio: str
    samples: int
    checkpointing: bool
    keys: dict


def systems(tiny: bool, quick: bool = False) -> list[System]:
    """In the order of their turns; the most telling ones first, for a run that is cut short."""
    few, many = (2, 4) if tiny else (4, 16)

    def ours(samples: int, checkpointing: bool, ratio: str = "native", **keys: bool) -> System:
        name = f"ours, {ratio}, {samples} samples, " + ("checkpointing" if checkpointing else "no checkpointing")
        return System(name, False, ratio, samples, checkpointing, keys)

    def stock(samples: int) -> System:
        return System(f"stock, CLIP, anyres, {samples} samples, checkpointing", True, "anyres", samples, True, {})

    if quick:
        found = [stock(few if tiny else 10), ours(many, False), ours(many, True), ours(few, True)]
        found += [ours(many, False, "anyres"), ours(many, False, mm_packing_liger=False)]
        found[-1] = found[-1]._replace(name=f"{found[-1].name}, no liger")
        return found if tiny else [*found, ours(24, False), stock(8)]
    found = [stock(few), ours(few, True), ours(many, True), ours(many, False), ours(few, False)]
    found += [stock(many)] if tiny else [stock(8), stock(10), stock(16)]
    found += [ours(many, True, "anyres"), ours(many, False, "anyres")]
    for name, keys in SWITCHES.items():
        found.append(ours(many, True, **keys)._replace(name=f"ours, native, {many} samples, checkpointing, {name}"))
    few_bare = ours(few, True, mm_packing_liger=False)
    found.append(few_bare._replace(name=f"{few_bare.name}, no liger"))
    return found if tiny else [*found, ours(24, False), ours(48, True)]


# ---------------------------------------------------------------- models


def build_stock(size: dict, dimensions: dict, device: str) -> object:
    """LLaVA's class with its own CLIP tower, random weights."""
    import torch
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    _, config_class, model_class = host_classes()
    tile, dtype = size["tile"], torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "clip-vit-large-patch14-336"
        config = CLIPVisionConfig(
            **dimensions["tower"], image_size=tile, patch_size=photos_of.PATCH, projection_dim=768
        )
        CLIPVisionModel(config).to(dtype).save_pretrained(folder)
        sides = {"size": {"shortest_edge": tile}, "crop_size": {"height": tile, "width": tile}}
        CLIPImageProcessor(**sides).save_pretrained(folder)
        config = config_class(
            **dimensions["decoder"],
            attn_implementation=decoder_attention(device),
            mm_vision_tower=str(folder),
            mm_hidden_size=dimensions["tower"]["hidden_size"],
            mm_vision_select_layer=-2,
            mm_vision_select_feature="patch",
            mm_projector_type="mlp2x_gelu",
            mm_patch_merge_type="spatial_unpad",
            unfreeze_mm_vision_tower=True,
            image_aspect_ratio="anyres",
            image_grid_pinpoints=[[w * tile, h * tile] for w, h in photos_of.GRIDS],
            tokenizer_model_max_length=dimensions["decoder"]["max_position_embeddings"],
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
        model = model_class(config)
        tower = model.get_vision_tower()
        if not tower.is_loaded:
            tower.load_model()
    with torch.no_grad():
        model.get_model().image_newline.normal_(std=0.02)  # LLaVA leaves it uninitialised
    return model.to(device, dtype).requires_grad_(True)


def checkpointing(model: object, on: bool) -> None:
    if on:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return
    model.gradient_checkpointing_disable()
    for module in model.modules():  # the tower is no submodule that transformers would reach in every version
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = False


class StockMode(photos_of.Mode):
    """anyres with LLaVA's own tower, which has nothing to set."""

    def set(self, model: object) -> None:
        model.config.image_aspect_ratio = self.name


# ---------------------------------------------------------------- counting


def step_flops(config: object, tower: dict, tokens: list[int], images: list[int], supervised: int) -> float:
    """Floating-point operations of a step by the rule above.

    tokens: of each sample in the decoder; images: patches of each image or tile, which attend to each other.
    """
    h, i, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    kv = h // config.num_attention_heads * config.num_key_value_heads
    linear = 2 * h * (h + 2 * kv) + 2 * h * h + 6 * h * i
    decoder = layers * sum(n * linear + 2 * n * n * h for n in tokens)  # causal: half of 4 n^2 h
    head = 2 * h * config.vocab_size * supervised
    w, m = tower["hidden_size"], tower["intermediate_size"]
    encoder = tower["num_hidden_layers"] * sum(n * (8 * w * w + 4 * w * m) + 4 * n * n * w for n in images)
    return 3.0 * (decoder + head + encoder)


def matmul_rate(device: str) -> float:
    """Operations per second of one large matmul in bfloat16 (float32 on a CPU)."""
    import torch

    side, repeats = (8192, 40) if device == "cuda" else (256, 5)
    a = torch.randn(side, side, device=device, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
    wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    for _ in range(2):  # the first is a warm-up
        wait()
        began = time.perf_counter()
        for _ in range(repeats):
            a @ a
        wait()
        rate = repeats * 2 * side**3 / (time.perf_counter() - began)
    return rate


def set_keys(model: object, keys: dict) -> None:
    """Set our keys in a model's config, the others to their defaults."""
    from llava_packing_tower.integrations.llava.packed_step import forget_plan

    for name in {name for each in SWITCHES.values() for name in each}:
        setattr(model.config, name, keys.get(name))
    forget_plan(model)


def compare_gradients(model: object, photos: list, size: dict, device: str) -> dict:
    """How far gradients are from float32, in parts of their norm: ours, and those of the host's own path."""
    import torch

    mode = photos_of.Mode("native", (1 if size["tile"] < 100 else 16, (2 * size["tile"] // photos_of.PATCH) ** 2))
    batch = photos_of.make_batch(model, mode, photos, size, model.config.vocab_size)
    model.config.tokenizer_padding_side = "right"
    exact = copy.deepcopy(model).float()
    exact.config._attn_implementation = "sdpa"
    wide = {**batch.given, "images": [image.float() for image in batch.given["images"]]}
    found, losses, plans = {}, {}, {}
    runs = (("float32", exact, "all switches off"), ("host", model, "all switches off"), ("ours", model, None))
    for name, each, switch in runs:
        set_keys(each, SWITCHES.get(switch, {}))
        checkpointing(each, False)
        each.train().zero_grad(set_to_none=True)
        loss = each(**(wide if each is exact else batch.given), labels=batch.labels, use_cache=False).loss
        loss.backward()
        losses[name], plans[name] = loss.item(), str(vars(each).get("_llava_packing_step"))
        found[name] = {key: p.grad.float() for key, p in each.named_parameters() if p.grad is not None}
        each.zero_grad(set_to_none=True)
    assert found["ours"].keys() == found["host"].keys() == found["float32"].keys()

    def away(name: str, key: str) -> float:
        return (torch.norm(found[name][key] - found["float32"][key]) / torch.norm(found["float32"][key])).item()

    errors = {key: (away("ours", key), away("host", key)) for key, g in found["float32"].items() if g.norm() > 0}
    worst = max(errors, key=lambda key: errors[key][0] / max(errors[key][1], 1e-5))
    found.clear()
    del exact
    if device == "cuda":
        torch.cuda.empty_cache()
    return {
        "losses": losses,
        "plans": plans,
        "median error, ours and host": [statistics.median(e[i] for e in errors.values()) for i in (0, 1)],
        "largest ratio": {"tensor": worst, "ours": errors[worst][0], "host": errors[worst][1]},
        "tensors": len(errors),
        "tensors above twice": sum(a > 2 * max(b, 1e-5) for a, b in errors.values()),
    }


def weights(model: object) -> int:
    """Bytes."""
    return sum(p.numel() * p.element_size() for p in model.parameters())
