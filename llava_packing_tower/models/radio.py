"""RADIO (C-RADIOv3, C-RADIOv4): any resolution, a cropped table of positions, class and register tokens per image.

Reads ``radio`` checkpoints of transformers, NVIDIA's own files, and VLMs that have one as their tower. Model: Heinrich
et al. 2025, https://arxiv.org/abs/2412.07679; numerics after transformers' ``RadioModel``. Mean and deviation of pixels
are applied inside the model, so that its image processor only scales to 0..1. The random crops of positions with which
RADIO was trained are not part of it, nor are adaptors and summaries, nor the second patch projection that some
checkpoints have for several frames at once.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PretrainedConfig

from ..checkpoint.config_check import check_rate, one_side, refuse_unknown
from ..checkpoint.key_map import KeyMap, carried
from ..checkpoint.opening import blocks_of
from ..checkpoint.weights import WeightPlan
from ..data.cached_metadata import cached
from ..data.image_processor import PackingImageProcessor
from ..data.patches import PatchLayout
from ..data.pixel_scale import CLIP_MEAN, CLIP_STD
from ..data.positions import prefix_indices
from ..data.resampling import Resampling
from ..data.segments import Grid, VarlenMetadata, to_device
from ..kernels.rotary import wide
from .base import PackedVisionModel, stretched
from .encoder import PackedEncoder
from .foreign_config import heads_of, shape_of
from .layers import BlockConfig, Rotary
from .position_tables import PrefixTokens, ResampledPositions


class RadioPackingConfig(PretrainedConfig):
    """Configuration of :class:`RadioPacking`; defaults of transformers' ``radio``.

    intermediate_size: None is what ``mlp_ratio`` says. max_img_size: pixels of the table of positions.
        layer_scale: whether blocks have learned factors. norm_mean, norm_std: of pixels, per channel.

    Non-zero ``attention_probs_dropout_prob`` and ``drop_path_rate`` are carried and have no effect. Raises
    ``ValueError`` for sizes that are not square.
    """

    model_type = "radio_packing"

    def __init__(
        self,
        hidden_size: int = 1280,
        intermediate_size: int | None = None,
        num_hidden_layers: int = 32,
        num_attention_heads: int = 16,
        num_channels: int = 3,
        patch_size: int | Sequence[int] = 16,
        image_size: int | Sequence[int] = 224,
        max_img_size: int | Sequence[int] = 2048,
        mlp_ratio: float = 4.0,
        use_swiglu_ffn: bool = False,
        hidden_act: str = "gelu",
        layer_norm_eps: float = 1e-6,
        qkv_bias: bool = True,
        layer_scale: bool = False,
        num_cls_tokens: int = 3,
        num_registers: int = 7,
        norm_mean: Sequence[float] = CLIP_MEAN,
        norm_std: Sequence[float] = CLIP_STD,
        initializer_range: float = 0.02,
        attention_probs_dropout_prob: float = 0.0,
        drop_path_rate: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_rate("attention_probs_dropout_prob", attention_probs_dropout_prob)
        check_rate("drop_path_rate", drop_path_rate)
        if len(norm_mean) != num_channels or len(norm_std) != num_channels:
            raise ValueError(f"norm_mean and norm_std must have {num_channels} numbers, got {norm_mean} and {norm_std}")
        if intermediate_size is None:
            intermediate_size = int(hidden_size * mlp_ratio)
            if use_swiglu_ffn:  # two thirds of it, in whole eights
                intermediate_size = -(-int(intermediate_size * 2 / 3) // 8) * 8
        self.hidden_size = hidden_size
        self.intermediate_size: int = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_channels = num_channels
        self.patch_size: int = one_side("patch_size", patch_size)
        self.image_size: int = one_side("image_size", image_size)
        self.max_img_size: int = one_side("max_img_size", max_img_size)
        self.mlp_ratio = mlp_ratio
        self.use_swiglu_ffn = use_swiglu_ffn
        self.hidden_act = "silu" if use_swiglu_ffn else hidden_act
        self.layer_norm_eps = layer_norm_eps
        self.qkv_bias = qkv_bias
        self.layer_scale = layer_scale
        self.num_cls_tokens = num_cls_tokens
        self.num_registers = num_registers
        self.norm_mean, self.norm_std = list(norm_mean), list(norm_std)
        self.initializer_range = initializer_range
        self.attention_probs_dropout_prob = attention_probs_dropout_prob
        self.drop_path_rate = drop_path_rate

    @property
    def use_gated_mlp(self) -> bool:
        return self.use_swiglu_ffn


@cached(16)
def pixel_statistics(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """float32 ``[2, C, 1]`` on the device: mean and deviation."""
    return to_device(torch.tensor([mean, std], dtype=torch.float32, device="cpu")[..., None], device)


class ConditionedPatches(nn.Module):
    """Patch rows ``(channel, row, column)`` of pixels from 0 to 1, normalized in float32 and projected."""

    def __init__(self, config: RadioPackingConfig, patch_dim: int) -> None:
        super().__init__()
        self.mean, self.std = tuple(config.norm_mean), tuple(config.norm_std)
        self.proj = nn.Linear(patch_dim, config.hidden_size, bias=False)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        mean, std = pixel_statistics(self.mean, self.std, rows.device)
        normalized = (wide(rows).unflatten(1, (len(self.mean), -1)) - mean) / std
        return self.proj(normalized.flatten(1).to(rows.dtype))


class RadioPacking(PackedVisionModel):
    """The packed RADIO encoder; its outputs are the patch tokens, without class and register tokens.

    Rows are channel-first, of pixels from 0 to 1.
    """

    config_class = RadioPackingConfig
    patch_layout = PatchLayout.CHANNEL_FIRST
    source_model_types = ("radio_nvidia", "radio")
    tower_prefix = r"(vision_model\.)?radio_model\."
    value_tensors = r"(.*\.)?input_conditioner\.norm_(mean|std)"

    def __init__(self, config: RadioPackingConfig) -> None:
        super().__init__(config)
        block = BlockConfig.of(
            config,
            norm_eps=config.layer_norm_eps,
            gated_mlp=config.use_swiglu_ffn,
            qkv_bias=(config.qkv_bias,) * 3,
            layer_scale=1.0 if config.layer_scale else None,
        )
        side = config.max_img_size // config.patch_size
        self.patch_embed = ConditionedPatches(config, self.patch_dim)
        self.position_embedding = ResampledPositions((side, side), config.hidden_size, RESAMPLING)
        self.prefix = PrefixTokens(config.num_cls_tokens + config.num_registers, config.hidden_size)
        self.encoder = PackedEncoder(block, config.num_hidden_layers)
        self.post_init()

    def prepare(
        self, tokens: torch.Tensor, grids: Sequence[Grid], patch_positions: torch.Tensor | None
    ) -> tuple[torch.Tensor, VarlenMetadata, Rotary | None, torch.Tensor | None]:
        device, prefix = tokens.device, self.config.num_cls_tokens + self.config.num_registers
        # The table is resampled to the square of the longer side; an image takes its first rows and columns.
        tokens = self.position_embedding(tokens, grids, [(max(h, w),) * 2 for _, h, w in grids])
        insert, patches = prefix_indices(tuple(h * w for _, h, w in grids), prefix, device)
        return self.prefix(tokens, insert), self.segments_of(grids, device, prefix), None, patches

    def final_norm(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """There is none behind the last block."""
        return hidden_states

    @classmethod
    def config_from_source(cls, source: dict, shapes: Mapping | None = None) -> RadioPackingConfig:
        """The packing config for a ``radio`` config.json, that of a VLM with such a tower, or NVIDIA's own."""
        if source["model_type"] == "radio_nvidia":
            fields = nvidia_fields(source, shapes or {})
        else:
            vision = source.get("vision_config", source)
            if source["model_type"] not in cls.source_model_types:
                refuse_unknown(vision, (*CARRIED_FIELDS, *IGNORED_FIELDS))
            fields = carried(vision, CARRIED_FIELDS)
        for name, value in source.items():  # see value_tensors
            if name.endswith(("input_conditioner.norm_mean", "input_conditioner.norm_std")):
                fields[name.rpartition(".")[2]] = torch.tensor(value).flatten().tolist()
        fields["layer_scale"] = any(name.endswith(LAYER_SCALES) for name in shapes or {})
        return cls.config_class(**fields)

    @classmethod
    def plan_from_source(
        cls, source: dict, config: RadioPackingConfig, shapes: Mapping[str, tuple[int, ...]]
    ) -> WeightPlan:
        return KEY_MAP.plan(shapes)

    @classmethod
    def default_image_processor(cls, config: RadioPackingConfig) -> PackingImageProcessor:
        """Pixels to 0..1 only, bicubic, stretched to the config's image size. (The mean is what LLaVA pads with.)"""
        return stretched(config, image_mean=config.norm_mean, image_std=config.norm_std, do_normalize=False)


