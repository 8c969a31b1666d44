"""Models by name: ``create_model("hf_llava_vit_packing_large_ln")``. Importing this file also registers the names with
timm, where timm is installed: then ``timm.create_model`` takes them too."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from torch import nn

from .config import LlavaViTConfig, OneVisionEncoderConfig
from .packed import LlavaViTPackingConfig, LlavaViTPackingModel
from .presets import ONEVISION, PACKING, PRESETS, preset
from .standard import LlavaViTModel, OneVisionEncoderModel

logger = logging.getLogger(__name__)


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


def _entry_point(name: str) -> Callable:
    def make(pretrained: bool = False, **fields: object) -> nn.Module:
        # timm passes its own bookkeeping along, empty for models without published weights.
        ours = {key: value for key, value in fields.items() if not key.startswith("pretrained_") and key != "cache_dir"}
        return create_model(name, pretrained, **ours)

    make.__name__ = make.__qualname__ = name
    make.__doc__ = f"{name}, see llava_packing_tower.create_model."
    return make


def register_with_timm() -> list[str]:
    """Make the names known to ``timm.create_model``; returns those that timm did not have from somebody else already.

    Raises ``ImportError`` where timm is missing.
    """
    from timm.models import is_model, register_model

    names = [name for name in PRESETS if not is_model(name)]
    for name in names:
        entry = _entry_point(name)
        setattr(sys.modules[__name__], name, entry)
        register_model(entry)
    return names


if find_spec("timm") is not None:
    try:
        register_with_timm()
    except (ImportError, RuntimeError) as error:
        logger.warning(
            "timm is installed but cannot be used (%s): create_model works, timm.create_model does not", error
        )
