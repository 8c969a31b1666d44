"""The standard LlavaViT: pixels in (``[B, C, H, W]`` or ``[B, C, T, H, W]``), every sample of one size.

The counterpart that conversions are verified against, and the model behind :class:`HEVCViTVisionTower`. It shares the
norms and the MLP with the packed core and nothing else: patch convolution, positions, rotation, attention and pooling
are written out here a second time, so that a mistake in one of the two models shows.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModel, PretrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ...checkpoint.key_map import carried
from ...checkpoint.pretrained import StrictPreTrainedModel
from ...checkpoint.weights import Recipe, WeightPlan
from ...data.image_processor import PackingImageProcessor
from ...data.pixel_scale import check_floating
from ..layers import MLP, BlockConfig, RMSNorm, make_norm
from ..unused_parameters import checkpoint_input, join_idle
from .config import STANDARD_FIELDS, LlavaViTConfig, OneVisionEncoderConfig
from .key_map import SOURCE_TYPE, plan_standard
from .standard_positions import VideoRotary, flat_positions, residual_indices, rotary_table, rotate


class StandardAttention(nn.Module):
    def __init__(self, config: LlavaViTConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.implementation = "sdpa"
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, table: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        batch, count, width = x.shape
        shape = (batch, count, self.num_heads, width // self.num_heads)
        q, k, v = (project(x).view(shape).transpose(1, 2) for project in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, table), rotate(k, table)
        if self.implementation == "eager":
            scores = q @ k.transpose(-1, -2) / (width // self.num_heads) ** 0.5
            mixed = scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v
        else:
            mixed = scaled_dot_product_attention(q, k, v)
        return self.out_proj(mixed.transpose(1, 2).reshape(batch, count, width))


class StandardLayer(nn.Module):
    def __init__(self, config: LlavaViTConfig, block: BlockConfig) -> None:
        super().__init__()
        norm = (config.layer_norm_type, config.hidden_size, config.layer_norm_eps)
        self.layer_norm1 = make_norm(*norm)
        self.self_attn = StandardAttention(config)
        self.layer_norm2 = make_norm(*norm)
        self.mlp = MLP(block)

    def forward(self, x: torch.Tensor, table: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        x = x + self.self_attn(self.layer_norm1(x), table)
        return x + self.mlp(self.layer_norm2(x))


class StandardEncoder(nn.Module):
    def __init__(self, config: LlavaViTConfig, block: BlockConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(StandardLayer(config, block) for _ in range(config.num_hidden_layers))
        # The two names that transformers' gradient_checkpointing_enable() looks for and sets.
        self.gradient_checkpointing = False
        self._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)

    def forward(
        self, x: torch.Tensor, table: tuple[torch.Tensor, torch.Tensor], keep: Sequence[int]
    ) -> tuple[torch.Tensor, ...]:
        """States in the order of ``keep``, 0 the input of layer 0; layers above the highest index are not run."""
        states = {0: x} if 0 in keep else {}
        for index, layer in enumerate(self.layers[: max(keep)], start=1):
            checkpointed = self.gradient_checkpointing and self.training
            x = checkpoint_input(layer, x) if checkpointed else x
            if checkpointed and x.requires_grad:  # else there is nothing to compute again
                x = self._gradient_checkpointing_func(layer.__call__, x, table)
            else:
                x = layer(x, table)
            if index in keep:
                states[index] = x
        return tuple(states[index] for index in keep)


class StandardHead(nn.Module):
    """Attention pooling with a learned probe; the residual is the attention output, its norm an RMSNorm always."""

    def __init__(self, config: LlavaViTConfig, block: BlockConfig) -> None:
        super().__init__()
        self.probe = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.attention = nn.MultiheadAttention(config.hidden_size, config.num_attention_heads, batch_first=True)
        self.plain = type(self.attention.out_proj)
        self.norm = RMSNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = MLP(block)

    def attend(self, probe: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """What torch's module computes for a probe ``[B, 1, hidden]`` and tokens ``[B, K, hidden]``, but with the
        output projection called as a module: torch reads only its weight, so that a LoRA there would have no effect."""
        attention = self.attention
        weights, biases = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
        q, k, v = (
            nn.functional.linear(part, weight, bias).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
            for part, weight, bias in zip((probe, x, x), weights, biases, strict=True)
        )
        return attention.out_proj(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        probe = self.probe.expand(len(x), -1, -1)
        if isinstance(self.attention, nn.MultiheadAttention) and type(self.attention.out_proj) is not self.plain:
            attended = self.attend(probe, x)
        else:
            attended = self.attention(probe, x, x, need_weights=False)[0]
        return (attended + self.mlp(self.norm(attended))).squeeze(1)


class Embeddings(nn.Module):
    def __init__(self, config: LlavaViTConfig) -> None:
        super().__init__()
        self.patch_size = patch = config.patch_size
        self.patch_embedding: nn.Module = nn.Conv2d(
            config.num_channels, config.hidden_size, patch, stride=patch, bias=False
        )

    def forward(self, clips: torch.Tensor, visible_indices: torch.Tensor | None) -> torch.Tensor:
        """Tokens ``[B, K, hidden]`` of clips ``[B, C, T, H, W]``; frames without a visible patch are not embedded."""
        batch, _, frames = clips.shape[:3]
        used = torch.arange(frames, device=clips.device)
        if visible_indices is not None:
            plane = clips.shape[3] * clips.shape[4] // self.patch_size**2
            used, place = torch.unique(visible_indices // plane, return_inverse=True)
            visible_indices = place * plane + visible_indices % plane
        pictures = clips.index_select(2, used).transpose(1, 2).flatten(0, 1)
        tokens = self.patch_embedding(pictures).flatten(2).transpose(1, 2)
        tokens = tokens.reshape(batch, -1, tokens.shape[-1])
        if visible_indices is None:
            return tokens
        return tokens.gather(1, visible_indices.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


class LlavaViTModel(StrictPreTrainedModel):
    """The standard LlavaViT encoder; loads ``llava_vit`` and ``onevision_encoder`` folders (and packing ones)."""

    config_class: type[PretrainedConfig] = LlavaViTConfig
    main_input_name = "pixel_values"
    base_model_prefix = "vision_model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["StandardLayer"]
    _supports_sdpa = True
    source_model_types = ("onevision_encoder", "llava_vit_packing", SOURCE_TYPE)

    def __init__(self, config: LlavaViTConfig) -> None:
        super().__init__(config)
        width, heads = config.hidden_size, config.num_attention_heads
        block = BlockConfig(width, config.intermediate_size, heads, config.hidden_act, config.layer_norm_type)
        if block.head_dim % 32:
            raise ValueError(
                f"hidden_size {width} with {heads} heads gives head width {block.head_dim}; 3-D rotary positions need "
                f"a multiple of 32"
            )
        norm = (config.layer_norm_type, width, config.layer_norm_eps)
        self.embeddings = Embeddings(config)
        self.layernorm_pre = make_norm(*norm)
        self.encoder = StandardEncoder(config, block)
        self.layernorm_post = make_norm(*norm) if config.use_head else None
        self.head = StandardHead(config, block) if config.use_head else None
        self.post_init()

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""
        return self.config.patch_size

    @property
    def video_rope(self) -> VideoRotary:
        """The angles of the rotary positions, by upstream's name. (Changing it does not change the model.)"""
        head_dim = self.config.hidden_size // self.config.num_attention_heads
        return VideoRotary(head_dim, self.config.rope_theta, self.device)

    @property
    def num_layers(self) -> int:
        return len(self.encoder.layers)

    def get_input_embeddings(self) -> nn.Module:
        """The patch convolution: its output is what ``enable_input_require_grads()`` asks a gradient of."""
        return self.embeddings.patch_embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embeddings.patch_embedding = value

    def set_attention_backend(self, name: str) -> None:
        """``auto`` and ``sdpa`` are torch's scaled_dot_product_attention, ``eager`` a float32 softmax.

        Raises ``ValueError`` for another name.
        """
        if name not in ("auto", "sdpa", "eager"):
            raise ValueError(f"the standard model has the attention backends auto, sdpa and eager, not {name!r}")
        layers: Any = self.encoder.layers
        for layer in layers:
            layer.self_attn.implementation = "eager" if name == "eager" else "sdpa"

    def _visible(
        self, visible_indices: torch.Tensor | None, clips: torch.Tensor, has_positions: bool
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Which tokens are taken (None: all), ``[B, K]``, and their positions (frame, row, column), ``[B, K, 3]``."""
        batch, _, frames, height, width = clips.shape
        rows, columns = height // self.config.patch_size, width // self.config.patch_size
        count = frames * rows * columns
        if visible_indices is not None and visible_indices.dim() == 5:
            if visible_indices.shape[-3:] != clips.shape[-3:]:
                raise ValueError(
                    f"a residual map must cover {list(clips.shape[-3:])}, got shape {list(visible_indices.shape)}"
                )
            visible_indices = residual_indices(visible_indices, self.config.patch_size)
        if visible_indices is None:
            visible_indices = torch.arange(count, device=clips.device).expand(batch, -1)
        if visible_indices.dim() != 2 or visible_indices.shape[0] != batch or visible_indices.shape[1] == 0:
            raise ValueError(f"visible_indices must be [{batch}, K], got {list(visible_indices.shape)}")

        # OneVision counts through a temporal context of its own, and there as many indices as tokens mean: all tokens,
        # standing at these places. Otherwise an index names a token and its place at once.
        limit, gather = count, True
        if isinstance(self.config, OneVisionEncoderConfig):
            gather = visible_indices.shape[1] != count
            context = self.config.rope_temporal_size if frames > 1 and self.config.rope_temporal_size else frames
            if not has_positions:
                limit = min(count, context * rows * columns) if gather else context * rows * columns
        low, high = int(visible_indices.min()), int(visible_indices.max())
        if low < 0 or high >= limit:
            raise ValueError(
                f"visible_indices reach from {low} to {high}; a clip of {frames} frames of {rows} x {columns} patches "
                f"has 0 to {limit - 1} here"
            )
        return visible_indices if gather else None, flat_positions(visible_indices, rows, columns)

    def forward(
        self,
        pixel_values: torch.Tensor,
        visible_indices: torch.Tensor | None = None,
        patch_positions: torch.Tensor | None = None,
        output_hidden_states: bool = False,
        return_dict: bool | None = None,
        feature_layers: Sequence[int] | None = None,
    ) -> BaseModelOutputWithPooling | tuple:
        """Encode images or clips of one size.

        Args:
            pixel_values: ``[B, C, H, W]`` or ``[B, C, T, H, W]``; cast to the model's dtype.
            visible_indices: int64 ``[B, K]``, flat indices into the (frames, rows, columns) grid of patches: only
                these tokens are encoded, at these positions. Or a residual map ``[B, C, T, H, W]``: the 2048 patches
                with the largest summed absolute residual are taken, in ascending order.
            patch_positions: ``[B, K, 3]`` (frame, row, column) in place of those of the indices.
            output_hidden_states: also return all hidden states.
            return_dict: False for a tuple.
            feature_layers: return just these hidden states (0 .. num_layers), as a tuple in this order.

        Returns:
            ``BaseModelOutputWithPooling``: ``last_hidden_state [B, K, hidden]`` (final-normed only if the model has a
            head), ``pooler_output [B, hidden]`` or None, ``hidden_states`` (index 0 the input of the first layer, the
            last one not normed). With ``return_dict=False`` the tuple of the three.

        Raises:
            ValueError: another number of dimensions, channels or positions, sizes that are no multiple of the patch
                size, indices outside the grid.
        """
        patch, channels = self.config.patch_size, self.config.num_channels
        shape = list(pixel_values.shape)
        if len(shape) not in (4, 5) or shape[1] != channels or shape[-1] % patch or shape[-2] % patch or 0 in shape:
            raise ValueError(
                f"pixel_values must be [B, {channels}, H, W] or [B, {channels}, T, H, W] with H and W multiples of "
                f"{patch}, got {shape}"
            )
        check_floating(pixel_values)
        clips = pixel_values if len(shape) == 5 else pixel_values.unsqueeze(2)
        taken, positions = self._visible(visible_indices, clips, patch_positions is not None)
        if patch_positions is not None:
            if patch_positions.shape != positions.shape:
                raise ValueError(f"patch_positions must be {list(positions.shape)}, got {list(patch_positions.shape)}")
            positions = patch_positions.to(clips.device)
        tokens = self.layernorm_pre(self.embeddings(clips.to(self.dtype), taken))
        head_dim = self.config.hidden_size // self.config.num_attention_heads
        table = rotary_table(positions, head_dim, self.config.rope_theta)
        if feature_layers is not None:
            return join_idle(self, self.encoder(tokens, table, feature_layers), max(feature_layers))
        wanted = range(self.num_layers + 1) if output_hidden_states else (self.num_layers,)
        states = self.encoder(tokens, table, wanted)
        last = states[-1]
        if self.layernorm_post is not None:
            last = self.layernorm_post(last)
        pooled = None if self.head is None else self.head(last)
        all_states = states if output_hidden_states else None
        if return_dict is False:
            return last, pooled, all_states
        return BaseModelOutputWithPooling(last_hidden_state=last, pooler_output=pooled, hidden_states=all_states)

    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.normal_(module.weight, std=std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.MultiheadAttention):
            nn.init.normal_(module.in_proj_weight, std=std)
        elif isinstance(module, StandardHead):
            nn.init.normal_(module.probe, std=std)

    @classmethod
    def config_from_source(cls, source: dict, shapes: Mapping | None = None) -> LlavaViTConfig:
        if source["model_type"] in STANDARD_CONFIGS:
            return STANDARD_CONFIGS[source["model_type"]].from_dict(source)
        return cls.config_class(**carried(source, STANDARD_FIELDS))

    @classmethod
    def plan_from_source(
        cls, source: dict, config: PretrainedConfig, shapes: Mapping[str, tuple[int, ...]]
    ) -> WeightPlan:
        if source["model_type"] in STANDARD_CONFIGS:
            return WeightPlan({name: Recipe((name,)) for name in shapes})
        return plan_standard(source["model_type"], shapes)

    @classmethod
    def load_image_processor(cls, folder: str | os.PathLike, config: PretrainedConfig) -> PackingImageProcessor:
        """That of the folder, else CLIP statistics at the config's image size."""
        from .packed import LlavaViTPackingModel

        return LlavaViTPackingModel.load_image_processor(folder, config)


class OneVisionEncoderModel(LlavaViTModel):
    """:class:`LlavaViTModel` under the successor's config class."""

    config_class = OneVisionEncoderConfig
    source_model_types = ("llava_vit", "llava_vit_packing", SOURCE_TYPE)


STANDARD_CONFIGS = {cls.model_type: cls for cls in (LlavaViTConfig, OneVisionEncoderConfig)}

for _model in (LlavaViTModel, OneVisionEncoderModel):
    AutoConfig.register(_model.config_class.model_type, _model.config_class, exist_ok=True)
    AutoModel.register(_model.config_class, _model, exist_ok=True)
