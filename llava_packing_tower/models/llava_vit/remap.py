"""State dicts of LlavaViT under the names of the packing model, by the names of the upstream conversion functions."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ...checkpoint.key_map import KeyMap
from .key_map import SOURCE_TO_PACKING, STANDARD_TO_PACKING


def remap_state_dict_hf_to_packing(hf_state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of the standard model (``llava_vit``, ``onevision_encoder``) under the names of the packing model.

    q, k and v become one ``qkv``; rotary tables are left out, for the packing model computes its own; names without a
    rule are kept. Raises ``ValueError`` if one of q, k and v is missing.
    """
    return _remap(hf_state_dict, STANDARD_TO_PACKING)


def remap_state_dict_packing(src_state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As :func:`remap_state_dict_hf_to_packing`, for tensors of the training code (``llava_vit_*``)."""
    return _remap(src_state_dict, SOURCE_TO_PACKING)


def _remap(tensors: Mapping[str, torch.Tensor], key_map: KeyMap) -> dict[str, torch.Tensor]:
    plan = key_map.plan({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    for target, recipe in plan.recipes.items():
        if missing := [name for name in recipe.sources if name not in tensors]:
            raise ValueError(f"{target} is made of {', '.join(recipe.sources)}: {', '.join(missing)} missing")
    return {
        target: recipe.build(*(tensors[name] for name in recipe.sources)) for target, recipe in plan.recipes.items()
    }
