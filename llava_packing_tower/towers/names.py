"""Which vision tower a name means: one rule for the launcher, the builder hook, evaluation and reloading.

In this order:

1. the prefix ``packing:``: the packing tower, and with several of them, ``packing:A + packing:B``, all together;
2. the note that a LLaVA checkpoint keeps of its tower (``mm_packing_config``): the tower it was trained with;
3. a local folder with a config.json: its ``model_type``. A packing folder (``*_packing``) means the packing tower,
   whatever its name. The published folder of a family means it if "packing" is in the folder's own name ("hevc_vit":
   the standard LlavaViT). Any other model type is passed to LLaVA's own builder;
4. without such a folder, the complete name: "packing", else "hevc_vit", else LLaVA's own builder.

No torch here: the launcher asks before anything is loaded.
"""

from __future__ import annotations

import functools
import logging
import os
import re
from collections.abc import Mapping

from ..models.registry import FAMILIES
from ..utils.files import CONFIG_NAME, read_json, user_path

logger = logging.getLogger(__name__)

PACKING = "packing"
STANDARD = "hevc_vit"
FUSED = "fused"
CHANNEL = "channel"
"""The way in which several towers are joined (``mm_packing_fusion``); the only one so far."""
NAME_PREFIX = "packing:"
SEPARATOR = re.compile(r"\s+\+\s+(?=packing:)", re.IGNORECASE)
PACKING_SUFFIX = "_packing"
STANDARD_TYPES = ("llava_vit", "onevision_encoder", "llava_vit_packing")
"""``model_type`` of the folders that the standard tower reads."""


def strip_prefix(name: str) -> str:
    """A folder or hub id without the optional ``packing:`` in front."""
    return name[len(NAME_PREFIX) :] if name.lower().startswith(NAME_PREFIX) else name


def tower_names(name: str) -> list[str]:
    """The folders or hub ids of ``packing:A + packing:B``, without prefixes; of any other name itself."""
    return [strip_prefix(part) for part in SEPARATOR.split(name)] if _has_prefix(name) else [name]


def check_single(name: object, command: str) -> None:
    """Raises ``ValueError`` for ``packing:A + packing:B``, given to a command that takes one tower."""
    names = tower_names(str(name))
    if len(names) > 1:
        raise ValueError(
            f"{name} are {len(names)} towers, which a LLaVA joins in training; {command} takes one of them at a time, "
            f"for example {names[0]}"
        )


def _has_prefix(name: str) -> bool:
    return name.lower().startswith(NAME_PREFIX)


def folder_model_type(name: str) -> str | None:
    """The ``model_type`` in the config.json of a local folder; None without folder, file or such a key.

    Raises ``ValueError`` for a file that is no JSON object.
    """
    file = user_path(strip_prefix(name)) / CONFIG_NAME
    found = read_json(file).get("model_type") if file.is_file() else None
    return found if isinstance(found, str) else None


def tower_kind(name: object, note: Mapping | None = None) -> str | None:
    """``"packing"``, ``"fused"``, ``"hevc_vit"``, or None for LLaVA's own builder; see the rule above.

    Args:
        name: the value of ``mm_vision_tower``.
        note: ``mm_packing_config`` of the LLaVA checkpoint that names this tower, if there is one.

    Raises:
        ValueError: the folder's config.json is no JSON object.
    """
    if not isinstance(name, str):
        return None
    if _has_prefix(name):
        return FUSED if len(tower_names(name)) > 1 else PACKING
    config = note.get("config") if isinstance(note, Mapping) else None
    noted = config.get("model_type") if isinstance(config, Mapping) else None
    if isinstance(noted, str):
        return PACKING if noted.endswith(PACKING_SUFFIX) or noted not in STANDARD_TYPES else STANDARD
    model_type = folder_model_type(name)
    if model_type is None:
        return _by_words(name)
    own_name = os.path.basename(os.path.abspath(os.path.expanduser(name)))
    found = _by_words(own_name)
    if model_type in STANDARD_TYPES and found == STANDARD:
        return STANDARD
    if model_type.endswith(PACKING_SUFFIX) or (model_type in FAMILIES and found == PACKING):
        return PACKING
    if PACKING in name.lower():
        _log_not_ours(name, model_type)
    return None


def _by_words(name: str) -> str | None:
    return next((word for word in (PACKING, STANDARD) if word in name.lower()), None)


@functools.cache
def _log_not_ours(name: str, model_type: str) -> None:
    logger.warning(
        "%s: LLaVA builds its own tower, because config.json has model_type %s, although 'packing' is in the path",
        name,
        model_type,
    )


def random_clip(name: object) -> str | None:
    """Why LLaVA must not get a name: it would build a CLIP with random weights for a local folder of a family, or of a
    language model.

    None where it may get it.
    """
    if not isinstance(name, str) or tower_kind(name) is not None:
        return None
    model_type = folder_model_type(name)
    if model_type is None:
        return None
    if model_type in FAMILIES:
        return (
            f"{name}: its config.json says model_type {model_type}, which LLaVA takes for a CLIP and fills with random "
            f"weights. Write {NAME_PREFIX}{name}"
        )
    raw = read_json(user_path(name) / CONFIG_NAME)
    if "vocab_size" in raw and "vision_config" not in raw:
        return (
            f"{name}: its config.json is that of a language model (model_type {model_type}), which LLaVA takes for a "
            f"CLIP and fills with random weights"
        )
    return None
