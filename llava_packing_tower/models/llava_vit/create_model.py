"""Models by name: ``create_model("hf_llava_vit_packing_large_ln")``. (``timm.create_model`` takes the names too, see
:mod:`.timm_names`.)"""

from __future__ import annotations

from typing import Any

from .config import LlavaViTConfig, OneVisionEncoderConfig
from .packed import LlavaViTPackingConfig, LlavaViTPackingModel
from .presets import ONEVISION, PACKING, preset
from .standard import LlavaViTModel, OneVisionEncoderModel
from .timm_names import register_with_timm as register_with_timm


def create_model(name: str, pretrained: bool = False, **fields: object) -> LlavaViTPackingModel | LlavaViTModel:
    """A randomly initialized model of a named size.

    Args:
        name: ``hf_llava_vit_packing_{small,base,large,huge,giant}_ln`` for the packing model, ``hf_llava_vit_*_ln``
            for the standard one. The names of the training code, ``llava_vit_*_ln`` and ``llava_vit_base_rms``, give
            the standard model of those sizes; ``ov_encoder_{small,base,large,huge}`` that of the OneVision training
            code.
        pretrained: must be False; weights are loaded with ``from_pretrained(folder)``.
        fields: config fields in place of the preset's, e.g. ``image_size=224``.

    Raises:
        ValueError: an unknown name, or ``pretrained``.
    """
    chosen = preset(name)
    sizes: dict[str, Any] = {**chosen.fields, **fields}
    if pretrained:
        raise ValueError(f"no weights are published under the name {name!r}: use from_pretrained(folder or hub id)")
    if chosen.form == PACKING:
        return LlavaViTPackingModel(LlavaViTPackingConfig(**sizes))
    if chosen.form == ONEVISION:
        return OneVisionEncoderModel(OneVisionEncoderConfig(**sizes))
    return LlavaViTModel(LlavaViTConfig(**sizes))
