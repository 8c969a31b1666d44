"""LlavaViT (HEVC-ViT, published as OneVision-Encoder): images, videos and mixtures with 3-D rotary positions.

State-dict names are those of the converted ``llava_vit_packing`` checkpoints. Numerics after OneVision-Encoder
(https://github.com/EvolvingLMMs-Lab/OneVision-Encoder).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ...checkpoint.weights import WeightPlan
from ...data.patches import PatchLayout
from ...data.positions import rotary_3d_of_batch
from ...data.segments import Grid, VarlenMetadata, to_device
from ..base import PackedVisionModel
from ..encoder import PackedEncoder
from ..layers import MLP, BlockConfig, PatchEmbed, RMSNorm, Rotary, make_norm
from .config import STANDARD_FIELDS, LlavaViTConfig
from .key_map import SOURCE_TYPE, plan_packing


class LlavaViTPackingConfig(LlavaViTConfig):
    """Configuration of :class:`LlavaViTPackingModel`: the fields and defaults of :class:`LlavaViTConfig`, and two more.

    ``image_size`` only tells the tower its nominal patch counts. ``spatial_merge_size`` and ``temporal_patch_size``
    are carried for compatibility and not used.
    """

    model_type = "llava_vit_packing"

    def __init__(self, *args: Any, spatial_merge_size: int = 1, temporal_patch_size: int = 1, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.spatial_merge_size = spatial_merge_size
        self.temporal_patch_size = temporal_patch_size


def segment_softmax_pool(scores: torch.Tensor, values: torch.Tensor, segment: torch.Tensor, count: int) -> torch.Tensor:
    """Softmax-weighted mean of the values inside each segment.

    scores ``[N, heads]``, values ``[N, heads, head_dim]``, segment int64 ``[N]``; returns ``[count, heads, head_dim]``.
    """
    scores = scores.float()
    index = segment[:, None].expand_as(scores)
    peak = scores.new_full((count, scores.shape[1]), -torch.inf).scatter_reduce(0, index, scores.detach(), "amax")
    weights = (scores - peak.index_select(0, segment)).exp()
    total = torch.zeros_like(peak).index_add(0, segment, weights)
    weights = weights / total.index_select(0, segment)
    pooled = scores.new_zeros(count, *values.shape[1:]).index_add(0, segment, weights.unsqueeze(-1) * values.float())
    return pooled.to(values.dtype)


class ProbeAttention(nn.Module):
    """One query per sample attends to the tokens of that sample."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * hidden_size, hidden_size))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * hidden_size))
        self.out_proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, probe: torch.Tensor, tokens: torch.Tensor, segment: torch.Tensor, count: int) -> torch.Tensor:
        width = tokens.shape[1]
        weight_q, weight_kv = self.in_proj_weight.split([width, 2 * width])
        bias_q, bias_kv = self.in_proj_bias.split([width, 2 * width])
        query = F.linear(probe, weight_q, bias_q).unflatten(-1, (self.num_heads, -1))
        keys, values = F.linear(tokens, weight_kv, bias_kv).unflatten(-1, (2, self.num_heads, -1)).unbind(1)
        scores = (query * keys).sum(-1) * keys.shape[-1] ** -0.5
        return self.out_proj(segment_softmax_pool(scores, values, segment, count).flatten(1))


class PoolingHead(nn.Module):
    """Attention pooling with a learned probe; the residual is the attention output, and its norm an RMSNorm always."""

    def __init__(self, config: LlavaViTPackingConfig, block: BlockConfig) -> None:
        super().__init__()
        self.probe = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.attention = ProbeAttention(config.hidden_size, config.num_attention_heads)
        self.norm = RMSNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = MLP(block)

    def forward(self, tokens: torch.Tensor, segment: torch.Tensor, count: int) -> torch.Tensor:
        attended = self.attention(self.probe.view(1, -1), tokens, segment, count)
        return attended + self.mlp(self.norm(attended))


