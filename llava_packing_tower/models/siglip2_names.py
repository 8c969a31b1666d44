"""SigLIP2 NaFlex as timm and Google's big_vision publish it: sizes from the tensors, and the names of both.

Google's files are those of https://github.com/google-research/big_vision (``siglip2_so400m16_naflex.npz``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch

from ..checkpoint.key_map import KeyMap, Rule
from ..checkpoint.opening import blocks_of
from .foreign_config import Shapes, heads_of, shape_of, timm_arguments

TIMM, BIG_VISION = "siglip2_timm", "siglip2_big_vision"
PUBLISHED_HEADS = {768: 12, 1152: 16}
_CHANNELS = 3  # a row of pixels does not say how it divides into channels


def fields_of(raw: Mapping, shapes: Shapes) -> dict:
    """Config fields of timm's or Google's weights. Raises ``ValueError`` for a model of one resolution."""
    return _timm_fields(raw, shapes) if raw["model_type"] == TIMM else _big_vision_fields(shapes)


def _sizes(hidden: int, pixels: int, table: tuple[int, ...]) -> dict:
    patch = math.isqrt(pixels // _CHANNELS)
    if patch**2 * _CHANNELS != pixels or table[-1] != hidden or table[-3] != table[-2]:
        raise ValueError(
            f"patches of {pixels} numbers and a position table {list(table)} are not those of a SigLIP2 NaFlex"
        )
    return {"hidden_size": hidden, "patch_size": patch, "num_channels": _CHANNELS, "num_patches": table[-2] ** 2}


def _timm_fields(raw: Mapping, shapes: Shapes) -> dict:
    timm_arguments(raw)
    hidden, pixels = shape_of(shapes, "embeds.proj.weight", 2)
    sizes = _sizes(hidden, pixels, shape_of(shapes, "embeds.pos_embed", 4))
    return {
        **sizes,
        "num_attention_heads": heads_of(raw, sizes["hidden_size"], PUBLISHED_HEADS, "timm's SigLIP2 NaFlex"),
        "num_hidden_layers": blocks_of(shapes, r"blocks\.(\d+)\.norm1\.weight"),
        "intermediate_size": shape_of(shapes, "blocks.0.mlp.fc1.weight", 2)[0],
    }


def _big_vision_fields(shapes: Shapes) -> dict:
    start = next(iter(name for name in shapes if name.endswith("img/embedding/kernel"))).removesuffix(
        "embedding/kernel"
    )
    kernel = shapes[f"{start}embedding/kernel"]
    if len(kernel) != 2:
        raise ValueError(
            "this is Google's own file of a SigLIP2 (or SigLIP) with one resolution, whose encoder is another one; "
            "NaFlex files (siglip2_..._naflex.npz) are read"
        )
    sizes = _sizes(kernel[1], kernel[0], shape_of(shapes, f"{start}pos_embedding", 3))
    stacked = f"{start}Transformer/encoderblock/LayerNorm_0/scale"
    block = f"{start}Transformer/encoderblock{'' if stacked in shapes else '_0'}"
    extra = 1 if stacked in shapes else 0
    count = (
        shapes[stacked][0] if extra else blocks_of(shapes, rf"{start}Transformer/encoderblock_(\d+)/LayerNorm_0/scale")
    )
    query = shape_of(shapes, f"{block}/MultiHeadDotProductAttention_0/query/kernel", 3 + extra)
    return {
        **sizes,
        "num_attention_heads": query[-2],
        "num_hidden_layers": count,
        "intermediate_size": shape_of(shapes, f"{block}/MlpBlock_0/Dense_0/kernel", 2 + extra)[-1],
    }


TIMM_KEY_MAP = KeyMap(
    renames={
        r"embeds\.proj\.(weight|bias)": r"patch_embed.\1",
        r"embeds\.pos_embed": ("position_embedding.weight", lambda table: table.flatten(0, -2)),
        r"blocks\.(\d+)\.norm([12])\.(weight|bias)": r"encoder.layers.\1.layer_norm\2.\3",
        r"blocks\.(\d+)\.attn\.(qkv|proj)\.(weight|bias)": r"encoder.layers.\1.self_attn.\2.\3",
        r"blocks\.(\d+)\.mlp\.(fc[12])\.(weight|bias)": r"encoder.layers.\1.mlp.\2.\3",
        r"norm\.(weight|bias)": r"post_layernorm.\1",
    },
    dropped={
        r"attn_pool\..*": "pooling head: the packed encoder returns patch tokens",
        r"(head|fc_norm)\..*": "classifier head",
    },
)


def _turned(kernel: torch.Tensor) -> torch.Tensor:
    """A JAX kernel ``[in, out]`` as a weight ``[out, in]``."""
    return kernel.transpose(0, 1)


def _qkv_weight(*kernels: torch.Tensor) -> torch.Tensor:
    """``[hidden, heads, head_dim]`` each."""
    return torch.cat([kernel.flatten(1).transpose(0, 1) for kernel in kernels])


def _qkv_bias(*biases: torch.Tensor) -> torch.Tensor:
    return torch.cat([bias.flatten() for bias in biases])


def _block_rules(block: str, number: str, stacked: bool) -> dict[str, Rule]:
    """Rules for ``encoderblock_7``, or for ``encoderblock`` with all of them stacked (JAX's ``scan``)."""
    layer, attention = f"encoder.layers.{number}", f"{block}/MultiHeadDotProductAttention_0"
    parts = ("query", "key", "value")
    plain = block.replace(r"(\d+)", r"\1")
    rules: dict[str, Rule] = {}

    def add(name: str, target: str, build: Callable[..., torch.Tensor] = lambda t: t, sources: tuple = ()) -> None:
        rules[name] = Rule(f"{layer}.{target}", build, sources, stacked)

    for kind, target, build in (("kernel", "weight", _qkv_weight), ("bias", "bias", _qkv_bias)):
        sources = tuple(f"{plain}/MultiHeadDotProductAttention_0/{part}/{kind}" for part in parts)
        add(rf"{attention}/(?:query|key|value)/{kind}", f"self_attn.qkv.{target}", build, sources)
    add(rf"{attention}/out/kernel", "self_attn.proj.weight", lambda kernel: _turned(kernel.flatten(0, 1)))
    add(rf"{attention}/out/bias", "self_attn.proj.bias")
    for index in (0, 1):
        add(rf"{block}/LayerNorm_{index}/scale", f"layer_norm{index + 1}.weight")
        add(rf"{block}/LayerNorm_{index}/bias", f"layer_norm{index + 1}.bias")
        add(rf"{block}/MlpBlock_0/Dense_{index}/kernel", f"mlp.fc{index + 1}.weight", _turned)
        add(rf"{block}/MlpBlock_0/Dense_{index}/bias", f"mlp.fc{index + 1}.bias")
    return rules


BIG_VISION_KEY_MAP = KeyMap(
    prefix=r"(params/)?img/",
    renames={
        r"embedding/kernel": ("patch_embed.weight", _turned),
        r"embedding/bias": "patch_embed.bias",
        r"pos_embedding": ("position_embedding.weight", lambda table: table.flatten(0, -2)),
        r"Transformer/encoder_norm/scale": "post_layernorm.weight",
        r"Transformer/encoder_norm/bias": "post_layernorm.bias",
        **_block_rules(r"Transformer/encoderblock_(\d+)", r"\1", stacked=False),
        **_block_rules(r"Transformer/encoderblock", "{block}", stacked=True),
    },
    dropped={
        r"(params/)?img/MAPHead_0/.*": "pooling head: the packed encoder returns patch tokens",
        r"(params/)?img/head/.*": "projection for image-text matching",
        r"(params/)?txt/.*": "text tower",
        r"(params/)?[tb]": "image-text similarity",
        r"opt/.*": "state of the optimizer",
    },
)
KEY_MAPS = {TIMM: TIMM_KEY_MAP, BIG_VISION: BIG_VISION_KEY_MAP}
