"""MoonViT, the vision tower of Kimi-VL and Kimi-K2.5: learned positions resampled bicubically, and 2-D rotary ones.

Reads whole checkpoints (``kimi_vl``, ``kimi_k25``), of which it takes ``vision_tower.*`` alone, and folders of the
tower, under the names of the hub. Models: Kimi Team 2025, https://arxiv.org/abs/2504.07491, and 2026,
https://arxiv.org/abs/2602.02276; numerics after transformers' ``Kimi_K25VisionModel``. That of Kimi-VL takes images
only. In that of Kimi-K2.5 four frames of a clip see each other (``pos_emb_time``); a longer clip is processed four
frames at a time, as Kimi's own processor does it.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PretrainedConfig

from ..checkpoint.config_check import axial_theta, one_side, refuse_unknown
from ..checkpoint.key_map import KeyMap, carried
from ..checkpoint.weights import Recipe, WeightPlan
from ..data.image_processor import PackingImageProcessor
from ..data.patches import PatchLayout
from ..data.positions import frequency_ladder, positions_and_sizes
from ..data.resampling import Resampling
from ..data.segments import Grid, Segments, make_segments
from .base import PackedVisionModel, stretched
from .encoder import PackedEncoder
from .layers import BlockConfig, PatchEmbed, Rotary
from .merger import Merger, MergerSource, merger_recipes
from .position_tables import ResampledPositions


class MoonViTPackingConfig(PretrainedConfig):
    """Configuration of :class:`MoonViTPacking`; defaults of Kimi-VL's ``vision_config``.

    pos_emb_height, pos_emb_width: of the table of positions, in patches. pos_emb_time: frames that see each other; 0
        for images only. image_size: of the nominal image (default: that of the table). ``spatial_merge_size`` describes
        the projector of the VLM.

    Raises ``ValueError`` for sizes that are not square.
    """

    model_type = "moonvit_packing"

    def __init__(
        self,
        hidden_size: int = 1152,
        intermediate_size: int = 4304,
        num_hidden_layers: int = 27,
        num_attention_heads: int = 16,
        num_channels: int = 3,
        patch_size: int | Sequence[int] = 14,
        pos_emb_height: int = 64,
        pos_emb_width: int = 64,
        pos_emb_time: int = 0,
        spatial_merge_size: int = 2,
        hidden_act: str = "gelu_pytorch_tanh",
        rope_theta: float = 10000.0,
        initializer_range: float = 0.02,
        image_size: int | Sequence[int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_channels = num_channels
        self.patch_size: int = one_side("patch_size", patch_size)
        self.pos_emb_height = pos_emb_height
        self.pos_emb_width = pos_emb_width
        self.pos_emb_time = pos_emb_time
        self.spatial_merge_size = spatial_merge_size
        self.hidden_act = hidden_act
        self.rope_theta = rope_theta
        self.initializer_range = initializer_range
        nominal = self.patch_size * min(pos_emb_height, pos_emb_width)
        self.image_size: int = nominal if image_size is None else one_side("image_size", image_size)

    def attended(self, grids: Sequence[Grid]) -> list[tuple[list[int], Sequence[int]]]:
        """Lengths of the segments of a batch, with the numbers of the blocks that attend in them."""
        time = max(self.pos_emb_time, 1)
        lengths = [min(time, t - start) * h * w for t, h, w in grids for start in range(0, t, time)]
        return [(lengths, range(self.num_hidden_layers))]


def rotary_alternating(places: torch.Tensor, head_dim: int, theta: float) -> Rotary:
    """MoonViT's rotary table, for the "interleaved" rotation.

    With ``g_k = theta ** (-4k / head_dim)`` neighboring elements are rotated by ``column g_0, row g_0, column g_1,
    ...``, each angle for two of them.

    places: float32 ``[N, 2]`` (row, column). Returns cosines and sines, float32 ``[N, 1, head_dim]`` each.
    """
    ladder = frequency_ladder(head_dim // 4, theta, 4.0 / head_dim, places.device)
    angles = places.flip(1)[:, None, :] * ladder[:, None]
    angles = angles.flatten(1).repeat_interleave(2, dim=1).unsqueeze(1)
    return angles.cos(), angles.sin()


def frame_waves(frame: torch.Tensor, hidden_size: int) -> torch.Tensor:
    """Sine and cosine of a frame's number in its clip, float32 ``[N, hidden_size]``: ``[sin(t f), cos(t f)]`` with
    ``f_k = 10000 ** (-2k / hidden_size)``."""
    ladder = frequency_ladder(hidden_size // 2, 10000.0, 2.0 / hidden_size, frame.device)
    angles = frame.float().unsqueeze(1) * ladder
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class MoonViTPacking(PackedVisionModel):
    """The packed MoonViT. Rows are ``(channel, patch row, patch column)``."""

    config_class = MoonViTPackingConfig
    patch_layout = PatchLayout.CHANNEL_FIRST
    takes_positions = False
    source_model_types = ("kimi_vl", "kimi_k25", "kimi_k25_vision", "moonvit")
    tower_prefix = r"(model\.)?vision_tower\."
    merger_prefix = r"(model\.)?(multi_modal_projector|mm_projector)\."

    def __init__(self, config: MoonViTPackingConfig) -> None:
        super().__init__(config)
        self.image_only = config.pos_emb_time < 2
        block = BlockConfig.of(config, norm_eps=1e-5, rotary="interleaved")
        block.check_rotary(2, 4)
        sides = config.pos_emb_height, config.pos_emb_width
        self.patch_embed = PatchEmbed(
            config.num_channels, config.hidden_size, config.patch_size, bias=True, layout=self.patch_layout
        )
        self.position_embedding = ResampledPositions(sides, config.hidden_size, RESAMPLING)
        self.encoder = PackedEncoder(block, config.num_hidden_layers)
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=1e-5)
        self.post_init()

    def prepare(
        self, tokens: torch.Tensor, grids: Sequence[Grid], patch_positions: torch.Tensor | None
    ) -> tuple[torch.Tensor, Segments, Rotary | None, torch.Tensor | None]:
        device, time = tokens.device, max(self.config.pos_emb_time, 1)
        positions, sizes = positions_and_sizes(grids, device)
        tokens = self.position_embedding(tokens, grids)
        if any(t > 1 for t, _, _ in grids):
            frame, frames = positions[:, 0], sizes[:, 0]
            # Not where a frame is alone, as an image is.
            alone = torch.minimum(frames - frame // time * time, torch.full_like(frames, time)) == 1
            waves = frame_waves(frame % time, self.config.hidden_size) * ~alone[:, None]
            tokens = (tokens + waves).to(tokens.dtype)
        lengths = self.config.attended(grids)[0][0]
        rotary = rotary_alternating(positions[:, 1:].float(), self.encoder.head_dim, self.config.rope_theta)
        return tokens, make_segments(lengths, device), rotary, None

    def final_norm(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.final_layernorm(hidden_states)

    @classmethod
    def config_from_source(cls, source: dict, shapes: Mapping | None = None) -> MoonViTPackingConfig:
        """The packing config for the config.json of a whole checkpoint, or of the tower alone."""
        vision = source.get("vision_config", source)
        if source["model_type"] not in cls.source_model_types:
            refuse_unknown(vision, (*CARRIED_FIELDS, *ALIASES, *OF_THE_PROJECTOR, *FIXED, "rope_parameters"))
        for name, only in FIXED.items():
            if vision.get(name, only) != only:
                raise ValueError(f"its vision_config has {name} {vision[name]!r}; this tower's is {only!r}")
        fields = {**carried(vision, CARRIED_FIELDS, ALIASES), "rope_theta": axial_theta(vision, 10000.0)}
        if "merge_kernel_size" in vision:
            fields["spatial_merge_size"] = one_side("merge_kernel_size", vision["merge_kernel_size"])
        if source["model_type"].startswith("kimi_k25"):
            fields = {"pos_emb_time": 4, **fields}
        return cls.config_class(**fields)

    @classmethod
    def plan_from_source(
        cls, source: dict, config: MoonViTPackingConfig, shapes: Mapping[str, tuple[int, ...]]
    ) -> WeightPlan:
        plan = KEY_MAP.plan(shapes)
        for target, recipe in plan.recipes.items():
            if target.endswith(("self_attn.qkv.weight", "self_attn.qkv.bias")) and len(recipe.sources) == 3:
                plan.recipes[target] = Recipe(recipe.sources, partial(_neighbors, config.num_attention_heads))
        return plan

    @classmethod
    def merger_from_source(
        cls, source: dict, config: MoonViTPackingConfig, shapes: Mapping[str, tuple[int, ...]]
    ) -> MergerSource | None:
        """The final norm belongs to it: LLaVA takes the last block's output as it is."""
        norm = next((name.removesuffix(".weight") for name in shapes if name.endswith("final_layernorm.weight")), "")
        for first, second in MERGERS:
            found = next((name for name in shapes if name.endswith(f"projector.{first}.weight")), None)
            if found is None:
                continue
            prefix = found.removesuffix(f"{first}.weight")
            layers = (f"{prefix}pre_norm", f"{prefix}{first}", f"{prefix}{second}")
            out, inner = shapes[f"{prefix}{second}.weight"]
            merge, eps = config.spatial_merge_size, source.get("projection_layer_norm_eps", 1e-5)
            merger = Merger((merge, merge), config.hidden_size, inner, out, norm_eps=eps, input_norm_eps=1e-5)
            recipes = merger_recipes(*layers)
            recipes |= {f"ln_in.{kind}": Recipe((f"{norm}.{kind}",)) for kind in ("weight", "bias")}
            return MergerSource(merger, recipes)
        return None

    @classmethod
    def default_image_processor(cls, config: MoonViTPackingConfig) -> PackingImageProcessor:
        """Pixels to -1..1, bicubic, stretched to the square of the position table."""
        return stretched(config, image_mean=(0.5,) * 3, image_std=(0.5,) * 3)


