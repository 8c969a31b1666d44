"""AIMv2: RMS norms, gated MLP, additive positions (2-D sine and cosine for ``-native``, else a learned table).

Reads the published checkpoints: vision only, ``-lit`` with its text tower, and both under the names of the earlier
remote-code files. Model: Fini et al. 2024, https://arxiv.org/abs/2411.14402; numerics after transformers'
``Aimv2VisionModel``. There is no CLS token; the pooling head of ``-lit`` is not part of the packed encoder.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, PretrainedConfig

from ..checkpoint.config_check import check_rate, one_side
from ..checkpoint.key_map import KeyMap, carried
from ..checkpoint.weights import WeightPlan
from ..data.image_processor import PackingImageProcessor
from ..data.patches import PatchLayout
from ..data.positions import frequency_ladder, positions_of_grids
from ..data.segments import Grid, VarlenMetadata
from . import aimv2_names as names
from .base import PackedVisionModel
from .encoder import PackedEncoder
from .layers import BlockConfig, PatchEmbed, RMSNorm, Rotary
from .position_tables import LearnedTable


class AIMv2PackingConfig(PretrainedConfig):
    """Configuration of :class:`AIMv2Packing`; fields and defaults of ``aimv2_vision_model``.

    is_native: sine and cosine positions for any grid; otherwise a learned table for ``image_size // patch_size``
        squared, and images of exactly that size. proj_bias: bias of the attention's output projection (None: as
        ``qkv_bias``). use_head: whether the source has a pooling head (carried, not used).

    A non-zero ``attention_dropout`` is carried and has no effect. Raises ``ValueError`` for sizes that are not
    square.
    """

    model_type = "aimv2_packing"

    def __init__(
        self,
        hidden_size: int = 1024,
        intermediate_size: int = 2816,
        num_hidden_layers: int = 24,
        num_attention_heads: int = 8,
        num_channels: int = 3,
        image_size: int | Sequence[int] = 224,
        patch_size: int | Sequence[int] = 14,
        rms_norm_eps: float = 1e-5,
        hidden_act: str = "silu",
        attention_dropout: float = 0.0,
        qkv_bias: bool = False,
        proj_bias: bool | None = None,
        mlp_bias: bool = False,
        initializer_range: float = 0.02,
        use_head: bool = True,
        is_native: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_rate("attention_dropout", attention_dropout)
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_channels = num_channels
        self.image_size: int = one_side("image_size", image_size)
        self.patch_size: int = one_side("patch_size", patch_size)
        self.rms_norm_eps = rms_norm_eps
        self.hidden_act = hidden_act
        self.attention_dropout = attention_dropout
        self.qkv_bias = qkv_bias
        self.proj_bias = qkv_bias if proj_bias is None else proj_bias
        self.mlp_bias = mlp_bias
        self.initializer_range = initializer_range
        self.use_head = use_head
        self.is_native = is_native


def sincos_positions(grids: Sequence[Grid], hidden_size: int, device: torch.device) -> torch.Tensor:
    """Sine and cosine positions of all patches, float32 ``[N, hidden_size]``.

    With ``f_k = 10000 ** (-k / (hidden_size / 4))``: ``[sin(column f), cos(column f), sin(row f), cos(row f)]``, the
    column first, indices not scaled (AIMv2). The waves are computed once per index; grids only gather them.
    """
    count = hidden_size // 4
    ladder = frequency_ladder(count, 10000.0, 1.0 / count, device)
    longest = max(max(h, w) for _, h, w in grids)
    angles = torch.arange(longest, dtype=torch.float32, device=device).unsqueeze(1) * ladder
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)
    _, row, column = positions_of_grids(grids, device).unbind(1)
    return torch.cat([waves.index_select(0, column), waves.index_select(0, row)], dim=1)


class LearnedPositions(LearnedTable):
    """A table of learned positions for one grid, ``side x side``, row by row. It is not resized."""

    def __init__(self, side: int, hidden_size: int) -> None:
        super().__init__(side**2, hidden_size)
        self.side = side

    def forward(self, tokens: torch.Tensor, grids: Sequence[Grid]) -> torch.Tensor:
        """Tokens ``[N, hidden]`` plus the position of each. Raises ``ValueError`` for another grid."""
        for index, (_, h, w) in enumerate(grids):
            if (h, w) != (self.side, self.side):
                raise ValueError(
                    f"image {index} has {h} x {w} patches, but this AIMv2 checkpoint has learned positions for "
                    f"{self.side} x {self.side} only (its image_size): resize the image, or use a -native checkpoint"
                )
        return (tokens.unflatten(0, (len(grids), -1)) + self.weight).flatten(0, 1)


class AIMv2Packing(PackedVisionModel):
    """The packed AIMv2 vision encoder. Rows are channel-last: ``(patch row, patch column, channel)``."""

    config_class = AIMv2PackingConfig
    patch_layout = PatchLayout.CHANNEL_LAST
    source_model_types = ("aimv2", "aimv2_vision_model", names.APPLE, names.TIMM)

    def __init__(self, config: AIMv2PackingConfig) -> None:
        super().__init__(config)
        block = BlockConfig.of(
            config,
            norm="rms_norm",
            norm_eps=config.rms_norm_eps,
            gated_mlp=True,
            qkv_bias=(config.qkv_bias,) * 3,
            proj_bias=config.proj_bias,
            mlp_bias=config.mlp_bias,
        )
        if config.is_native and config.hidden_size % 4:
            raise ValueError(f"sine and cosine positions need a hidden_size divisible by 4, got {config.hidden_size}")
        self.patch_embed = PatchEmbed(
            config.num_channels, config.hidden_size, config.patch_size, bias=True, layout=self.patch_layout
        )
        self.norm_pre = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.position_embedding = (
            None if config.is_native else LearnedPositions(config.image_size // config.patch_size, config.hidden_size)
        )
        self.encoder = PackedEncoder(block, config.num_hidden_layers)
        self.norm_post = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    @property
    def fixed_side(self) -> int | None:
        """Patches per side of the only grid that the learned positions are for; None where any grid will do."""
        return None if self.position_embedding is None else self.position_embedding.side

    def prepare(
        self, tokens: torch.Tensor, grids: Sequence[Grid], patch_positions: torch.Tensor | None
    ) -> tuple[torch.Tensor, VarlenMetadata, Rotary | None, torch.Tensor | None]:
        tokens = self.norm_pre(tokens)  # before the positions, which are not normed
        if self.position_embedding is None:
            tokens = tokens + sincos_positions(grids, self.config.hidden_size, tokens.device).to(tokens.dtype)
        else:
            tokens = self.position_embedding(tokens, grids)
        return tokens, self.segments_of(grids, tokens.device), None, None

    def final_norm(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.norm_post(hidden_states)

    @classmethod
    def config_from_source(cls, source: dict, shapes: Mapping | None = None) -> AIMv2PackingConfig:
        """The packing config for an ``aimv2`` (full or remote-code) or ``aimv2_vision_model`` config.json, or for
        Apple's or timm's weights without one.

        The remote-code configs do not say whether positions are learned: the tensors (``shapes``) do.
        """
        if source["model_type"] in (names.APPLE, names.TIMM):
            read = names.fields_of(source, shapes or {})
            return cls.config_class(**{**read, **carried(source, CARRIED_FIELDS)})
        vision = source.get("vision_config", source)
        fields = carried(vision, CARRIED_FIELDS)
        if "use_bias" in vision:  # remote-code name for the biases outside of q, k and v
            fields = {"proj_bias": vision["use_bias"], "mlp_bias": vision["use_bias"], **fields}
        if "is_native" not in vision and shapes is not None:
            fields["is_native"] = not any(name.endswith(POSITION_TABLES) for name in shapes)
        return cls.config_class(**fields)

    @classmethod
    def plan_from_source(
        cls, source: dict, config: AIMv2PackingConfig, shapes: Mapping[str, tuple[int, ...]]
    ) -> WeightPlan:
        return (names.TIMM_KEY_MAP if source["model_type"] == names.TIMM else KEY_MAP).plan(shapes)

    @classmethod
    def default_image_processor(cls, config: AIMv2PackingConfig) -> PackingImageProcessor:
        """CLIP statistics, bicubic, center crop at the config's image size."""
        return PackingImageProcessor(size=config.image_size, patch_size=config.patch_size)


