"""The names of tensors, in a LLaVA and in its export."""

from __future__ import annotations

LLAVA_TOWER, HF_TOWER = "model.vision_tower.vision_tower.", "model.vision_tower."
DECODER = "model.language_model."
HEAD = "lm_head.weight"
SAME = ("model.mm_projector.", "model.image_newline", "lm_head.")
"""What is called the same in both."""


def exported_name(name: str) -> str:
    """A LLaVA's name of a tensor -> that in its export."""
    if name.startswith(LLAVA_TOWER):
        return HF_TOWER + name.removeprefix(LLAVA_TOWER)
    if name.startswith(SAME):
        return name
    return DECODER + name.removeprefix("model.")


def llava_name(name: str) -> str:
    """An export's name of a tensor -> that in a LLaVA."""
    if name.startswith(HF_TOWER):
        return LLAVA_TOWER + name.removeprefix(HF_TOWER)
    if name.startswith(DECODER):
        return f"model.{name.removeprefix(DECODER)}"
    return name
