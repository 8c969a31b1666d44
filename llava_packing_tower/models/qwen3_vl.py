"""The vision tower of Qwen3-VL and Qwen3.5: temporal patches of two frames, learned positions and 2-D rotary ones.

Reads whole checkpoints (``qwen3_vl``, ``qwen3_vl_moe``, ``qwen3_5``, ``qwen3_5_moe``), of which it takes ``visual.*``
alone, and folders of the tower. Model: Bai et al. 2025, https://arxiv.org/abs/2511.21631; numerics after transformers'
``Qwen3VLVisionModel``. Frames see each other within a temporal patch only: each of them is a segment of its own.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PretrainedConfig

from ..checkpoint.config_check import axial_theta, one_side, refuse_unknown
from ..checkpoint.key_map import KeyMap, carried
from ..checkpoint.weights import WeightPlan
from ..data.image_processor import PackingImageProcessor
from ..data.patches import PatchLayout
from ..data.positions import positions_of_grids, rotary_2d
from ..data.resampling import Resampling
from ..data.segments import Grid, VarlenMetadata, make_segments
from .base import PackedVisionModel, stretched
from .encoder import PackedEncoder
from .layers import BlockConfig, Rotary
from .merger import Merger, MergerSource, merger_recipes
from .position_tables import ResampledPositions


class Qwen3VLVisionPackingConfig(PretrainedConfig):
    """Configuration of :class:`Qwen3VLVisionPacking`; defaults of ``qwen3_vl``'s ``vision_config``.

    There is no image size: ``image_size``, which only tells LLaVA the nominal patch counts and the image processor its
    square, is that of the position table unless given. ``spatial_merge_size``, ``out_hidden_size`` and
    ``deepstack_visual_indexes`` describe the VLM behind the tower: its projector, and the blocks (from 0) whose outputs
    it also reads.

    Raises ``ValueError`` if ``num_position_embeddings`` is not a square number, or for sizes that are not square.
    """

    model_type = "qwen3_vl_packing"

    def __init__(
        self,
        hidden_size: int = 1152,
        intermediate_size: int = 4304,
        num_hidden_layers: int = 27,
        num_attention_heads: int = 16,
        num_channels: int = 3,
        patch_size: int | Sequence[int] = 16,
        temporal_patch_size: int | Sequence[int] = 2,
        spatial_merge_size: int = 2,
        out_hidden_size: int = 3584,
        num_position_embeddings: int = 2304,
        deepstack_visual_indexes: Sequence[int] = (),
        hidden_act: str = "gelu_pytorch_tanh",
        rope_theta: float = 10000.0,
        initializer_range: float = 0.02,
        image_size: int | Sequence[int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        side = math.isqrt(num_position_embeddings)
        if side**2 != num_position_embeddings:
            raise ValueError(f"num_position_embeddings must be a square number, got {num_position_embeddings}")
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_channels = num_channels
        self.patch_size: int = one_side("patch_size", patch_size)
        self.temporal_patch_size: int = one_side("temporal_patch_size", temporal_patch_size)
        self.spatial_merge_size = spatial_merge_size
        self.out_hidden_size = out_hidden_size
        self.num_position_embeddings = num_position_embeddings
        self.deepstack_visual_indexes = list(deepstack_visual_indexes)
        self.hidden_act = hidden_act
        self.rope_theta = rope_theta
        self.initializer_range = initializer_range
        self.image_size: int = self.patch_size * side if image_size is None else one_side("image_size", image_size)

    def attended(self, grids: Sequence[Grid]) -> list[tuple[list[int], Sequence[int]]]:
        """Lengths of the segments of a batch, with the numbers of the blocks that attend in them."""
        return [([h * w for t, h, w in grids for _ in range(t)], range(self.num_hidden_layers))]


class Qwen3VLVisionPacking(PackedVisionModel):
    """The packed vision tower of Qwen3-VL. Rows are ``(channel, frame, patch row, patch column)``."""

    config_class = Qwen3VLVisionPackingConfig
    patch_layout = PatchLayout.CHANNEL_FIRST
    image_only = False
    takes_positions = False
    source_model_types = (
        *("qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"),
        *("qwen3_vl_vision", "qwen3_vl_moe_vision", "qwen3_5_vision", "qwen3_5_moe_vision"),
    )
    tower_prefix = r"(model\.)?visual\."

    def __init__(self, config: Qwen3VLVisionPackingConfig) -> None:
        super().__init__(config)
        block = BlockConfig.of(config, norm_eps=1e-6, rotary="half")
        block.check_rotary(2, 4)
        side = math.isqrt(config.num_position_embeddings)
        self.patch_embed = nn.Linear(self.patch_dim, config.hidden_size)
        self.position_embedding = ResampledPositions((side, side), config.hidden_size, RESAMPLING)
        self.encoder = PackedEncoder(block, config.num_hidden_layers)
        self.post_init()

    @property
    def frames_per_patch(self) -> int:
        return self.config.temporal_patch_size

    def prepare(
        self, tokens: torch.Tensor, grids: Sequence[Grid], patch_positions: torch.Tensor | None
    ) -> tuple[torch.Tensor, VarlenMetadata, Rotary | None, torch.Tensor | None]:
        places = positions_of_grids(grids, tokens.device)[:, 1:].float()
        rotary = rotary_2d(places, self.encoder.head_dim, self.config.rope_theta)
        segments = make_segments(self.config.attended(grids)[0][0], tokens.device)
        return self.position_embedding(tokens, grids), segments, rotary, None

    def final_norm(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """There is none: the norm behind the last block belongs to the projector."""
        return hidden_states

    @classmethod
    def config_from_source(cls, source: dict, shapes: Mapping | None = None) -> Qwen3VLVisionPackingConfig:
        """The packing config for the config.json of a whole checkpoint, or of the tower alone."""
        vision = source.get("vision_config", source)
        if source["model_type"] not in cls.source_model_types:
            refuse_unknown(vision, (*CARRIED_FIELDS, *ALIASES, "rope_parameters"))
        fields = carried(vision, CARRIED_FIELDS, ALIASES)
        return cls.config_class(**{**fields, "rope_theta": axial_theta(vision, 10000.0)})

    @classmethod
    def plan_from_source(
        cls, source: dict, config: Qwen3VLVisionPackingConfig, shapes: Mapping[str, tuple[int, ...]]
    ) -> WeightPlan:
        return KEY_MAP.plan(shapes)

    @classmethod
    def merger_from_source(
        cls, source: dict, config: Qwen3VLVisionPackingConfig, shapes: Mapping[str, tuple[int, ...]]
    ) -> MergerSource:
        prefix = next((name.removesuffix(FIRST) for name in shapes if name.endswith(f"merger{FIRST}")), "merger")
        cell = config.hidden_size * config.spatial_merge_size**2
        merger = Merger((config.spatial_merge_size,) * 2, config.hidden_size, cell, config.out_hidden_size)
        return MergerSource(merger, merger_recipes(*(f"{prefix}.{x}" for x in ("norm", "linear_fc1", "linear_fc2"))))

    @classmethod
    def default_image_processor(cls, config: Qwen3VLVisionPackingConfig) -> PackingImageProcessor:
        """Pixels to -1..1, bicubic, stretched to the square of the position table."""
        return stretched(config, image_mean=(0.5,) * 3, image_std=(0.5,) * 3)


FIRST = ".linear_fc1.weight"
RESAMPLING = Resampling("bilinear", align_corners=True)
CARRIED_FIELDS = tuple(inspect.signature(Qwen3VLVisionPackingConfig).parameters)[:-1]
ALIASES = {"depth": "num_hidden_layers", "num_heads": "num_attention_heads", "in_channels": "num_channels"}

KEY_MAP = KeyMap(
    prefix=Qwen3VLVisionPacking.tower_prefix,
    renames={
        r"patch_embed\.proj\.weight": (r"patch_embed.weight", lambda kernel: kernel.flatten(1)),
        r"patch_embed\.proj\.bias": r"patch_embed.bias",
        r"pos_embed\.weight": r"position_embedding.weight",
        r"blocks\.(\d+)\.norm([12])\.(weight|bias)": r"encoder.layers.\1.layer_norm\2.\3",
        r"blocks\.(\d+)\.attn\.(qkv|proj)\.(weight|bias)": r"encoder.layers.\1.self_attn.\2.\3",
        r"blocks\.(\d+)\.mlp\.linear_(fc[12])\.(weight|bias)": r"encoder.layers.\1.mlp.\2.\3",
    },
    dropped={
        r"(.*\.)?merger\..*": "the VLM's projector (mm_projector_type: checkpoint starts from it)",
        r"(.*\.)?deepstack_merger_list\..*": "a projector into a block of the VLM's decoder",
    },
)

AutoConfig.register(Qwen3VLVisionPackingConfig.model_type, Qwen3VLVisionPackingConfig, exist_ok=True)
AutoModel.register(Qwen3VLVisionPackingConfig, Qwen3VLVisionPacking, exist_ok=True)
