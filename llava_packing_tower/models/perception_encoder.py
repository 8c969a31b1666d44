"""Perception Encoder (Core, Lang and Spatial): a class token, a resampled table of positions, and 2-D rotary ones.

Reads Meta's own files and timm's folders (see ``checkpoint.namings``). Model: Bolya et al. 2025,
https://arxiv.org/abs/2504.13181; numerics after Meta's ``VisionTransformer``
(https://github.com/facebookresearch/perception_models). The attention pooling, the projection into the space of texts
and the text tower are not part of the packed encoder.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, PretrainedConfig

from ..checkpoint.config_check import one_side
from ..checkpoint.key_map import KeyMap
from ..checkpoint.opening import blocks_of
from ..checkpoint.weights import Recipe, WeightPlan
from ..data.image_processor import PackingImageProcessor
from ..data.patches import PatchLayout
from ..data.positions import frequency_ladder, positions_of_grids, prefix_indices
from ..data.resampling import Resampling
from ..data.segments import Grid, Segments
from .base import PackedVisionModel, stretched
from .encoder import PackedEncoder
from .foreign_config import Shapes, heads_of, patch_of, shape_of, timm_arguments, timm_image_size
from .layers import BlockConfig, PatchEmbed, Rotary, make_norm
from .position_tables import PrefixPosition, PrefixTokens, ResampledPositions


class PerceptionEncoderPackingConfig(PretrainedConfig):
    """Configuration of :class:`PerceptionEncoderPacking`; sizes of PE-Core-L14-336.

    class_token: whether there is one in front of every image. layer_scale: whether blocks have learned factors (Lang,
        Spatial-G14). norm_post: whether there is a norm behind the last block (Core). image_size: pixels of the table
        of positions.

    Raises ``ValueError`` for sizes that are not square.
    """

    model_type = "perception_encoder_packing"

    def __init__(
        self,
        hidden_size: int = 1024,
        intermediate_size: int = 4096,
        num_hidden_layers: int = 24,
        num_attention_heads: int = 16,
        num_channels: int = 3,
        patch_size: int | Sequence[int] = 14,
        image_size: int | Sequence[int] = 336,
        class_token: bool = True,
        layer_scale: bool = False,
        norm_post: bool = True,
        hidden_act: str = "gelu",
        layer_norm_eps: float = 1e-5,
        rope_theta: float = 10000.0,
        initializer_range: float = 0.02,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_channels = num_channels
        self.patch_size: int = one_side("patch_size", patch_size)
        self.image_size: int = one_side("image_size", image_size)
        self.class_token = class_token
        self.layer_scale = layer_scale
        self.norm_post = norm_post
        self.hidden_act = hidden_act
        self.layer_norm_eps = layer_norm_eps
        self.rope_theta = rope_theta
        self.initializer_range = initializer_range


def rotary_column_row(places: torch.Tensor, head_dim: int, theta: float) -> Rotary:
    """Perception Encoder's rotary table, for the "interleaved" rotation.

    With ``g_k = theta ** (-4k / head_dim)`` neighboring elements are rotated by ``column g_0, column g_1, ...`` in
    the first half of a head, and by ``row g_0, row g_1, ...`` in the second.

    places: float32 ``[N, 2]`` (row, column). Returns cosines and sines, float32 ``[N, 1, head_dim]`` each.
    """
    ladder = frequency_ladder(head_dim // 4, theta, 4.0 / head_dim, places.device)
    angles = (places.flip(1).unsqueeze(-1) * ladder).flatten(1).repeat_interleave(2, dim=1).unsqueeze(1)
    return angles.cos(), angles.sin()


class PerceptionEncoderPacking(PackedVisionModel):
    """The packed Perception Encoder; its outputs are the patch tokens, without the class token.

    Rows are ``(channel, patch row, patch column)``.
    """

    config_class = PerceptionEncoderPackingConfig
    patch_layout = PatchLayout.CHANNEL_FIRST
    source_model_types = ("perception_encoder_timm", "perception_encoder_meta")
    tower_prefix = r"visual\."

    def __init__(self, config: PerceptionEncoderPackingConfig) -> None:
        super().__init__(config)
        block = BlockConfig.of(
            config,
            norm_eps=config.layer_norm_eps,
            layer_scale=1.0 if config.layer_scale else None,
            rotary="interleaved",
        )
        block.check_rotary(2, 4)
        side, norm = config.image_size // config.patch_size, ("layer_norm", config.hidden_size, config.layer_norm_eps)
        self.patch_embed = PatchEmbed(
            config.num_channels, config.hidden_size, config.patch_size, bias=False, layout=self.patch_layout
        )
        self.position_embedding = ResampledPositions((side, side), config.hidden_size, RESAMPLING)
        self.prefix = PrefixTokens(1, config.hidden_size) if config.class_token else None
        self.prefix_position = PrefixPosition(1, config.hidden_size) if config.class_token else None
        self.norm_pre = make_norm(*norm)
        self.encoder = PackedEncoder(block, config.num_hidden_layers)
        self.norm_post = make_norm(*norm) if config.norm_post else None
        self.post_init()

    def prepare(
        self, tokens: torch.Tensor, grids: Sequence[Grid], patch_positions: torch.Tensor | None
    ) -> tuple[torch.Tensor, Segments, Rotary | None, torch.Tensor | None]:
        device, patches = tokens.device, None
        places = positions_of_grids(grids, device)[:, 1:].float()
        tokens = self.position_embedding(tokens, grids)
        segments = self.segments_of(grids, device, int(self.prefix is not None))
        if self.prefix is not None and self.prefix_position is not None:
            # The class token stands at (0, 0), and the patches begin at (1, 1).
            insert, patches = prefix_indices(tuple(h * w for _, h, w in grids), 1, device)
            tokens = self.prefix_position(self.prefix(tokens, insert), segments.cu_seqlens[:-1])
            places = torch.cat([places.new_zeros(1, 2), places + 1]).index_select(0, insert)
        rotary = rotary_column_row(places, self.encoder.head_dim, self.config.rope_theta)
        return self.norm_pre(tokens), segments, rotary, patches

    def final_norm(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states if self.norm_post is None else self.norm_post(hidden_states)

    @classmethod
    def config_from_source(cls, source: dict, shapes: Mapping | None = None) -> PerceptionEncoderPackingConfig:
        """The packing config for Meta's or timm's weights, whose sizes are in the tensors (``shapes``)."""
        return cls.config_class(**fields_of(source, shapes or {}))

    @classmethod
    def plan_from_source(
        cls, source: dict, config: PerceptionEncoderPackingConfig, shapes: Mapping[str, tuple[int, ...]]
    ) -> WeightPlan:
        timm = source["model_type"] == "perception_encoder_timm"
        inside = {name: shape for name, shape in shapes.items() if name.startswith("visual.")}
        plan = (TIMM_NAMES if timm else META_NAMES).plan(inside or shapes)
        plan.dropped.update({name: "text tower" for name in shapes if inside and name not in inside})
        if config.class_token and (table := plan.recipes.get("position_embedding.weight")):
            plan.recipes["position_embedding.weight"] = Recipe(table.sources, lambda tensor: tensor.flatten(0, -2)[1:])
            plan.recipes["prefix_position.weight"] = Recipe(table.sources, lambda tensor: tensor.flatten(0, -2)[:1])
        return plan

    @classmethod
    def default_image_processor(cls, config: PerceptionEncoderPackingConfig) -> PackingImageProcessor:
        """Pixels to -1..1, bilinear, stretched to the square of the position table."""
        return stretched(config, image_mean=(0.5,) * 3, image_std=(0.5,) * 3, resample=2)


def fields_of(raw: Mapping, shapes: Shapes) -> dict:
    """Config fields from the tensors. Raises ``ValueError`` where they contradict each other."""
    timm = raw["model_type"] == "perception_encoder_timm"
    prefix = "visual." if any(name.startswith("visual.") for name in shapes) else ""
    patch, table, token, norm, inner, scale, post = (f"{prefix}{name}" for name in (TIMM if timm else META))
    sizes = patch_of(shapes, f"{patch}.weight")
    positions = shapes.get(table, (0, 0))[-2] - (token in shapes)
    side = round(positions**0.5)
    if side**2 != positions or not side:
        raise ValueError(f"{table} should have the positions of a square, found {positions}")
    if timm:
        _check_reference(raw, side)
    return {
        **sizes,
        "intermediate_size": shape_of(shapes, f"{inner}.weight", 2)[0],
        "num_hidden_layers": blocks_of(shapes, norm.replace(".", r"\.").format(r"(\d+)") + r"\.weight"),
        "num_attention_heads": heads_of(raw, sizes["hidden_size"], PUBLISHED_HEADS, "Perception Encoder"),
        "image_size": timm_image_size(raw, side * sizes["patch_size"]) if timm else side * sizes["patch_size"],
        "class_token": token in shapes,
        "layer_scale": scale in shapes,
        "norm_post": post in shapes,
    }


def _check_reference(raw: Mapping, side: int) -> None:
    """Raises ``ValueError`` where timm would stretch rotary positions: its reference grid is not that of the table."""
    found = timm_arguments(raw, ("num_heads", "ref_feat_shape")).get("ref_feat_shape")
    named = re.search(r"patch(\d+)_(\d+)", str(raw.get("architecture") or ""))
    if found is None and named:
        found = [int(named[2]) // int(named[1])] * 2
    if found is not None and list(found) != [side, side]:
        raise ValueError(
            f"timm stretches the rotary positions of this model to {' x '.join(map(str, found))} (ref_feat_shape), and "
            f"its table has {side} x {side}: only models without stretching are read"
        )


META = (
    *("conv1", "positional_embedding", "class_embedding", "transformer.resblocks.{}.ln_1"),
    *("transformer.resblocks.0.mlp.c_fc", "transformer.resblocks.0.ls_1.gamma", "ln_post.weight"),
)
TIMM = (
    "patch_embed.proj",
    "pos_embed",
    "cls_token",
    "blocks.{}.norm1",
    "blocks.0.mlp.fc1",
    "blocks.0.gamma_1",
    "norm.weight",
)
PUBLISHED_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1536: 16}
RESAMPLING = Resampling("bilinear", align_corners=False)


_META_BLOCK = r"transformer\.resblocks\.(\d+)"
META_NAMES = KeyMap(
    prefix=PerceptionEncoderPacking.tower_prefix,
    renames={
        r"conv1\.weight": "patch_embed.proj.weight",
        r"class_embedding": ("prefix.weight", lambda token: token.view(1, -1)),
        r"positional_embedding": "position_embedding.weight",
        r"ln_(pre|post)\.(weight|bias)": r"norm_\1.\2",
        rf"{_META_BLOCK}\.ln_([12])\.(weight|bias)": r"encoder.layers.\1.layer_norm\2.\3",
        rf"{_META_BLOCK}\.attn\.in_proj_(weight|bias)": r"encoder.layers.\1.self_attn.qkv.\2",
        rf"{_META_BLOCK}\.attn\.out_proj\.(weight|bias)": r"encoder.layers.\1.self_attn.proj.\2",
        rf"{_META_BLOCK}\.ls_([12])\.gamma": r"encoder.layers.\1.layer_scale\2.weight",
        rf"{_META_BLOCK}\.mlp\.c_fc\.(weight|bias)": r"encoder.layers.\1.mlp.fc1.\2",
        rf"{_META_BLOCK}\.mlp\.c_proj\.(weight|bias)": r"encoder.layers.\1.mlp.fc2.\2",
    },
    dropped={
        r"(visual\.)?attn_pool\..*": "attention pooling: the packed encoder returns patch tokens",
        r"(visual\.)?proj": "projection for image-text matching",
    },
)
TIMM_NAMES = KeyMap(
    renames={
        r"patch_embed\.proj\.weight": "patch_embed.proj.weight",
        r"cls_token": ("prefix.weight", lambda token: token.flatten(0, 1)),
        r"pos_embed": ("position_embedding.weight", lambda table: table.flatten(0, 1)),
        r"norm_pre\.(weight|bias)": r"norm_pre.\1",
        r"norm\.(weight|bias)": r"norm_post.\1",
        r"blocks\.(\d+)\.norm([12])\.(weight|bias)": r"encoder.layers.\1.layer_norm\2.\3",
        r"blocks\.(\d+)\.attn\.(qkv|proj)\.(weight|bias)": r"encoder.layers.\1.self_attn.\2.\3",
        r"blocks\.(\d+)\.gamma_([12])": r"encoder.layers.\1.layer_scale\2.weight",
        r"blocks\.(\d+)\.mlp\.(fc[12])\.(weight|bias)": r"encoder.layers.\1.mlp.\2.\3",
    },
    dropped={
        r"attn_pool\..*": "attention pooling: the packed encoder returns patch tokens",
        r"head\..*": "projection for image-text matching",
    },
)

AutoConfig.register(PerceptionEncoderPackingConfig.model_type, PerceptionEncoderPackingConfig, exist_ok=True)
AutoModel.register(PerceptionEncoderPackingConfig, PerceptionEncoderPacking, exist_ok=True)
