"""Which ``model_type`` a config.json is read as. No torch here: the launcher asks."""

from __future__ import annotations

from collections.abc import Collection, Mapping


def source_type(source: Mapping, known: Collection[str]) -> str | None:
    """The ``model_type`` that a config.json is read as: its own or, where that is not known, that of its vision tower.

    (A VLM that is newer than this package may have a tower that is not.)
    """
    vision, own = source.get("vision_config"), source.get("model_type")
    inner = vision.get("model_type") if isinstance(vision, dict) else None
    read = [name for name in (own, inner) if isinstance(name, str) and name in known]
    return read[0] if read else own