def nvidia_fields(raw: Mapping, shapes: Mapping[str, tuple[int, ...]]) -> dict:
    """Config fields of NVIDIA's own files, whose config.json has none of them: from the tensors."""
    prefix = next(name for name in shapes if name.endswith(EMBEDDER)).removesuffix(EMBEDDER)
    width, inner = shape_of(shapes, f"{prefix}{EMBEDDER}", 2)
    patch = round((inner / 3) ** 0.5)
    side = round(shape_of(shapes, f"{prefix}patch_generator.pos_embed", 3)[1] ** 0.5)
    size = raw.get("preferred_resolution") or (224, 224)
    return {
        "hidden_size": width,
        "intermediate_size": shape_of(shapes, f"{prefix}blocks.0.mlp.fc1.weight", 2)[0],
        "num_hidden_layers": blocks_of(shapes, rf"{re.escape(prefix)}blocks\.(\d+)\.norm1\.weight"),
        "num_attention_heads": heads_of(raw, width, PUBLISHED_HEADS, "NVIDIA's RADIO"),
        "patch_size": patch,
        "image_size": list(size),
        "max_img_size": side * patch,
        "num_cls_tokens": shape_of(shapes, f"{prefix}patch_generator.cls_token.token", 2)[0],
        "num_registers": 0,  # they are counted with the class tokens
        "qkv_bias": f"{prefix}blocks.0.attn.qkv.bias" in shapes,
    }


