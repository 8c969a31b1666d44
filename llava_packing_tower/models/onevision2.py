"""The vision tower of LLaVA-OneVision-2: LlavaViT's blocks and 3-D rotary positions, attention in windows of frames.

Reads whole ``llava_onevision2`` checkpoints (remote code), of which it takes ``visual.*`` alone. Numerics after the
authors' ``LlavaOnevision2VisionPretrainedModel`` (https://github.com/EvolvingLMMs-Lab/LLaVA-OneVision-2). A clip is
attended to ``frame_windows_size`` frames at a time; the pooling head is not part of the packed encoder.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import AutoConfig, AutoModel

from ..checkpoint.key_map import KeyMap, carried
from ..checkpoint.weights import Recipe, WeightPlan
from ..data.image_processor import PackingImageProcessor
from ..data.patches import PatchLayout
from ..data.positions import rotary_3d_of_batch
from ..data.segments import Grid, Segments, make_segments
from .base import PackedVisionModel
from .encoder import PackedEncoder
from .layers import BlockConfig, PatchEmbed, Rotary, make_norm
from .llava_vit.config import STANDARD_FIELDS, LlavaViTConfig
from .merger import Merger, MergerSource, merger_recipes


class OneVision2PackingConfig(LlavaViTConfig):
    """Configuration of :class:`OneVision2Packing`: the fields of :class:`LlavaViTConfig` (no head), and more.

    frame_windows_size: frames of a clip that see each other; 0 for all of them. ``spatial_merge_size`` and
    ``out_hidden_size`` describe the projector of the VLM.
    """

    model_type = "onevision2_packing"

    def __init__(
        self,
        *args: Any,
        frame_windows_size: int = 4,
        spatial_merge_size: int = 3,
        out_hidden_size: int = 1024,
        **kwargs: Any,
    ) -> None:
        kwargs.setdefault("use_head", False)
        super().__init__(*args, **kwargs)
        self.frame_windows_size = frame_windows_size
        self.spatial_merge_size = spatial_merge_size
        self.out_hidden_size = out_hidden_size

    def attended(self, grids: Sequence[Grid]) -> list[tuple[list[int], Sequence[int]]]:
        """Lengths of the segments of a batch, with the numbers of the blocks that attend in them."""
        window = self.frame_windows_size or max(t for t, _, _ in grids)
        lengths = [min(window, t - start) * h * w for t, h, w in grids for start in range(0, t, window)]
        return [(lengths, range(self.num_hidden_layers))]


class OneVision2Packing(PackedVisionModel):
    """The packed vision tower of LLaVA-OneVision-2. Rows are ``(channel, patch row, patch column)``."""

    config_class = OneVision2PackingConfig
    patch_layout = PatchLayout.CHANNEL_FIRST
    image_only = False
    stretches_clips = False
    source_model_types = ("llava_onevision2_moe", "llava_onevision2")
    tower_prefix = r"(model\.)?visual\."

    def __init__(self, config: OneVision2PackingConfig) -> None:
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
        self.post_init()

    def prepare(
        self, tokens: torch.Tensor, grids: Sequence[Grid], patch_positions: torch.Tensor | None
    ) -> tuple[torch.Tensor, Segments, Rotary | None, torch.Tensor | None]:
        device, head_dim, theta = tokens.device, self.encoder.head_dim, self.config.rope_theta
        rotary = rotary_3d_of_batch(grids, patch_positions, head_dim, theta, device)
        segments = make_segments(self.config.attended(grids)[0][0], device)
        return self.layernorm_pre(tokens), segments, rotary, None

    def final_norm(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states if self.layernorm_post is None else self.layernorm_post(hidden_states)

    @classmethod
    def config_from_source(cls, source: dict, shapes: Mapping | None = None) -> OneVision2PackingConfig:
        """The packing config for the config.json of a whole checkpoint, or of the tower alone."""
        vision = source.get("vision_config", source)
        if vision.get("temporal_patch_size", 1) != 1:
            raise ValueError(f"its vision_config has temporal_patch_size {vision['temporal_patch_size']}; it must be 1")
        return cls.config_class(**{**DEFAULTS, **carried(vision, CARRIED_FIELDS)})

    @classmethod
    def plan_from_source(
        cls, source: dict, config: OneVision2PackingConfig, shapes: Mapping[str, tuple[int, ...]]
    ) -> WeightPlan:
        return KEY_MAP.plan(shapes)

    @classmethod
    def merger_from_source(
        cls, source: dict, config: OneVision2PackingConfig, shapes: Mapping[str, tuple[int, ...]]
    ) -> MergerSource:
        prefix = next((name.removesuffix(FIRST) for name in shapes if name.endswith(FIRST)), "")
        width, merge, eps = config.hidden_size, config.spatial_merge_size, config.layer_norm_eps
        layers = (f"{prefix}merger.{name}" for name in ("ln_q", "mlp.0", "mlp.2"))
        recipes, input_norm = merger_recipes(*layers), None
        if config.use_head:  # then the last block's output is normed first
            if config.layer_norm_type != "layer_norm":
                raise ValueError("the projector behind a head with layer_norm_type rms_norm is not read")
            recipes |= {f"ln_in.{k}": Recipe((f"{prefix}layernorm_post.{k}",)) for k in ("weight", "bias")}
            input_norm = eps
        merger = Merger(
            (merge, merge), width, width * merge**2, config.out_hidden_size, norm_eps=eps, input_norm_eps=input_norm
        )
        return MergerSource(merger, recipes)

    @classmethod
    def default_image_processor(cls, config: OneVision2PackingConfig) -> PackingImageProcessor:
        """CLIP statistics, bicubic, center crop at the config's image size."""
        return PackingImageProcessor(size=config.image_size, patch_size=config.patch_size)


FIRST = "merger.mlp.0.weight"
DEFAULTS = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14)
OWN_FIELDS = tuple(inspect.signature(OneVision2PackingConfig).parameters)[1:-1]
CARRIED_FIELDS = (*STANDARD_FIELDS, *(name for name in OWN_FIELDS if name not in STANDARD_FIELDS))

KEY_MAP = KeyMap(
    prefix=OneVision2Packing.tower_prefix,
    renames={r"embeddings\.patch_embedding\.weight": "patch_embed.proj.weight"},
    dropped={
        r"(.*\.)?merger\..*": "the VLM's projector (mm_projector_type: checkpoint starts from it)",
        r"(.*\.)?visual\.head\..*": "pooling head: the packed encoder returns patch tokens",
    },
)

AutoConfig.register(OneVision2PackingConfig.model_type, OneVision2PackingConfig, exist_ok=True)
AutoModel.register(OneVision2PackingConfig, OneVision2Packing, exist_ok=True)
