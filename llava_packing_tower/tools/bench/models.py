"""The models that are measured: one size per family, and a tiny one of the same shape for machines without a GPU."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PretrainedConfig

from ...models.registry import family_for


@dataclass(frozen=True)
class Preset:
    """What is measured of a family.

    model_type: of the packed encoder; title: of the full size; full, tiny: fields of its config; select_layer: the
    hidden state that is wanted, counted from the end as LLaVA does (-1 is the last), or None for the final-normed
    patch tokens; forward, train: default workloads.
    """

    model_type: str
    title: str
    full: dict
    tiny: dict
    select_layer: int | None = None
    forward: tuple[str, ...] = ("ragged32",)
    train: tuple[str, ...] = ("ragged8",)

    def config(self, tiny: bool) -> PretrainedConfig:
        return family_for(self.model_type).config_class(**(self.tiny if tiny else self.full))

    def layers(self, config: PretrainedConfig) -> int:
        """Blocks that the wanted output needs."""
        return (
            config.num_hidden_layers if self.select_layer is None else config.num_hidden_layers + 1 + self.select_layer
        )


def _sizes(width: int, inner: int, layers: int, heads: int, patch: int, **more: object) -> dict:
    return dict(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        patch_size=patch,
        **more,
    )


_DINOV3 = dict(num_register_tokens=4, image_size=224, pos_embed_rescale=None)

PRESETS: dict[str, Preset] = {
    "llava_vit": Preset(
        "llava_vit_packing",
        "LlavaViT-L/14",
        _sizes(1024, 4096, 24, 16, 14, image_size=448),
        _sizes(64, 256, 3, 2, 14, image_size=112),
        select_layer=-2,
        forward=("uni1", "uni32", "ragged64"),
        train=("uni16", "ragged8"),
    ),
    "siglip2": Preset(
        "siglip2_packing",
        "SigLIP2 so400m/16",
        _sizes(1152, 4304, 27, 16, 16),
        _sizes(72, 144, 3, 2, 16),
        # What its peers lose by padding depends on the draw of the sizes.
        forward=("ragged32", *(f"ragged32#{seed}" for seed in range(2, 6))),
    ),
    "aimv2": Preset(
        "aimv2_packing",
        "AIMv2-L/14 native",
        _sizes(1024, 2816, 24, 8, 14, is_native=True, use_head=False),
        _sizes(64, 128, 3, 2, 14, is_native=True, use_head=False),
    ),
    "dinov3": Preset(
        "dinov3_packing",
        "DINOv3 ViT-L/16",
        _sizes(1024, 4096, 24, 16, 16, **_DINOV3),
        _sizes(64, 256, 3, 2, 16, **_DINOV3),
    ),
    "qwen3_vl": Preset(
        "qwen3_vl_packing",
        "Qwen3-VL vision tower (4B to 32B)",
        _sizes(1152, 4304, 27, 16, 16),
        _sizes(64, 96, 3, 2, 16, num_position_embeddings=64),
        train=("ragged32",),
    ),
    "qwen2_5_vl": Preset(
        "qwen2_5_vl_packing",
        "Qwen2.5-VL vision tower",
        _sizes(1280, 3420, 32, 16, 14),
        _sizes(64, 96, 3, 2, 14, fullatt_block_indexes=(1,)),
        train=("ragged32",),
    ),
    "moonvit": Preset(
        "moonvit_packing",
        "MoonViT (Kimi-VL)",
        _sizes(1152, 4304, 27, 16, 14),
        _sizes(64, 96, 3, 2, 14, pos_emb_height=8, pos_emb_width=8),
        train=("ragged32",),
    ),
    "onevision2": Preset(
        "onevision2_packing",
        "LLaVA-OneVision-2 vision tower",
        _sizes(1024, 4096, 24, 16, 14),
        _sizes(64, 96, 3, 2, 14),
        train=("ragged32",),
    ),
    "perception_encoder": Preset(
        "perception_encoder_packing",
        "PE-Lang-L14-448",
        _sizes(1024, 4096, 23, 16, 14, image_size=448, layer_scale=True, norm_post=False),
        _sizes(64, 96, 3, 2, 14, image_size=112, layer_scale=True, norm_post=False),
        train=("ragged32",),
    ),
    "radio": Preset(
        "radio_packing",
        "C-RADIOv4-H",
        _sizes(1280, 5120, 32, 16, 16, layer_scale=True),
        _sizes(64, 256, 3, 2, 16, max_img_size=256, layer_scale=True),
        train=("ragged32",),
    ),
}
