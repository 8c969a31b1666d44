"""The named sizes of LlavaViT: standard (``hf_llava_vit_*``), packing (``hf_llava_vit_packing_*``), source, and
``ov_encoder_*``, those of the OneVision training code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

STANDARD, PACKING, SOURCE, ONEVISION = "standard", "packing", "source", "onevision"
FORMS = (STANDARD, PACKING, SOURCE, ONEVISION)
SIZE_FIELDS = ("patch_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")


@dataclass(frozen=True)
class Preset:
    """A name, the form of its weights (standard, packing, source, onevision) and the config fields that it fixes."""

    name: str
    form: str
    fields: Mapping[str, int | str]


# patch, width, layers, heads, MLP width
_SIZES: dict[str, tuple[int, int, int, int, int]] = {
    "small": (16, 384, 6, 6, 1536),
    "base": (16, 768, 12, 12, 3072),
    "large": (14, 1024, 24, 16, 4096),
    "huge": (14, 1280, 32, 20, 5120),
    "giant": (14, 1536, 40, 16, 6144),
}
# The standard "huge" was given other sizes in December 2025; packing and source kept the old ones.
_STANDARD_HUGE = (14, 1536, 27, 16, 4608)

PRESETS: dict[str, Preset] = {}


def register_preset(name: str, form: str, **fields: int | str) -> Preset:
    """Add a named size. ``form`` is one of ``FORMS``, else ``ValueError``; ``fields`` are config fields."""
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
    PRESETS[name] = Preset(name, form, fields)
    return PRESETS[name]


for _size, _numbers in _SIZES.items():
    register_preset(f"llava_vit_{_size}_ln", SOURCE, **dict(zip(SIZE_FIELDS, _numbers)))
    register_preset(f"hf_llava_vit_packing_{_size}_ln", PACKING, **dict(zip(SIZE_FIELDS, _numbers)))
    register_preset(
        f"hf_llava_vit_{_size}_ln",
        STANDARD,
        **dict(zip(SIZE_FIELDS, _STANDARD_HUGE if _size == "huge" else _numbers)),
    )
# All of the OneVision training code have patch 14. (Its "small" is in none of its published versions: the small size.)
for _size in ("small", "base", "large", "huge"):
    _fields = dict(zip(SIZE_FIELDS, _SIZES[_size])) | {"patch_size": 14, "image_size": 224}
    register_preset(f"ov_encoder_{_size}", ONEVISION, **_fields)
register_preset("llava_vit_base_rms", SOURCE, **dict(zip(SIZE_FIELDS, _SIZES["base"])), layer_norm_type="rms_norm")


def preset(name: str) -> Preset:
    """The named size. Raises ``ValueError`` (with the known names) for another name."""
    if name not in PRESETS:
        raise ValueError(f"unknown model name {name!r}; known: {', '.join(sorted(PRESETS))}")
    return PRESETS[name]


def mismatches(chosen: Preset, sizes: Mapping[str, object]) -> list[str]:
    """Where a preset and the sizes of a checkpoint differ, as "field: preset says 1536, the checkpoint 1280"."""
    return [
        f"{field}: {chosen.name} has {value}, the checkpoint {sizes[field]}"
        for field, value in chosen.fields.items()
        if field in sizes and sizes[field] != value and field != "image_size"  # which is nominal
    ]


def names_that_fit(sizes: Mapping[str, object]) -> list[str]:
    """Names of the presets with these sizes."""
    return [name for name, chosen in sorted(PRESETS.items()) if not mismatches(chosen, sizes)]
