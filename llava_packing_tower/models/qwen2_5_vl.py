"""The vision tower of Qwen2.5-VL: attention in windows, in some blocks over the whole frame; 2-D rotary positions.

Reads whole ``qwen2_5_vl`` checkpoints, of which it takes ``visual.*`` alone, and folders of the tower. Model: Bai et
al. 2025, https://arxiv.org/abs/2502.13923; numerics after transformers' ``Qwen2_5_VisionTransformerPretrainedModel``.
Inside, the patches of a window stand together; hidden states come out in raster order.
"""

from __future__ import annotations

import inspect
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
from ..data.positions import rotary_2d
from ..data.segments import Grid, LayerSegments, Segments, make_segments
from ..data.windows import window_lengths, window_places
from .base import PackedVisionModel, stretched
from .encoder import PackedEncoder
from .layers import BlockConfig, Rotary
from .merger import Merger, MergerSource, merger_recipes


class Qwen2_5_VLVisionPackingConfig(PretrainedConfig):
    """Configuration of :class:`Qwen2_5_VLVisionPacking`; sizes of the published ``qwen2_5_vl`` checkpoints.

    window_size: side of a window in pixels. fullatt_block_indexes: blocks (from 0) that attend over the whole frame.
        image_size: of the nominal image, which only LLaVA's patch counts and the image processor's square are taken
        from. ``spatial_merge_size`` and ``out_hidden_size`` describe the projector of the VLM.

    Raises ``ValueError`` for sizes that are not square, or a window smaller than a cell of the projector.
    """

    model_type = "qwen2_5_vl_packing"

    def __init__(
        self,
        hidden_size: int = 1280,
        intermediate_size: int = 3420,
        num_hidden_layers: int = 32,
        num_attention_heads: int = 16,
        num_channels: int = 3,
        patch_size: int | Sequence[int] = 14,
        temporal_patch_size: int | Sequence[int] = 2,
        spatial_merge_size: int = 2,
        out_hidden_size: int = 3584,
        window_size: int = 112,
        fullatt_block_indexes: Sequence[int] = (7, 15, 23, 31),
        hidden_act: str = "silu",
        rope_theta: float = 10000.0,
        initializer_range: float = 0.02,
        image_size: int | Sequence[int] = 448,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_channels = num_channels
        self.patch_size: int = one_side("patch_size", patch_size)
        self.temporal_patch_size: int = one_side("temporal_patch_size", temporal_patch_size)
        self.spatial_merge_size = spatial_merge_size
        self.out_hidden_size = out_hidden_size
        self.window_size = window_size
        self.fullatt_block_indexes = list(fullatt_block_indexes)
        self.hidden_act = hidden_act
        self.rope_theta = rope_theta
        self.initializer_range = initializer_range
        self.image_size: int = one_side("image_size", image_size)
        if self.window_side < 1:
            raise ValueError(
                f"window_size {window_size} is smaller than a cell of {spatial_merge_size} patches of "
                f"{self.patch_size} pixels"
            )

    @property
    def window_side(self) -> int:
        """Patches along the side of a window: whole cells of the projector."""
        return self.window_size // self.spatial_merge_size // self.patch_size * self.spatial_merge_size

    @property
    def use_gated_mlp(self) -> bool:
        return True

    def attended(self, grids: Sequence[Grid]) -> list[tuple[list[int], Sequence[int]]]:
        """Lengths of the segments of a batch, with the numbers of the blocks that attend in them."""
        whole, blocks = set(self.fullatt_block_indexes), range(self.num_hidden_layers)
        return [
            (window_lengths(grids, self.window_side), [i for i in blocks if i not in whole]),
            ([h * w for t, h, w in grids for _ in range(t)], [i for i in blocks if i in whole]),
        ]


class Qwen2_5_VLVisionPacking(PackedVisionModel):
    """The packed vision tower of Qwen2.5-VL. Rows are ``(channel, frame, patch row, patch column)``."""

    config_class = Qwen2_5_VLVisionPackingConfig
    patch_layout = PatchLayout.CHANNEL_FIRST
    image_only = False
    takes_positions = False
    source_model_types = ("qwen2_5_vl", "qwen2_5_vl_vision")
    tower_prefix = r"(model\.)?visual\."

    def __init__(self, config: Qwen2_5_VLVisionPackingConfig) -> None:
        super().__init__(config)
        block = BlockConfig.of(config, norm="rms_norm", norm_eps=1e-6, gated_mlp=True, rotary="half")
        block.check_rotary(2, 4)
        self.patch_embed = nn.Linear(self.patch_dim, config.hidden_size, bias=False)
        self.encoder = PackedEncoder(block, config.num_hidden_layers)
        self.post_init()

    @property
    def frames_per_patch(self) -> int:
        return self.config.temporal_patch_size

    def prepare(
        self, tokens: torch.Tensor, grids: Sequence[Grid], patch_positions: torch.Tensor | None
    ) -> tuple[torch.Tensor, Segments, Rotary | None, torch.Tensor | None]:
        device, side = tokens.device, self.config.window_side
        places, positions = window_places(grids, side, device)
        positions = torch.empty_like(positions).index_copy(0, places, positions)
        rotary = rotary_2d(positions[:, 1:].float(), self.encoder.head_dim, self.config.rope_theta)
        (windows, _), (frames, whole) = self.config.attended(grids)
        kinds = make_segments(windows, device), make_segments(frames, device)
        segments = LayerSegments(kinds, tuple(int(i in whole) for i in range(self.num_layers)))
        return torch.empty_like(tokens).index_copy(0, places, tokens), segments, rotary, places

    def final_norm(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """There is none: the norm behind the last block belongs to the projector."""
        return hidden_states

    @classmethod
    def config_from_source(cls, source: dict, shapes: Mapping | None = None) -> Qwen2_5_VLVisionPackingConfig:
        """The packing config for the config.json of a whole checkpoint, or of the tower alone."""
        vision = source.get("vision_config", source)
        if source["model_type"] not in cls.source_model_types:
            known = ("rope_parameters", "tokens_per_second", "spatial_patch_size")
            refuse_unknown(vision, (*CARRIED_FIELDS, *ALIASES, *known))
        fields = carried(vision, CARRIED_FIELDS, ALIASES)
        return cls.config_class(**{**fields, "rope_theta": axial_theta(vision, 10000.0)})

    @classmethod
    def plan_from_source(
        cls, source: dict, config: Qwen2_5_VLVisionPackingConfig, shapes: Mapping[str, tuple[int, ...]]
    ) -> WeightPlan:
        return KEY_MAP.plan(shapes)

    @classmethod
    def merger_from_source(
        cls, source: dict, config: Qwen2_5_VLVisionPackingConfig, shapes: Mapping[str, tuple[int, ...]]
    ) -> MergerSource:
        prefix = next((name.removesuffix(FIRST) for name in shapes if name.endswith(FIRST)), "")
        width, merge = config.hidden_size, config.spatial_merge_size
        merger = Merger((merge, merge), width, width * merge**2, config.out_hidden_size, norm="rms_norm")
        layers = (f"{prefix}merger.{name}" for name in ("ln_q", "mlp.0", "mlp.2"))
        return MergerSource(merger, merger_recipes(*layers, norm_bias=False))

    @classmethod
    def default_image_processor(cls, config: Qwen2_5_VLVisionPackingConfig) -> PackingImageProcessor:
        """CLIP statistics, bicubic, stretched to the nominal square."""
        return stretched(config)


FIRST = "merger.mlp.0.weight"
CARRIED_FIELDS = tuple(inspect.signature(Qwen2_5_VLVisionPackingConfig).parameters)[:-1]
ALIASES = {
    "depth": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "in_channels": "num_channels",
    "in_chans": "num_channels",
}

KEY_MAP = KeyMap(
    prefix=Qwen2_5_VLVisionPacking.tower_prefix,
    renames={
        r"patch_embed\.proj\.weight": (r"patch_embed.weight", lambda kernel: kernel.flatten(1)),
        r"blocks\.(\d+)\.norm([12])\.weight": r"encoder.layers.\1.layer_norm\2.weight",
        r"blocks\.(\d+)\.attn\.(qkv|proj)\.(weight|bias)": r"encoder.layers.\1.self_attn.\2.\3",
        r"blocks\.(\d+)\.mlp\.gate_proj\.(weight|bias)": r"encoder.layers.\1.mlp.gate.\2",
        r"blocks\.(\d+)\.mlp\.up_proj\.(weight|bias)": r"encoder.layers.\1.mlp.fc1.\2",
        r"blocks\.(\d+)\.mlp\.down_proj\.(weight|bias)": r"encoder.layers.\1.mlp.fc2.\2",
    },
    dropped={r"(.*\.)?merger\..*": "the VLM's projector (mm_projector_type: checkpoint starts from it)"},
)

AutoConfig.register(Qwen2_5_VLVisionPackingConfig.model_type, Qwen2_5_VLVisionPackingConfig, exist_ok=True)
AutoModel.register(Qwen2_5_VLVisionPackingConfig, Qwen2_5_VLVisionPacking, exist_ok=True)
