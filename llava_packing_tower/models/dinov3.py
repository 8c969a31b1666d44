"""DINOv3 ViT: CLS and register tokens in front of every image, 2-D rotary positions on the patches, LayerScale.

Reads the published ``dinov3_vit`` checkpoints of every size, gated or not, with any number of registers. Model: Siméoni
et al. 2025, https://arxiv.org/abs/2508.10104; numerics after transformers' ``DINOv3ViTModel``.
"""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PretrainedConfig

from ..checkpoint.config_check import check_rate, one_side
from ..checkpoint.key_map import KeyMap, carried
from ..checkpoint.weights import Recipe, WeightPlan
from ..data.image_processor import PackingImageProcessor
from ..data.patches import PatchLayout
from ..data.positions import per_token, positions_and_sizes, prefix_indices
from ..data.positions import rotary_2d as rotary_of_places
from ..data.segments import Grid, VarlenMetadata
from . import dinov3_names as names
from .base import PackedVisionModel, stretched
from .encoder import PackedEncoder
from .layers import BlockConfig, PatchEmbed, Rotary
from .position_tables import PrefixTokens


class DINOv3PackingConfig(PretrainedConfig):
    """Configuration of :class:`DINOv3ViTPacking`; fields and defaults of ``dinov3_vit``.

    rope_augmentation: apply ``pos_embed_shift``, ``pos_embed_jitter`` and ``pos_embed_rescale`` in training mode, drawn
        anew for each image. Off by default, so that ``train()`` does not change the features (in transformers it
        does: published configs have ``pos_embed_rescale`` 2).

    A non-zero ``attention_dropout`` or ``drop_path_rate`` is carried and has no effect. Raises ``ValueError`` for sizes
    that are not square.
    """

    model_type = "dinov3_packing"

    def __init__(
        self,
        hidden_size: int = 384,
        intermediate_size: int = 1536,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 6,
        num_channels: int = 3,
        image_size: int | Sequence[int] = 224,
        patch_size: int | Sequence[int] = 16,
        hidden_act: str = "gelu",
        attention_dropout: float = 0.0,
        initializer_range: float = 0.02,
        layer_norm_eps: float = 1e-5,
        rope_theta: float = 100.0,
        query_bias: bool = True,
        key_bias: bool = False,
        value_bias: bool = True,
        proj_bias: bool = True,
        mlp_bias: bool = True,
        layerscale_value: float = 1.0,
        drop_path_rate: float = 0.0,
        use_gated_mlp: bool = False,
        num_register_tokens: int = 0,
        pos_embed_shift: float | None = None,
        pos_embed_jitter: float | None = None,
        pos_embed_rescale: float | None = 2.0,
        rope_augmentation: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        for name, rate in (("attention_dropout", attention_dropout), ("drop_path_rate", drop_path_rate)):
            check_rate(name, rate)
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_channels = num_channels
        self.image_size: int = one_side("image_size", image_size)
        self.patch_size: int = one_side("patch_size", patch_size)
        self.hidden_act = hidden_act
        self.attention_dropout = attention_dropout
        self.initializer_range = initializer_range
        self.layer_norm_eps = layer_norm_eps
        self.rope_theta = rope_theta
        self.query_bias = query_bias
        self.key_bias = key_bias
        self.value_bias = value_bias
        self.proj_bias = proj_bias
        self.mlp_bias = mlp_bias
        self.layerscale_value = layerscale_value
        self.drop_path_rate = drop_path_rate
        self.use_gated_mlp = use_gated_mlp
        self.num_register_tokens = num_register_tokens
        self.pos_embed_shift = pos_embed_shift
        self.pos_embed_jitter = pos_embed_jitter
        self.pos_embed_rescale = pos_embed_rescale
        self.rope_augmentation = rope_augmentation

    @property
    def qkv_bias(self) -> tuple[bool, bool, bool]:
        return self.query_bias, self.key_bias, self.value_bias


def patch_centres(grids: Sequence[Grid], device: torch.device) -> torch.Tensor:
    """Centres of the patches of a packed batch, float32 ``[N, 2]`` (row, column): in each image from -1 to 1, each axis
    by its own length."""
    positions, sizes = positions_and_sizes(grids, device)
    return 2 * (positions[:, 1:].float() + 0.5) / sizes[:, 1:].float() - 1


def augmentation(config: DINOv3PackingConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Random factor and offset for the centres of one image, each ``[2]`` (row, column), from the CPU generator.

    ``(center + shift) * jitter * rescale`` with a shift per axis, a jitter per axis and one rescale for both, the last
    two log-uniform between ``1/x`` and ``x`` (DINOv3).
    """

    def uniform(limit: float, count: int) -> torch.Tensor:
        return torch.empty(count, dtype=torch.float32, device="cpu").uniform_(-limit, limit)

    factor, offset = torch.ones(2, dtype=torch.float32, device="cpu"), torch.zeros(2, dtype=torch.float32, device="cpu")
    if config.pos_embed_shift is not None:
        offset = uniform(config.pos_embed_shift, 2)
    if config.pos_embed_jitter is not None:
        factor = factor * uniform(math.log(config.pos_embed_jitter), 2).exp()
    if config.pos_embed_rescale is not None:
        factor = factor * uniform(math.log(config.pos_embed_rescale), 1).exp()
    return factor, offset * factor


def rotary_2d(centres: torch.Tensor, head_dim: int, theta: float) -> Rotary:
    """DINOv3's rotary table: that of :func:`..data.positions.rotary_2d` at 2 pi times the centres."""
    return rotary_of_places(2 * math.pi * centres, head_dim, theta)


class DINOv3ViTPacking(PackedVisionModel):
    """The packed DINOv3 encoder; its outputs are the patch tokens, without CLS and registers.

    Rows are channel-last: ``(patch row, patch column, channel)``.
    """

    config_class = DINOv3PackingConfig
    patch_layout = PatchLayout.CHANNEL_LAST
    source_model_types = ("dinov3_vit", names.META, names.TIMM)

    def __init__(self, config: DINOv3PackingConfig) -> None:
        super().__init__(config)
        block = BlockConfig.of(
            config,
            norm_eps=config.layer_norm_eps,
            gated_mlp=config.use_gated_mlp,
            qkv_bias=config.qkv_bias,
            proj_bias=config.proj_bias,
            mlp_bias=config.mlp_bias,
            layer_scale=float(config.layerscale_value),
            rotary="half",
        )
        block.check_rotary(2, 4)
        self.patch_embed = PatchEmbed(
            config.num_channels, config.hidden_size, config.patch_size, bias=True, layout=self.patch_layout
        )
        self.prefix = PrefixTokens(1 + config.num_register_tokens, config.hidden_size)
        self.encoder = PackedEncoder(block, config.num_hidden_layers)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    def centres(self, grids: Sequence[Grid], device: torch.device) -> torch.Tensor:
        """Row and column of every patch, float32 ``[N, 2]``; moved at random in training, if the config says so."""
        centres = patch_centres(grids, device)
        if self.training and self.config.rope_augmentation:
            random = torch.stack([torch.cat(augmentation(self.config)) for _ in grids])
            factor, offset = per_token(random, [h * w for _, h, w in grids], device).split(2, dim=1)
            centres = centres * factor + offset
        return centres

    def prepare(
        self, tokens: torch.Tensor, grids: Sequence[Grid], patch_positions: torch.Tensor | None
    ) -> tuple[torch.Tensor, VarlenMetadata, Rotary | None, torch.Tensor | None]:
        prefix, device = 1 + self.config.num_register_tokens, tokens.device
        insert, patches = prefix_indices(tuple(h * w for _, h, w in grids), prefix, device)
        # Prefix tokens stand at 0: they are not rotated.
        centres = torch.zeros(len(insert), 2, dtype=torch.float32, device=device)
        centres = centres.index_copy(0, patches, self.centres(grids, device))
        rotary = rotary_2d(centres, self.encoder.head_dim, self.config.rope_theta)
        return self.prefix(tokens, insert), self.segments_of(grids, device, prefix), rotary, patches

    def final_norm(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.norm(hidden_states)

    @classmethod
    def config_from_source(cls, source: dict, shapes: Mapping | None = None) -> DINOv3PackingConfig:
        """The packing config for a ``dinov3_vit`` config.json, or for Meta's or timm's weights."""
        if source["model_type"] in (names.META, names.TIMM):
            read = names.fields_of(source, shapes or {})
            return cls.config_class(**{**read, **carried(source, CARRIED_FIELDS)})
        return cls.config_class(**carried(source, CARRIED_FIELDS))

    @classmethod
    def plan_from_source(
        cls, source: dict, config: DINOv3PackingConfig, shapes: Mapping[str, tuple[int, ...]]
    ) -> WeightPlan:
        if source["model_type"] in (names.META, names.TIMM):
            return names.key_map(source, shapes).plan(shapes)
        plan = KEY_MAP.plan(shapes, config.qkv_bias)
        sources = tuple(f"embeddings.{name}" for name in ("cls_token", "register_tokens"))
        if not config.num_register_tokens:
            sources = sources[:1]
            if math.prod(shapes.get("embeddings.register_tokens", (1,))) == 0:
                plan.dropped["embeddings.register_tokens"] = "empty: this checkpoint has no registers"
        plan.recipes["prefix.weight"] = Recipe(sources, lambda *tokens: torch.cat(tokens, dim=1).flatten(0, 1))
        return plan

    @classmethod
    def load_image_processor(cls, folder: str | os.PathLike, config: PretrainedConfig) -> PackingImageProcessor:
        """As any family's; Meta's own files of the satellite models (``sat493m`` in their name) have other pixels."""
        content = cls.default_image_processor(config).to_dict()
        if Path(folder).is_file() and "sat493m" in Path(folder).name.lower():
            return PackingImageProcessor.from_dict({**content, **names.SATELLITE})
        return super().load_image_processor(folder, config)

    @classmethod
    def default_image_processor(cls, config: DINOv3PackingConfig) -> PackingImageProcessor:
        """ImageNet statistics, bilinear, stretched to the config's image size."""
        return stretched(config, image_mean=(0.485, 0.456, 0.406), image_std=(0.229, 0.224, 0.225), resample=2)


CARRIED_FIELDS = tuple(inspect.signature(DINOv3PackingConfig).parameters)[:-1]

_LAYER = r"layer\.(\d+)"
KEY_MAP = KeyMap(
    prefix=r"model\.(?=layer\.)",
    qkv=r"layer\.(?P<block>\d+)\.attention\.(?P<part>[qkv])_proj\.(?P<kind>weight|bias)",
    renames={
        r"embeddings\.patch_embeddings\.(weight|bias)": r"patch_embed.proj.\1",
        rf"{_LAYER}\.norm([12])\.(weight|bias)": r"encoder.layers.\1.layer_norm\2.\3",
        rf"{_LAYER}\.attention\.o_proj\.(weight|bias)": r"encoder.layers.\1.self_attn.proj.\2",
        rf"{_LAYER}\.layer_scale([12])\.lambda1": r"encoder.layers.\1.layer_scale\2.weight",
        rf"{_LAYER}\.mlp\.gate_proj\.(weight|bias)": r"encoder.layers.\1.mlp.gate.\2",
        rf"{_LAYER}\.mlp\.up_proj\.(weight|bias)": r"encoder.layers.\1.mlp.fc1.\2",
        rf"{_LAYER}\.mlp\.down_proj\.(weight|bias)": r"encoder.layers.\1.mlp.fc2.\2",
    },
    dropped={
        r"embeddings\.mask_token": "stands for hidden patches in pretraining; no image has any",
        r"classifier\..*": "classifier head",
    },
)

AutoConfig.register(DINOv3PackingConfig.model_type, DINOv3PackingConfig, exist_ok=True)
AutoModel.register(DINOv3PackingConfig, DINOv3ViTPacking, exist_ok=True)