def _neighbors(heads: int, *parts: torch.Tensor) -> torch.Tensor:
    """q, k and v of transformers in one tensor: what turns together is half a head apart there, side by side here."""

    def side_by_side(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)

    q, k, v = parts
    return torch.cat([side_by_side(q), side_by_side(k), v])


RESAMPLING = Resampling("bicubic", align_corners=False)
CARRIED_FIELDS = tuple(inspect.signature(MoonViTPackingConfig).parameters)[:-1]
ALIASES = {
    **{f"vt_{name}": name for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")},
    **{f"init_pos_emb_{axis}": f"pos_emb_{axis}" for axis in ("height", "width", "time")},
}
FIXED = {"pos_emb_type": "divided_fixed", "video_attn_type": "spatial_temporal"}
OF_THE_PROJECTOR = (
    *("merge_kernel_size", "merge_type", "mm_projector_type", "mm_hidden_size", "projector_hidden_act"),
    *("projector_ln_eps", "text_hidden_size"),
)
MERGERS = (("linear_1", "linear_2"), ("proj.0", "proj.2"), ("in_proj", "out_proj"))

_HUB, _BLOCK = r"encoder\.blocks\.(\d+)", r"layers\.(\d+)"
KEY_MAP = KeyMap(
    prefix=MoonViTPacking.tower_prefix,
    qkv=r"layers\.(?P<block>\d+)\.attn\.(?P<part>[qkv])_proj\.(?P<kind>weight|bias)",
    renames={
        r"patch_embed\.proj\.(weight|bias)": r"patch_embed.proj.\1",
        r"patch_embed\.pos_emb\.(?:weight|position_embeddings)": (
            "position_embedding.weight",
            lambda table: table.flatten(0, 1),
        ),
        rf"{_HUB}\.norm0\.(weight|bias)": r"encoder.layers.\1.layer_norm1.\2",
        rf"{_HUB}\.norm1\.(weight|bias)": r"encoder.layers.\1.layer_norm2.\2",
        rf"{_HUB}\.wqkv\.(weight|bias)": r"encoder.layers.\1.self_attn.qkv.\2",
        rf"{_HUB}\.wo\.(weight|bias)": r"encoder.layers.\1.self_attn.proj.\2",
        rf"{_HUB}\.mlp\.fc0\.(weight|bias)": r"encoder.layers.\1.mlp.fc1.\2",
        rf"{_HUB}\.mlp\.fc1\.(weight|bias)": r"encoder.layers.\1.mlp.fc2.\2",
        r"(?:encoder\.)?final_layernorm\.(weight|bias)": r"final_layernorm.\1",
        rf"{_BLOCK}\.norm([12])\.(weight|bias)": r"encoder.layers.\1.layer_norm\2.\3",
        rf"{_BLOCK}\.attn\.proj\.(weight|bias)": r"encoder.layers.\1.self_attn.proj.\2",
        rf"{_BLOCK}\.mlp\.(fc[12])\.(weight|bias)": r"encoder.layers.\1.mlp.\2.\3",
    },
)

AutoConfig.register(MoonViTPackingConfig.model_type, MoonViTPackingConfig, exist_ok=True)
AutoModel.register(MoonViTPackingConfig, MoonViTPacking, exist_ok=True)
