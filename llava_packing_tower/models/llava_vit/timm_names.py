"""The names of LlavaViT in timm's registry: no torch here, and nothing of timm until somebody imports it."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from .presets import PRESETS, SOURCE

logger = logging.getLogger(__name__)


def _entry_point(name: str) -> Callable[..., Any]:
    def make(pretrained: bool = False, **fields: object) -> Any:
        from .create_model import create_model
        from .source import create_source_model

        # timm passes its own bookkeeping along, empty for models without published weights.
        ours = {key: value for key, value in fields.items() if not key.startswith("pretrained_") and key != "cache_dir"}
        make_model = create_source_model if PRESETS[name].form == SOURCE else create_model
        return make_model(name, pretrained, **ours)

    make.__name__ = make.__qualname__ = name
    make.__doc__ = f"{name}, see llava_packing_tower.create_model; a name of the training code is its source model."
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


def when_timm_is_there(timm: ModuleType) -> None:
    """Register the names with an imported timm; a warning where it has changed so far that this fails."""
    try:
        register_with_timm()
    except (ImportError, RuntimeError) as error:
        logger.warning(
            "timm is installed but cannot be used (%s): create_model works, timm.create_model does not", error
        )
