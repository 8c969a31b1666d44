"""The encoder families, by the ``model_type`` of a checkpoint's config.json (or by the word that stands for it where
there is none, see ``checkpoint.namings``). A new one is a file and a line here."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from ..checkpoint.model_type import source_type

if TYPE_CHECKING:
    from .base import PackedVisionModel


def with_towers(*names: str) -> tuple[str, ...]:
    """The ``model_type`` of VLMs, and those that transformers gives to their towers alone."""
    return tuple(f"{name}{part}" for name in names for part in ("", "_vision"))


# "module:class" (module relative to this package, or absolute): the model_types that it loads, its own first
CLASSES: dict[str, tuple[str, ...]] = {
    ".llava_vit.packed:LlavaViTPackingModel": ("llava_vit_packing", "llava_vit", "onevision_encoder"),
    ".siglip2:Siglip2NaflexPacking": (
        *("siglip2_packing", "siglip2", "siglip2_vision_model"),
        *("siglip2_timm", "siglip2_big_vision"),
    ),
    ".aimv2:AIMv2Packing": ("aimv2_packing", "aimv2", "aimv2_vision_model", "aimv2_apple", "aimv2_timm"),
    ".dinov3:DINOv3ViTPacking": ("dinov3_packing", "dinov3_vit", "dinov3_meta", "dinov3_timm"),
    ".qwen3_vl:Qwen3VLVisionPacking": (
        "qwen3_vl_packing",
        *with_towers("qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"),
    ),
    ".qwen2_5_vl:Qwen2_5_VLVisionPacking": ("qwen2_5_vl_packing", *with_towers("qwen2_5_vl")),
    ".moonvit:MoonViTPacking": ("moonvit_packing", "moonvit", "kimi_vl", *with_towers("kimi_k25")),
    ".onevision2:OneVision2Packing": ("onevision2_packing", "llava_onevision2", "llava_onevision2_moe"),
    ".perception_encoder:PerceptionEncoderPacking": (
        *("perception_encoder_packing", "perception_encoder_meta", "perception_encoder_timm"),
    ),
    ".radio:RadioPacking": ("radio_packing", "radio", "radio_nvidia"),
}
FAMILIES = {model_type: target for target, types in CLASSES.items() for model_type in types}
"""The target for each ``model_type``."""
ENTRY_POINTS = "llava_packing_tower.families"


def add_installed() -> None:
    """Add the families that installed packages name in their entry points; names of this package are not replaced."""
    for point in entry_points(group=ENTRY_POINTS):
        FAMILIES.setdefault(point.name, point.value)


add_installed()


def register_family(model_type: str, target: str) -> None:
    """Add a family from outside the package: ``register_family("my_vit", "my_package.my_vit:MyViTPacking")``."""
    FAMILIES[model_type] = target


def type_of(config: Mapping) -> str | None:
    """The ``model_type`` that a config.json is read as: its own or, where that is not known, its vision tower's."""
    return source_type(config, FAMILIES)


def part_of(config: Mapping) -> str | None:
    """The pattern of the names of a tower's tensors in the checkpoint with this config.json; None for no larger one,
    or where no family is known."""
    found = type_of(config)
    return family_for(found).tower_prefix if isinstance(found, str) and found in FAMILIES else None


def family_for(model_type: str | None) -> type[PackedVisionModel]:
    """The model class for a ``model_type``. Raises ``ValueError`` (with the known ones) for another."""
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(f"no packed encoder for model_type {model_type!r}; known: {', '.join(FAMILIES)}")
    module, _, name = FAMILIES[model_type].partition(":")
    return getattr(import_module(module, __package__), name)
