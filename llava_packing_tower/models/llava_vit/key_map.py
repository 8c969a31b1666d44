"""Tensor names of LlavaViT in its three spellings: standard (``llava_vit``, ``onevision_encoder``), packing, source.

``source`` is the timm-style state dict of the training code (``backbone.pt``); it has no config.json and the
``model_type`` that stands for it here is ``llava_vit_source``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch

from ...checkpoint.key_map import KeyMap
from ...checkpoint.weights import Recipe, WeightPlan

SOURCE_TYPE = "llava_vit_source"
_TABLES = {r"(.*\.)?inv_freq(_[thw])?": "rotary frequencies, computed from rope_theta"}

STANDARD_TO_PACKING = KeyMap(
    qkv=r"encoder\.layers\.(?P<block>\d+)\.self_attn\.(?P<part>[qkv])_proj\.(?P<kind>weight|bias)",
    renames={
        r"embeddings\.patch_embedding\.weight": "patch_embed.proj.weight",
        r"(encoder\.layers\.\d+\.self_attn)\.out_proj\.(weight|bias)": r"\1.proj.\2",
    },
    dropped=_TABLES,
)

SOURCE_TO_PACKING = KeyMap(
    qkv=r"$^",  # the source has q, k and v in one tensor already
    renames={
        r"conv1\.weight": "patch_embed.proj.weight",
        r"ln_(pre|post)\.(weight|bias)": r"layernorm_\1.\2",
        r"transformer\.layers\.(\d+)\.ln_([12])\.(weight|bias)": r"encoder.layers.\1.layer_norm\2.\3",
        r"transformer\.layers\.(\d+)\.attn\.in_proj\.(weight|bias)": r"encoder.layers.\1.self_attn.qkv.\2",
        r"transformer\.layers\.(\d+)\.attn\.out_proj\.(weight|bias)": r"encoder.layers.\1.self_attn.proj.\2",
        r"transformer\.layers\.(\d+)\.mlp\.0\.(weight|bias)": r"encoder.layers.\1.mlp.fc1.\2",
        r"transformer\.layers\.(\d+)\.mlp\.2\.(weight|bias)": r"encoder.layers.\1.mlp.fc2.\2",
    },
    dropped=_TABLES,
)


def plan_packing(model_type: str, shapes: Mapping[str, tuple[int, ...]]) -> WeightPlan:
    """How the packing model is filled from a checkpoint of this ``model_type``."""
    return (SOURCE_TO_PACKING if model_type == SOURCE_TYPE else STANDARD_TO_PACKING).plan(shapes)


# The way to the standard names is written out on its own, not derived from the tables above: conversions are verified
# by comparing a model that was filled by those with one that was filled by this.
_FUSED = {
    "llava_vit_packing": re.compile(r"(encoder\.layers\.\d+\.self_attn)\.qkv\.(weight|bias)"),
    SOURCE_TYPE: re.compile(r"(transformer\.layers\.\d+\.attn)\.in_proj\.(weight|bias)"),
}
_PIECES = {
    "llava_vit_packing": {
        "patch_embed.proj.": "embeddings.patch_embedding.",
        ".self_attn.proj.": ".self_attn.out_proj.",
    },
    SOURCE_TYPE: {
        "conv1.": "embeddings.patch_embedding.",
        "ln_pre.": "layernorm_pre.",
        "ln_post.": "layernorm_post.",
        "transformer.layers.": "encoder.layers.",
        ".ln_1.": ".layer_norm1.",
        ".ln_2.": ".layer_norm2.",
        ".attn.": ".self_attn.",
        ".mlp.0.": ".mlp.fc1.",
        ".mlp.2.": ".mlp.fc2.",
    },
}


def _third(index: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def cut(fused: torch.Tensor) -> torch.Tensor:
        rows = fused.shape[0] // 3
        return fused[index * rows : (index + 1) * rows]

    return cut


def plan_standard(model_type: str, shapes: Mapping[str, tuple[int, ...]]) -> WeightPlan:
    """How the standard model is filled from a packing checkpoint or a source state dict."""
    plan = WeightPlan()
    for name in shapes:
        if re.fullmatch(next(iter(_TABLES)), name):
            plan.dropped[name] = next(iter(_TABLES.values()))
            continue
        match = _FUSED[model_type].fullmatch(name)
        standard = f"{match[1]}." if match else name
        for old, new in _PIECES[model_type].items():
            standard = standard.replace(old, new)
        if match:
            for index, part in enumerate(("q_proj", "k_proj", "v_proj")):
                plan.recipes[f"{standard}{part}.{match[2]}"] = Recipe((name,), _third(index))
        else:
            plan.recipes[standard] = Recipe((name,))
    return plan
