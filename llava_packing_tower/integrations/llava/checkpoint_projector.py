"""``mm_projector_type: checkpoint``: the projector begins as the one that the VLM has behind its vision tower."""

from __future__ import annotations

import logging
from typing import Any

from ...checkpoint.opening import open_checkpoint
from ...checkpoint.weights import WeightPlan, load_weights
from ...models.merger import Merger
from ...models.registry import family_for, type_of
from ...multimodal.projectors import MergingProjector, merging_projector
from ...towers.names import strip_prefix
from ...towers.saved_tower import frozen_folder

logger = logging.getLogger(__name__)

NOTE = "mm_packing_projector"
"""In the config of a LLaVA checkpoint: what the projector is, for it is rebuilt without the VLM."""


def checkpoint_projector(config: Any) -> MergingProjector:
    """The projector for a LLaVA's config.

    Of a LLaVA checkpoint, whose config has a :data:`NOTE`, it is the bare module, for the loader to fill. Else it has
    the weights of the VLM that ``mm_vision_tower`` names, and the note is made.

    Raises ``ValueError`` where the tower's checkpoint has no projector, or one of another input or output than this
    LLaVA's tower and decoder.
    """
    if noted := getattr(config, NOTE, None):
        return merging_projector(Merger.from_dict(noted))
    name = str(config.mm_vision_tower)
    saved = getattr(config, "mm_packing_config", None) or {}
    opened = open_checkpoint((frozen_folder(name, saved) if saved else None) or strip_prefix(name), part=_pattern)
    raw, shapes = opened.raw, opened.files.shapes()
    family = family_for(type_of(raw))
    refused = f"mm_projector_type: checkpoint: {name}, a {raw.get('model_type')} checkpoint,"
    found = None
    if raw.get("model_type") != family.config_class.model_type:
        found = family.merger_from_source(raw, family.read_config(raw, shapes, opened.where), shapes)
    if found is None:
        raise ValueError(f"{refused} has no projector to start from: name a whole VLM, or another mm_projector_type")
    merger = found.merger
    for what, own, wanted in (
        ("takes features", merger.vision_size, config.mm_hidden_size),
        ("puts out tokens", merger.text_size, config.hidden_size),
    ):
        if own != wanted:
            raise ValueError(f"{refused} has a projector that {what} of width {own}; this model needs {wanted}")
    projector = merging_projector(merger)
    used = {source for recipe in found.recipes.values() for source in recipe.sources}
    plan = WeightPlan(found.recipes, {key: "not the projector's" for key in shapes if key not in used})
    load_weights(projector, plan, opened.files)
    logger.info("%s: the projector starts from the checkpoint's own (%s)", opened.path, merger)
    setattr(config, NOTE, merger.to_dict())
    return projector


def _pattern(raw: dict) -> str | None:
    """The pattern of the names of a VLM's tower and projector."""
    if not raw:
        return None
    family = family_for(type_of(raw))
    patterns = [pattern for pattern in (family.tower_prefix, family.merger_prefix) if pattern]
    return "|".join(f"({pattern})" for pattern in patterns) or None
