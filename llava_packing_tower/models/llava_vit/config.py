"""Configurations of the standard LlavaViT, which the packing one extends, and of its published successor."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from transformers import PretrainedConfig

from ...checkpoint.config_check import check_rate, one_side


class LlavaViTConfig(PretrainedConfig):
    """Configuration of :class:`LlavaViTModel`. ``image_size`` has no influence on the encoder itself.

    A non-zero ``attention_dropout`` is carried and has no effect. Raises ``ValueError`` for sizes that are not
    square.
    """

    model_type = "llava_vit"

    def __init__(
        self,
        hidden_size: int = 768,
        intermediate_size: int = 3072,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        num_channels: int = 3,
        image_size: int | Sequence[int] = 448,
        patch_size: int | Sequence[int] = 16,
        hidden_act: str = "gelu",
        layer_norm_eps: float = 1e-6,
        layer_norm_type: str = "layer_norm",
        attention_dropout: float = 0.0,
        initializer_range: float = 0.02,
        rope_theta: float = 10000.0,
        use_head: bool = True,
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
        self.hidden_act = hidden_act
        self.layer_norm_eps = layer_norm_eps
        self.layer_norm_type = layer_norm_type
        self.attention_dropout = attention_dropout
        self.initializer_range = initializer_range
        self.rope_theta = rope_theta
        self.use_head = use_head


STANDARD_FIELDS = tuple(inspect.signature(LlavaViTConfig).parameters)[:-1]


class OneVisionEncoderConfig(LlavaViTConfig):
    """The published successor's configuration: the same network, other defaults.

    ``rope_temporal_size`` is the number of frames that ``visible_indices`` count through (None: those of the input).
    """

    model_type = "onevision_encoder"

    def __init__(
        self,
        hidden_size: int = 1024,
        intermediate_size: int = 4096,
        num_hidden_layers: int = 24,
        num_attention_heads: int = 16,
        patch_size: int = 14,
        rope_temporal_size: int | None = 64,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, patch_size=patch_size, **kwargs
        )
        self.rope_temporal_size = rope_temporal_size
