"""SigLIP2 NaFlex: images of any size, a learned position table resized to each grid, no rotary positions.

Reads the published checkpoints (``siglip2`` with its text tower, or ``siglip2_vision_model``). Model: Tschannen et al.
2025, https://arxiv.org/abs/2502.14786; numerics after transformers' ``Siglip2VisionModel``. The pooling head is not
part of the packed encoder.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, PretrainedConfig

from ..checkpoint.config_check import check_rate, one_side
from ..checkpoint.key_map import KeyMap, carried
from ..checkpoint.weights import WeightPlan
from ..data.cached_metadata import cached
from ..data.image_processor import PackingImageProcessor
from ..data.patches import PatchLayout
from ..data.positions import per_token, positions_of_grids
from ..data.segments import Grid, VarlenMetadata, to_device
from . import siglip2_names as names
from .activations import HALF
from .base import PackedVisionModel, stretched
from .encoder import PackedEncoder
from .layers import BlockConfig, Rotary
from .position_tables import LearnedTable


class Siglip2PackingConfig(PretrainedConfig):
    """Configuration of :class:`Siglip2NaflexPacking`; fields and defaults of ``siglip2_vision_model``.

    NaFlex has no image size of its own. ``image_size``, which only tells LLaVA the nominal patch counts and the image
    processor its square, is ``patch_size * sqrt(num_patches)`` unless given.

    A non-zero ``attention_dropout`` is carried and has no effect. Raises ``ValueError`` if ``num_patches`` is not a
    square number, or for sizes that are not square.
    """

    model_type = "siglip2_packing"

    def __init__(
        self,
        hidden_size: int = 768,
        intermediate_size: int = 3072,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        num_channels: int = 3,
        num_patches: int = 256,
        patch_size: int | Sequence[int] = 16,
        hidden_act: str = "gelu_pytorch_tanh",
        layer_norm_eps: float = 1e-6,
        attention_dropout: float = 0.0,
        initializer_range: float = 0.02,
        image_size: int | Sequence[int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        side = math.isqrt(num_patches)
        if side**2 != num_patches:
            raise ValueError(f"num_patches must be a square number (the position table is square), got {num_patches}")
        check_rate("attention_dropout", attention_dropout)
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_channels = num_channels
        self.num_patches = num_patches
        self.patch_size: int = one_side("patch_size", patch_size)
        self.hidden_act = hidden_act
        self.layer_norm_eps = layer_norm_eps
        self.attention_dropout = attention_dropout
        self.initializer_range = initializer_range
        self.image_size: int = self.patch_size * side if image_size is None else one_side("image_size", image_size)

    @property
    def vision_config(self) -> Siglip2PackingConfig:
        """This config itself, for scripts that expect the config of the whole model, with a text tower."""
        return self


@cached(maxsize=256)
def axis_weights(length: int, side: int) -> torch.Tensor:
    """How much each of ``side`` learned lines counts in each of ``length``: float32 ``[length, side]`` on the host.

    Bilinear with antialiasing, corners not aligned, as ``torch.nn.functional.interpolate`` has it.
    """
    lines = torch.eye(side, dtype=torch.float32, device="cpu")[None, None]
    return F.interpolate(lines, size=(length, side), mode="bilinear", align_corners=False, antialias=True)[0, 0]


class ResizedPositions(LearnedTable):
    """A square table of learned positions, resized to the grid of each image (see :func:`axis_weights`).

    Rows and columns are resized one after the other, so the position of a patch is a sum over the table, weighted with
    the products of its two weights: one matrix product for all images, as accurate as in float32.
    """

    def __init__(self, num_patches: int, hidden_size: int) -> None:
        super().__init__(num_patches, hidden_size)
        self.side = math.isqrt(num_patches)

    def forward(self, tokens: torch.Tensor, grids: Sequence[Grid]) -> torch.Tensor:
        """Tokens ``[N, hidden]`` plus the position of each."""
        starts: dict[int, int] = {}
        lines: list[torch.Tensor] = []
        for length in dict.fromkeys(n for _, h, w in grids for n in (h, w)):
            starts[length] = sum(len(line) for line in lines)
            lines.append(axis_weights(length, self.side))
        device = tokens.device
        table = to_device(torch.cat(lines), device)
        first = torch.tensor([(starts[h], starts[w]) for _, h, w in grids], device="cpu")
        places = per_token(first, [h * w for _, h, w in grids], device) + positions_of_grids(grids, device)[:, 1:]
        rows, columns = table.index_select(0, places[:, 0]), table.index_select(0, places[:, 1])
        shares = (rows[:, :, None] * columns[:, None, :]).flatten(1)
        if tokens.dtype == self.weight.dtype and tokens.dtype in HALF:
            # In half precision the shares are two numbers each, so that their product is as good as one of float32.
            high = shares.to(tokens.dtype)
            both = torch.cat([high, (shares - high).to(tokens.dtype)], 1)
            return torch.addmm(tokens, both, torch.cat([self.weight, self.weight]))
        float32 = torch.autocast(device.type, enabled=False) if device.type != "meta" else contextlib.nullcontext()
        with float32:
            return tokens + (shares @ self.weight.float()).to(self.weight.dtype)


class Siglip2NaflexPacking(PackedVisionModel):
    """The packed SigLIP2 NaFlex vision encoder. Rows are channel-last: ``(patch row, patch column, channel)``."""

    config_class = Siglip2PackingConfig
    patch_layout = PatchLayout.CHANNEL_LAST
    source_model_types = ("siglip2", "siglip2_vision_model", names.TIMM, names.BIG_VISION)

    def __init__(self, config: Siglip2PackingConfig) -> None:
        super().__init__(config)
        block = BlockConfig.of(config, norm_eps=config.layer_norm_eps)
        self.patch_embed = nn.Linear(self.patch_dim, config.hidden_size)
        self.position_embedding = ResizedPositions(config.num_patches, config.hidden_size)
        self.encoder = PackedEncoder(block, config.num_hidden_layers)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    def prepare(
        self, tokens: torch.Tensor, grids: Sequence[Grid], patch_positions: torch.Tensor | None
    ) -> tuple[torch.Tensor, VarlenMetadata, Rotary | None, torch.Tensor | None]:
        return self.position_embedding(tokens, grids), self.segments_of(grids, tokens.device), None, None

    def final_norm(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.post_layernorm(hidden_states)

    @classmethod
    def config_from_source(cls, source: dict, shapes: Mapping | None = None) -> Siglip2PackingConfig:
        """The packing config for a ``siglip2`` or ``siglip2_vision_model`` config.json, or for timm's or Google's
        weights."""
        if source["model_type"] in names.KEY_MAPS:
            read = names.fields_of(source, shapes or {})
            return cls.config_class(**{**read, **carried(source, CARRIED_FIELDS)})
        return cls.config_class(**carried(source.get("vision_config", source), CARRIED_FIELDS, ALIASES))

    @classmethod
    def plan_from_source(
        cls, source: dict, config: Siglip2PackingConfig, shapes: Mapping[str, tuple[int, ...]]
    ) -> WeightPlan:
        return names.KEY_MAPS.get(source["model_type"], KEY_MAP).plan(shapes)

    @classmethod
    def default_image_processor(cls, config: Siglip2PackingConfig) -> PackingImageProcessor:
        """Pixels to -1..1, bilinear, stretched to the square of the position table."""
        return stretched(config, image_mean=(0.5,) * 3, image_std=(0.5,) * 3, resample=2)

    @classmethod
    def image_processor_from_source(cls, content: dict, config: Siglip2PackingConfig) -> PackingImageProcessor:
        """NaFlex files state no size but ``max_num_patches``: the square with that many patches, rounded down."""
        if (most := content.get("max_num_patches")) and not content.get("size"):
            if type(most) is not int or most < 1:
                raise ValueError(f"max_num_patches must be a whole number above 0, got {most!r:.80}")
            side = config.patch_size * math.isqrt(most)
            content = {**content, "size": {"height": side, "width": side}}
        return super().image_processor_from_source(content, config)


CARRIED_FIELDS = tuple(inspect.signature(Siglip2PackingConfig).parameters)[:-1]
ALIASES = {"embed_dim": "hidden_size", "layer_norm_epsilon": "layer_norm_eps"}

KEY_MAP = KeyMap(
    prefix=r"vision_model\.",
    qkv=r"encoder\.layers\.(?P<block>\d+)\.self_attn\.(?P<part>[qkv])_proj\.(?P<kind>weight|bias)",
    renames={
        r"embeddings\.patch_embedding\.(weight|bias)": r"patch_embed.\1",
        r"embeddings\.position_embedding\.weight": r"position_embedding.weight",
        r"(encoder\.layers\.\d+\.self_attn)\.out_proj\.(weight|bias)": r"\1.proj.\2",
    },
    dropped={
        r"(vision_model\.)?head\..*": "pooling head: the packed encoder returns patch tokens",
        r"classifier\..*": "classifier head",
        r"text_model\..*": "text tower",
        r"logit_(scale|bias)": "image-text similarity",
        r"(vision_model\.)?embeddings\.position_ids": "a counter, not a weight",
    },
)

AutoConfig.register(Siglip2PackingConfig.model_type, Siglip2PackingConfig, exist_ok=True)
AutoModel.register(Siglip2PackingConfig, Siglip2NaflexPacking, exist_ok=True)
