"""AIMv2 without a config.json: Apple's own weights (https://github.com/apple/ml-aim) and timm's; sizes from the
tensors, and the names of timm. (Apple's names are those of the remote-code files, see ``aimv2``.)"""

from __future__ import annotations

import math
from collections.abc import Mapping

from ..checkpoint.key_map import KeyMap
from ..checkpoint.opening import blocks_of
from .foreign_config import Shapes, heads_of, patch_of, shape_of, timm_arguments

APPLE, TIMM = "aimv2_apple", "aimv2_timm"
PUBLISHED_HEADS = {768: 6, 1024: 8, 1536: 12, 2048: 16, 3072: 24}


def fields_of(raw: Mapping, shapes: Shapes) -> dict:
    """Config fields, from the shapes of Apple's or timm's weights. Raises ``ValueError`` where they contradict."""
    if raw["model_type"] == TIMM:
        timm_arguments(raw)
        patch, table, block, gate, norm = "patch_embed.proj.weight", "pos_embed", "blocks", "fc1_g", "norm1"
    else:
        start = "image_encoder." if any(name.startswith("image_encoder.") for name in shapes) else ""
        patch, table = f"{start}preprocessor.patchifier.proj.weight", f"{start}preprocessor.pos_embed"
        block, gate, norm = f"{start}trunk.blocks", "fc1", "norm_1"
    sizes = patch_of(shapes, patch)
    count = shape_of(shapes, table, 3)[1] if table in shapes else 0
    side = math.isqrt(count)
    if side**2 != count:
        raise ValueError(f"{table} holds {count} positions, which are no square")
    return {
        **sizes,
        "num_attention_heads": heads_of(raw, sizes["hidden_size"], PUBLISHED_HEADS, "AIMv2"),
        "num_hidden_layers": blocks_of(shapes, rf"{block.replace('.', chr(92) + '.')}\.(\d+)\.{norm}\.weight"),
        "intermediate_size": shape_of(shapes, f"{block}.0.mlp.{gate}.weight", 2)[0],
        "is_native": count == 0,
        "image_size": side * sizes["patch_size"] if count else 224,
        "qkv_bias": f"{block}.0.attn.qkv.bias" in shapes,
        "proj_bias": f"{block}.0.attn.proj.bias" in shapes,
        "mlp_bias": f"{block}.0.mlp.{gate}.bias" in shapes,
        "use_head": any(".head." in f".{name}" for name in shapes),
    }


TIMM_KEY_MAP = KeyMap(
    renames={
        r"patch_embed\.proj\.(weight|bias)": r"patch_embed.proj.\1",
        r"patch_embed\.norm\.weight": "norm_pre.weight",
        r"pos_embed": ("position_embedding.weight", lambda table: table.flatten(0, -2)),
        r"blocks\.(\d+)\.norm([12])\.weight": r"encoder.layers.\1.layer_norm\2.weight",
        r"blocks\.(\d+)\.attn\.(qkv|proj)\.(weight|bias)": r"encoder.layers.\1.self_attn.\2.\3",
        r"blocks\.(\d+)\.mlp\.fc1_g\.(weight|bias)": r"encoder.layers.\1.mlp.gate.\2",
        r"blocks\.(\d+)\.mlp\.fc1_x\.(weight|bias)": r"encoder.layers.\1.mlp.fc1.\2",
        r"blocks\.(\d+)\.mlp\.fc2\.(weight|bias)": r"encoder.layers.\1.mlp.fc2.\2",
        r"norm\.weight": "norm_post.weight",
    },
    dropped={r"head\..*": "classifier head"},
)
