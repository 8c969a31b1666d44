"""The encoder families, by the ``model_type`` of a checkpoint's config.json (or by the word that stands for it where
there is none, see ``checkpoint.namings``). A new one is a file and a line here."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .base import PackedVisionModel

# model_type -> "module:class" (module relative to this package, or absolute)
FAMILIES: dict[str, str] = {
    "llava_vit_packing": ".llava_vit.packed:LlavaViTPackingModel",
    "llava_vit": ".llava_vit.packed:LlavaViTPackingModel",
    "onevision_encoder": ".llava_vit.packed:LlavaViTPackingModel",
    "siglip2_packing": ".siglip2:Siglip2NaflexPacking",
    "siglip2": ".siglip2:Siglip2NaflexPacking",
    "siglip2_vision_model": ".siglip2:Siglip2NaflexPacking",
    "siglip2_timm": ".siglip2:Siglip2NaflexPacking",
    "siglip2_big_vision": ".siglip2:Siglip2NaflexPacking",
    "aimv2_packing": ".aimv2:AIMv2Packing",
    "aimv2": ".aimv2:AIMv2Packing",
    "aimv2_vision_model": ".aimv2:AIMv2Packing",
    "aimv2_apple": ".aimv2:AIMv2Packing",
    "aimv2_timm": ".aimv2:AIMv2Packing",
    "dinov3_packing": ".dinov3:DINOv3ViTPacking",
    "dinov3_vit": ".dinov3:DINOv3ViTPacking",
    "dinov3_meta": ".dinov3:DINOv3ViTPacking",
    "dinov3_timm": ".dinov3:DINOv3ViTPacking",
}
ENTRY_POINTS = "llava_packing_tower.families"


def add_installed() -> None:
    """Add the families that installed packages name in their entry points; names of this package are not replaced."""
    for point in entry_points(group=ENTRY_POINTS):
        FAMILIES.setdefault(point.name, point.value)


add_installed()


def register_family(model_type: str, target: str) -> None:
    """Add a family from outside the package: ``register_family("my_vit", "my_package.my_vit:MyViTPacking")``."""
    FAMILIES[model_type] = target


def family_for(model_type: str | None) -> type[PackedVisionModel]:
    """The model class for a ``model_type``. Raises ``ValueError`` (with the known ones) for another."""
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(f"no packed encoder for model_type {model_type!r}; known: {', '.join(FAMILIES)}")
    module, _, name = FAMILIES[model_type].partition(":")
    return getattr(import_module(module, __package__), name)
