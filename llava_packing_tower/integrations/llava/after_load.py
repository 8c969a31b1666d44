"""What is done with a model that LLaVA's loader has just loaded, before anybody else has it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType

from torch import nn

from .patcher import Patches
from .trainable_parts import is_packing_tower


def after_load(builder: ModuleType, patches: Patches, *acts: Callable[[nn.Module, str, str | None], object]) -> None:
    """Have ``load_pretrained_model`` call ``act(model, model_path, model_base)`` of each act, in this order, on every
    model with a packing tower. An error of an act is one of the loading."""
    original = builder.load_pretrained_model

    @functools.wraps(original)
    def load_pretrained_model(model_path, model_base=None, *args, **kwargs):
        result = original(model_path, model_base, *args, **kwargs)
        model = result[1]
        if is_packing_tower(getattr(model, "get_vision_tower", lambda: None)()):
            for act in acts:
                act(model, model_path, model_base)
        return result

    patches.set(builder, "load_pretrained_model", load_pretrained_model)