RESAMPLING = Resampling("bilinear", align_corners=False)
CARRIED_FIELDS = tuple(inspect.signature(RadioPackingConfig).parameters)[:-1]
IGNORED_FIELDS = (
    *("summary_idxs", "hidden_dropout_prob", "layerscale_value"),
    *("patch_dim", "video_patch_dim", "video_temporal_patch_size"),
)
PUBLISHED_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16, 1280: 16, 1408: 16, 1664: 16}
EMBEDDER = "patch_generator.embedder.weight"
LAYER_SCALES = ("layer_scale1.lambda1", "ls1.gamma", "ls1.grandma")

_BLOCK = r"(?:model\.blocks|encoder\.layer)\.(\d+)"
KEY_MAP = KeyMap(
    prefix=RadioPacking.tower_prefix,
    qkv=r"encoder\.layer\.(?P<block>\d+)\.attention\.(?P<part>[qkv])_proj\.(?P<kind>weight|bias)",
    renames={
        r"model\.patch_generator\.embedder\.weight|embeddings\.patch_projection\.weight": "patch_embed.proj.weight",
        r"model\.patch_generator\.pos_embed|embeddings\.position_embedding": (
            "position_embedding.weight",
            lambda table: table.flatten(0, 1),
        ),
        r"model\.patch_generator\.cls_token\.token|embeddings\.cls_register_token": "prefix.weight",
        rf"{_BLOCK}\.norm([12])\.(weight|bias)": r"encoder.layers.\1.layer_norm\2.\3",
        rf"{_BLOCK}\.attn\.(qkv|proj)\.(weight|bias)": r"encoder.layers.\1.self_attn.\2.\3",
        rf"{_BLOCK}\.attention\.o_proj\.(weight|bias)": r"encoder.layers.\1.self_attn.proj.\2",
        rf"{_BLOCK}\.(?:layer_scale|ls)([12])\.(?:lambda1|gamma|grandma)": r"encoder.layers.\1.layer_scale\2.weight",
        rf"{_BLOCK}\.mlp\.(fc[12])\.(weight|bias)": r"encoder.layers.\1.mlp.\2.\3",
        rf"{_BLOCK}\.mlp\.gate_proj\.(weight|bias)": r"encoder.layers.\1.mlp.gate.\2",
        rf"{_BLOCK}\.mlp\.up_proj\.(weight|bias)": r"encoder.layers.\1.mlp.fc1.\2",
        rf"{_BLOCK}\.mlp\.down_proj\.(weight|bias)": r"encoder.layers.\1.mlp.fc2.\2",
    },
    dropped={
        r"(.*\.)?input_conditioner\.norm_(mean|std)": "read into the config",
        r"(.*\.)?summary_idxs": "which class tokens summarize an image: the packed encoder returns patch tokens",
        r"(.*\.)?adaptors\..*": "an adaptor to another model's features",
        r"(.*\.)?(video_embedder|video_patch_projection)\.weight": "for several frames at once; this one takes images",
    },
)

AutoConfig.register(RadioPackingConfig.model_type, RadioPackingConfig, exist_ok=True)
AutoModel.register(RadioPackingConfig, RadioPacking, exist_ok=True)
