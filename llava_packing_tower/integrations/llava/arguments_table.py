"""The arguments that the plugin adds to a host. A plain table: reading it needs no torch."""

from __future__ import annotations

from typing import Any, NamedTuple


class PluginArgument(NamedTuple):
    """An argument that hosts may lack: it is added to dataclass ``group`` of those that do."""

    name: str
    group: str
    annotation: str
    default: Any
    help: str


PLUGIN_ARGUMENTS: tuple[PluginArgument, ...] = (
    PluginArgument(
        "mm_tunable_parts",
        "ModelArguments",
        "Optional[str]",
        None,
        "what is trained: any of mm_vision_tower, mm_mlp_adapter, mm_vision_resampler, mm_language_model, "
        "joined by commas",
    ),
    PluginArgument("unfreeze_mm_vision_tower", "ModelArguments", "bool", False, "train the vision tower too"),
    PluginArgument(
        "mm_packing_attention",
        "ModelArguments",
        "str",
        "auto",
        "attention backend of a packing tower: auto, flash_attention_2, torch_varlen, sdpa or eager",
    ),
    PluginArgument(
        "mm_packing_compile",
        "ModelArguments",
        "bool",
        True,
        "fused encoder blocks of a packing tower, in half precision on CUDA; false: eager ones",
    ),
    PluginArgument(
        "mm_packing_min_patches",
        "ModelArguments",
        "Optional[int]",
        None,
        "image_aspect_ratio native: fewest patches of an image or frame; smaller ones are enlarged (16)",
    ),
    PluginArgument(
        "mm_packing_max_patches",
        "ModelArguments",
        "Optional[int]",
        None,
        "image_aspect_ratio native: most patches of an image or frame; larger ones are reduced (those of the tower's "
        "nominal image)",
    ),
    PluginArgument(
        "mm_packing_video",
        "ModelArguments",
        "Optional[str]",
        None,
        "image_aspect_ratio native: clip (the frames of a video see each other, at interpolated temporal positions; "
        "LlavaViT's default) or frames (each on its own)",
    ),
    PluginArgument(
        "mm_packing_video_max_patches",
        "ModelArguments",
        "Optional[int]",
        None,
        "image_aspect_ratio native: most patches of all frames of a video together (no limit)",
    ),
    PluginArgument(
        "mm_packing_exif",
        "ModelArguments",
        "Optional[bool]",
        None,
        "turn photos as their EXIF orientation says (true; false in checkpoints that were trained without this key)",
    ),
    PluginArgument(
        "mm_packing_background",
        "ModelArguments",
        "Optional[str]",
        None,
        "colour behind transparent pixels, by name or as #rrggbb (white); none drops the transparency, as LLaVA does",
    ),
    PluginArgument(
        "mm_packing_max_pixels",
        "ModelArguments",
        "Optional[int]",
        None,
        "largest image that is decoded, width x height (178000000)",
    ),
    PluginArgument(
        "mm_packing_max_aspect",
        "ModelArguments",
        "Optional[int]",
        None,
        "image_aspect_ratio native: an image whose longest side is more times its shortest is refused (200)",
    ),
    PluginArgument(
        "mm_vision_tower_lr",
        "TrainingArguments",
        "Optional[float]",
        None,
        "learning rate of the vision tower, where it differs from learning_rate",
    ),
    PluginArgument(
        "attn_implementation",
        "TrainingArguments",
        "Optional[str]",
        None,
        "attention of the language model: flash_attention_2, sdpa or eager",
    ),
)

PARTS = ("mm_vision_tower", "mm_mlp_adapter", "mm_vision_resampler", "mm_language_model")


def tunable_parts(value: str | None) -> tuple[str, ...]:
    """The parts named in ``mm_tunable_parts``. Raises ``ValueError`` for a name that is none of PARTS."""
    parts = tuple(part.strip() for part in (value or "").split(",") if part.strip())
    for part in parts:
        if part not in PARTS:
            raise ValueError(f"mm_tunable_parts names {part!r}; it takes {', '.join(PARTS)}, joined by commas")
    return parts
