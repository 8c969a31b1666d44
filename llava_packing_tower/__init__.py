"""Packed vision towers for LLaVA-NeXT. Public names are imported when they are first used."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version

from . import _renamed
from .hf import auto
from .models.llava_vit.timm_names import when_timm_is_there
from .utils.import_hooks import ImportHooks

__version__ = "0.2.0"

_PUBLIC = {
    "AIMv2Packing": "models.aimv2",
    "AIMv2PackingConfig": "models.aimv2",
    "DINOv3PackingConfig": "models.dinov3",
    "DINOv3ViTPacking": "models.dinov3",
    "HEVCViTPackingVisionTower": "towers.packing_tower",
    "HEVCViTVisionTower": "towers.standard_tower",
    "LlavaPackingConfig": "hf.configuration",
    "LlavaPackingForConditionalGeneration": "hf.modeling",
    "LlavaPackingImageProcessor": "hf.image_processing",
    "LlavaPackingProcessor": "hf.processing",
    "LlavaViTConfig": "models.llava_vit.config",
    "LlavaViTModel": "models.llava_vit.standard",
    "LlavaViTPackingConfig": "models.llava_vit.packed",
    "LlavaViTPackingModel": "models.llava_vit.packed",
    "MoonViTPacking": "models.moonvit",
    "MoonViTPackingConfig": "models.moonvit",
    "OneVision2Packing": "models.onevision2",
    "OneVision2PackingConfig": "models.onevision2",
    "PerceptionEncoderPacking": "models.perception_encoder",
    "PerceptionEncoderPackingConfig": "models.perception_encoder",
    "PackingImageProcessor": "data.image_processor",
    "PatchLayout": "data.patches",
    "Qwen2_5_VLVisionPacking": "models.qwen2_5_vl",
    "Qwen2_5_VLVisionPackingConfig": "models.qwen2_5_vl",
    "Qwen3VLVisionPacking": "models.qwen3_vl",
    "Qwen3VLVisionPackingConfig": "models.qwen3_vl",
    "RadioPacking": "models.radio",
    "RadioPackingConfig": "models.radio",
    "Siglip2NaflexPacking": "models.siglip2",
    "Siglip2PackingConfig": "models.siglip2",
    "batch_images_to_packing_input": "data.patches",
    "create_model": "models.llava_vit.create_model",
    "image_to_packing_input": "data.patches",
    "patchify": "data.patches",
    "unpatchify": "data.patches",
    "compute_patch_positions_from_grid_thw": "data.positions",
    "compute_patch_positions_with_interpolated_temporal": "data.positions",
    "interpolate_frame_indices": "data.positions",
    "register_family": "models.registry",
    "remap_state_dict_hf_to_packing": "models.llava_vit.remap",
    "remap_state_dict_packing": "models.llava_vit.remap",
    "varlen_attention": "attention.dispatch",
}
# (What an older transformers cannot import is still found by its name, and says then what it needs.)
_EXPORTS = auto.is_supported(version("transformers"))
__all__ = sorted(["__version__", *(name for name, place in _PUBLIC.items() if _EXPORTS or not place.startswith("hf."))])


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_PUBLIC[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__


def _watch() -> None:
    """Hear of transformers and timm when they are imported, before or after this package, or never."""
    hooks = ImportHooks()
    auto.install(hooks)
    hooks.install()
    hooks.after("timm", when_timm_is_there)


_renamed.install()
_watch()