CARRIED_FIELDS = tuple(inspect.signature(AIMv2PackingConfig).parameters)[:-1]
POSITION_TABLES = ("embeddings.position_embedding.weight", "preprocessor.pos_embed")
_VISION = r"(vision_model|image_encoder)\."

KEY_MAP = KeyMap(
    prefix=_VISION,
    qkv=r"encoder\.layers\.(?P<block>\d+)\.attention\.(?P<part>[qkv])_proj\.(?P<kind>weight|bias)",
    renames={
        r"embeddings\.patch_embed\.(weight|bias)": r"patch_embed.proj.\1",
        r"embeddings\.rms_norm\.weight": r"norm_pre.weight",
        r"embeddings\.position_embedding\.weight": r"position_embedding.weight",
        r"(encoder\.layers\.\d+)\.rms_norm([12])\.weight": r"\1.layer_norm\2.weight",
        r"(encoder\.layers\.\d+)\.attention\.out_proj\.(weight|bias)": r"\1.self_attn.proj.\2",
        r"(encoder\.layers\.\d+)\.ffn\.gate_proj\.(weight|bias)": r"\1.mlp.gate.\2",
        r"(encoder\.layers\.\d+)\.ffn\.up_proj\.(weight|bias)": r"\1.mlp.fc1.\2",
        r"(encoder\.layers\.\d+)\.ffn\.down_proj\.(weight|bias)": r"\1.mlp.fc2.\2",
        r"rms_norm\.weight": r"norm_post.weight",
        # Remote-code names. Beware: their fc1 is the gate, fc3 goes up, fc2 comes down.
        r"preprocessor\.patchifier\.proj\.(weight|bias)": r"patch_embed.proj.\1",
        r"preprocessor\.patchifier\.norm\.weight": r"norm_pre.weight",
        r"preprocessor\.pos_embed": (r"position_embedding.weight", lambda table: table.flatten(0, -2)),
        r"trunk\.blocks\.(\d+)\.norm_([12])\.weight": r"encoder.layers.\1.layer_norm\2.weight",
        r"trunk\.blocks\.(\d+)\.attn\.(qkv|proj)\.(weight|bias)": r"encoder.layers.\1.self_attn.\2.\3",
        r"trunk\.blocks\.(\d+)\.mlp\.fc1\.(weight|bias)": r"encoder.layers.\1.mlp.gate.\2",
        r"trunk\.blocks\.(\d+)\.mlp\.fc3\.(weight|bias)": r"encoder.layers.\1.mlp.fc1.\2",
        r"trunk\.blocks\.(\d+)\.mlp\.fc2\.(weight|bias)": r"encoder.layers.\1.mlp.fc2.\2",
        r"trunk\.post_trunk_norm\.weight": r"norm_post.weight",
    },
    dropped={
        rf"({_VISION})?head\..*": "pooling head: the packed encoder returns patch tokens",
        r"classifier\..*": "classifier head",
        r"text_(model|encoder)\..*": "text tower",
        r"(visual_projection|text_projection|image_projector|text_projector)\..*": "projection for image-text matching",
        r"(log_)?logit_scale": "image-text similarity",
        rf"({_VISION})?embeddings\.position_ids": "a counter, not a weight",
    },
)

AutoConfig.register(AIMv2PackingConfig.model_type, AIMv2PackingConfig, exist_ok=True)
AutoModel.register(AIMv2PackingConfig, AIMv2Packing, exist_ok=True)
