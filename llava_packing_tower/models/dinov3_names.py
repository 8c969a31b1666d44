"""DINOv3 as Meta and timm publish it: sizes from the tensors, and the names of both.

Meta's files are those of https://github.com/facebookresearch/dinov3 (``dinov3_vitl16_pretrain_lvd1689m-....pth``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from ..checkpoint.key_map import KeyMap, Rule, Target
from ..checkpoint.opening import blocks_of
from .foreign_config import Shapes, heads_of, patch_of, shape_of, timm_arguments, timm_image_size

META, TIMM = "dinov3_meta", "dinov3_timm"
PUBLISHED_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 20, 4096: 32}
SATELLITE = {"image_mean": (0.430, 0.411, 0.296), "image_std": (0.213, 0.156, 0.143)}
"""Pixel statistics of the satellite models (``sat493m``), of which Meta's files say nothing but in their name."""


def fields_of(raw: Mapping, shapes: Shapes) -> dict:
    """Config fields of Meta's or timm's weights. Raises ``ValueError`` where they contradict each other."""
    meta = raw["model_type"] == META
    wide, gate, registers = ("w2", "w1", "storage_tokens") if meta else ("fc1_x", "fc1_g", "reg_token")
    gated = f"blocks.0.mlp.{gate}.weight" in shapes
    sizes = patch_of(shapes, "patch_embed.proj.weight")
    biases = "blocks.0.attn.qkv.bias" if meta else "blocks.0.attn.q_bias"
    fields = {
        **sizes,
        "intermediate_size": shape_of(shapes, f"blocks.0.mlp.{wide if gated else 'fc1'}.weight", 2)[0],
        "num_hidden_layers": blocks_of(shapes, r"blocks\.(\d+)\.norm1\.weight"),
        "use_gated_mlp": gated,
        "hidden_act": "silu" if gated else "gelu",
        "num_register_tokens": shapes[registers][1] if registers in shapes else 0,
        "query_bias": biases in shapes,
        "value_bias": biases in shapes,
        # A bias of k that is masked is none.
        "key_bias": meta and biases in shapes and f"{biases}_mask" not in shapes,
        "proj_bias": "blocks.0.attn.proj.bias" in shapes,
        "mlp_bias": f"blocks.0.mlp.{wide if gated else 'fc1'}.bias" in shapes,
        "image_size": timm_image_size(raw, 224),
    }
    if meta:
        periods = raw["rope_embed.periods"]
        fields["num_attention_heads"] = sizes["hidden_size"] // (4 * len(periods))
        fields["rope_theta"] = theta_of(periods)
        return fields
    arguments = timm_arguments(raw, ("num_heads", "rope_temperature", "init_values"))
    fields["num_attention_heads"] = heads_of(raw, sizes["hidden_size"], PUBLISHED_HEADS, "timm's DINOv3")
    fields["rope_theta"] = float(arguments.get("rope_temperature", 100.0))
    return fields


def theta_of(periods: list[float]) -> float:
    """The base of the rotary frequencies, from the periods ``theta ** (k / count)`` that Meta's files hold.

    Raises ``ValueError`` for periods that are no such powers (``min_period`` and ``max_period`` were given).
    """
    count, found = len(periods), torch.tensor(periods, dtype=torch.float64)
    theta = 100.0 if count == 1 else float(found[-1] ** (count / (count - 1)))
    theta = 100.0 if abs(theta - 100.0) < 1.0 else theta  # as published; the file may hold them in bfloat16
    wanted = theta ** (torch.arange(count, dtype=torch.float64) / count)
    if not torch.allclose(found, wanted, rtol=1e-2):
        raise ValueError(f"rope_embed.periods are no powers of one base: {periods[0]:g} to {periods[-1]:g}")
    return theta


def _part(index: int) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    def cut(bias: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        parts = (bias * mask.to(bias.dtype)).chunk(3)
        if not bias.is_meta and parts[1].any():
            raise ValueError("the bias of k is not masked, as it is in every published DINOv3 that has one")
        return parts[index]

    return cut


_BLOCK = r"blocks\.(\d+)"
_BIAS = (r"blocks.\1.attn.qkv.bias", r"blocks.\1.attn.qkv.bias_mask")
_MASKED = [
    Rule(rf"encoder.layers.\1.self_attn.qkv.{name}_bias", _part(index), _BIAS) for name, index in (("q", 0), ("v", 2))
]
_COMMON = {
    rf"{_BLOCK}\.norm([12])\.(weight|bias)": r"encoder.layers.\1.layer_norm\2.\3",
    rf"{_BLOCK}\.attn\.qkv\.weight": r"encoder.layers.\1.self_attn.qkv.weight",
    rf"{_BLOCK}\.attn\.proj\.(weight|bias)": r"encoder.layers.\1.self_attn.proj.\2",
    rf"{_BLOCK}\.mlp\.fc([12])\.(weight|bias)": r"encoder.layers.\1.mlp.fc\2.\3",
}


def _prefix(registers: str) -> Rule:
    return Rule("prefix.weight", lambda *tokens: torch.cat(tokens, dim=1).flatten(0, 1), ("cls_token", registers))


def key_map(raw: Mapping, shapes: Shapes) -> KeyMap:
    """The names of Meta's or timm's weights; biases and register tokens as these weights have them."""
    registers = "storage_tokens" if raw["model_type"] == META else "reg_token"
    prefix = _prefix(registers) if registers in shapes else Rule("prefix.weight", lambda token: token.flatten(0, 1))
    renames: dict[str, Target] = {**_COMMON, rf"cls_token|{registers}": prefix}
    if raw["model_type"] == TIMM:
        return KeyMap(
            renames={
                **renames,
                rf"{_BLOCK}\.attn\.([qv])_bias": r"encoder.layers.\1.self_attn.qkv.\2_bias",
                rf"{_BLOCK}\.gamma_([12])": r"encoder.layers.\1.layer_scale\2.weight",
                rf"{_BLOCK}\.mlp\.fc1_g\.(weight|bias)": r"encoder.layers.\1.mlp.gate.\2",
                rf"{_BLOCK}\.mlp\.fc1_x\.(weight|bias)": r"encoder.layers.\1.mlp.fc1.\2",
            },
            dropped={r"(head|fc_norm)\..*": "classifier head"},
        )
    masked = any(name.endswith(".bias_mask") for name in shapes)
    whole = r"encoder.layers.\1.self_attn.qkv.bias"
    return KeyMap(
        renames={
            **renames,
            rf"{_BLOCK}\.attn\.qkv\.bias(?:_mask)?": _MASKED if masked else whole,
            rf"{_BLOCK}\.ls([12])\.gamma": r"encoder.layers.\1.layer_scale\2.weight",
            rf"{_BLOCK}\.mlp\.w1\.(weight|bias)": r"encoder.layers.\1.mlp.gate.\2",
            rf"{_BLOCK}\.mlp\.w2\.(weight|bias)": r"encoder.layers.\1.mlp.fc1.\2",
            rf"{_BLOCK}\.mlp\.w3\.(weight|bias)": r"encoder.layers.\1.mlp.fc2.\2",
        },
        dropped={
            r"mask_token": "stands for hidden patches in pretraining; no image has any",
            r"rope_embed\.periods": "rotary frequencies, computed from rope_theta",
            r"(local_)?cls_norm\..*": "norm of the CLS token alone, of which the packed encoder returns nothing",
        },
    )