class LlavaViTPackingModel(PackedVisionModel):
    """The packed LlavaViT encoder."""

    config_class = LlavaViTPackingConfig
    patch_layout = PatchLayout.CHANNEL_FIRST
    image_only = False
    source_model_types = ("llava_vit", "onevision_encoder", SOURCE_TYPE)

    def __init__(self, config: LlavaViTPackingConfig) -> None:
        super().__init__(config)
        block = BlockConfig.of(
            config,
            norm=config.layer_norm_type,
            norm_eps=config.layer_norm_eps,
            rotary="interleaved",
        )
        block.check_rotary(3, 32)
        norm = (config.layer_norm_type, config.hidden_size, config.layer_norm_eps)
        self.patch_embed = PatchEmbed(
            config.num_channels, config.hidden_size, config.patch_size, bias=False, layout=self.patch_layout
        )
        self.layernorm_pre = make_norm(*norm)
        self.encoder = PackedEncoder(block, config.num_hidden_layers)
        self.layernorm_post = make_norm(*norm) if config.use_head else None
        self.head = PoolingHead(config, block) if config.use_head else None
        self.post_init()

    def prepare(
        self, tokens: torch.Tensor, grids: Sequence[Grid], patch_positions: torch.Tensor | None
    ) -> tuple[torch.Tensor, VarlenMetadata, Rotary | None, torch.Tensor | None]:
        head_dim, theta = self.encoder.head_dim, self.config.rope_theta
        rotary = rotary_3d_of_batch(grids, patch_positions, head_dim, theta, tokens.device)
        return self.layernorm_pre(tokens), self.segments_of(grids, tokens.device), rotary, None

    def final_norm(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states if self.layernorm_post is None else self.layernorm_post(hidden_states)

    def pool(self, tokens: torch.Tensor, grids: Sequence[Grid]) -> torch.Tensor | None:
        """One vector per sample, ``[B, hidden]``, from final-normed tokens; None without a head."""
        if self.head is None:
            return None
        lengths = torch.tensor([t * h * w for t, h, w in grids], device="cpu")
        segment = torch.repeat_interleave(torch.arange(len(grids), device="cpu"), lengths)
        return self.head(tokens, to_device(segment, tokens.device), len(grids))

    def forward(  # type: ignore[override]  # as transformers' own models: an output class, return_dict
        self,
        hidden_states: torch.Tensor,
        grid_thw: torch.Tensor,
        patch_positions: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        feature_layers: Sequence[int] | None = None,
    ) -> BaseModelOutputWithPooling | tuple:
        """Encode a packed batch of images and clips in one pass.

        Arguments are those of :meth:`PackedVisionModel.forward` (None for ``output_hidden_states`` is what the config
        says); ``patch_positions [N, 3]`` (frame, row, column; any
        dtype, fractions allowed) replace the positions of the grid, e.g. with interpolated frame indices.

        Returns:
            ``BaseModelOutputWithPooling`` with ``last_hidden_state [N, hidden]`` (final-normed only if the model has a
            head), ``pooler_output [B, hidden]`` or None, ``hidden_states``; with ``return_dict=False`` the tuple
            (last, pooled, hidden states or None); with ``feature_layers`` just those hidden states.
        """
        if feature_layers is not None:
            return super().forward(hidden_states, grid_thw, patch_positions, feature_layers=feature_layers)
        if output_hidden_states is None:
            output_hidden_states = getattr(self.config, "output_hidden_states", False)
        wanted = range(self.num_layers + 1) if output_hidden_states else (self.num_layers,)
        states, grids = self.encode(hidden_states, grid_thw, patch_positions, wanted)
        last = self.final_norm(states[self.num_layers])
        pooled = self.pool(last, grids)
        all_states = tuple(states[index] for index in wanted) if output_hidden_states else None
        if return_dict is False:
            return last, pooled, all_states
        return BaseModelOutputWithPooling(last_hidden_state=last, pooler_output=pooled, hidden_states=all_states)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ProbeAttention):
            nn.init.normal_(module.in_proj_weight, std=self.config.initializer_range)
        elif isinstance(module, PoolingHead):
            nn.init.normal_(module.probe, std=self.config.initializer_range)

    @classmethod
    def config_from_source(cls, source: dict, shapes: Mapping | None = None) -> LlavaViTPackingConfig:
        """The packing config for the config.json of a standard model; every shared field is kept."""
        if source.get("frame_windows_size"):
            raise ValueError(
                f"it has windows of {source['frame_windows_size']} frames: this is the tower of LLaVA-OneVision-2; "
                f"name the whole checkpoint, or write model_type llava_onevision2"
            )
        carried = {name: source[name] for name in CARRIED_FIELDS if name in source}
        if source["model_type"] == "onevision_encoder":
            carried = {**ONEVISION_DEFAULTS, **carried}
        return cls.config_class(**carried)

    @classmethod
    def plan_from_source(
        cls, source: dict, config: LlavaViTPackingConfig, shapes: Mapping[str, tuple[int, ...]]
    ) -> WeightPlan:
        return plan_packing(source["model_type"], shapes)


CARRIED_FIELDS = (*STANDARD_FIELDS, "spatial_merge_size", "temporal_patch_size")
# Fields whose default in the source differs from the one here, for configs that leave them out.
ONEVISION_DEFAULTS = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
}

AutoConfig.register(LlavaViTPackingConfig.model_type, LlavaViTPackingConfig, exist_ok=True)
AutoModel.register(LlavaViTPackingConfig, LlavaViTPackingModel, exist_ok=True)
