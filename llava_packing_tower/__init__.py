"""Packed vision towers for LLaVA-NeXT. Public names are imported when they are first used."""

from __future__ import annotations

from importlib import import_module

__version__ = "0.1.0"

_PUBLIC = {
    "AIMv2Packing": "families.aimv2",
    "AIMv2PackingConfig": "families.aimv2",
    "DINOv3PackingConfig": "families.dinov3",
    "DINOv3ViTPacking": "families.dinov3",
    "HEVCViTPackingVisionTower": "tower",
    "HEVCViTVisionTower": "standard_tower",
    "LlavaViTConfig": "families.llava_vit_standard_config",
    "LlavaViTModel": "families.llava_vit_standard",
    "LlavaViTPackingConfig": "families.llava_vit",
    "LlavaViTPackingModel": "families.llava_vit",
    "PackingImageProcessor": "image_processor",
    "PatchLayout": "packing",
    "Siglip2NaflexPacking": "families.siglip2",
    "Siglip2PackingConfig": "families.siglip2",
    "batch_images_to_packing_input": "packing",
    "create_model": "variants",
    "image_to_packing_input": "packing",
    "patchify": "packing",
    "unpatchify": "packing",
    "compute_patch_positions_from_grid_thw": "positions",
    "compute_patch_positions_with_interpolated_temporal": "positions",
    "interpolate_frame_indices": "positions",
    "register_family": "families",
    "varlen_attention": "attention",
}
__all__ = sorted([*_PUBLIC, "__version__"])


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_PUBLIC[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
