"""A frozen tower has the weights of its own folder, except for those that are in the checkpoint.

Files that are loaded around it may have none of its tensors: those of the plain decoder under a LoRA. transformers then
takes the tower in the model for one that was never trained, and gives it random weights (4.40 to 4.51) or uninitialized
memory (later), after it was loaded. Or they have other values: part of the tower was trained by somebody who did not
say so. LLaVA 1.x would leave these out.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import nn

from ...checkpoint.weights import open_weights
from ...towers.packing_tower import HEVCViTPackingVisionTower
from ...utils.files import user_path
from .checkpoint_files import tower_tensors
from .trainable_parts import is_packing_tower, is_readable

logger = logging.getLogger(__name__)


def restore_frozen(
    model: nn.Module, model_path: str, model_base: str | None = None, even_adapted: bool = False
) -> None:
    """Give the tower of a loaded LLaVA its own weights again where it is a frozen one; see :func:`restore`.

    Not once a LoRA of the tower is merged into it (``even_adapted``: it is about to be).
    """
    saved = getattr(model.config, "mm_packing_config", None) or {}
    tower = model.get_vision_tower()
    if saved.get("weights") == "checkpoint" or not is_packing_tower(tower) or not tower.is_loaded:
        return
    if even_adapted or not adapter_has_tower(user_path(model_path)):
        restore(tower, model_path, model_base)


def adapter_has_tower(folder: Path) -> bool:
    """Whether a folder holds a LoRA with layers of the vision tower."""
    for file in (folder / "adapter_model.safetensors", folder / "adapter_model.bin"):
        if file.is_file():
            return any("vision_tower." in name for name in open_weights(file).keys())  # noqa: SIM118
    return False


@torch.no_grad()
def restore(tower: HEVCViTPackingVisionTower, model_path: str, model_base: str | None = None) -> list[str]:
    """Give the tower what its own folder has and neither ``model_path`` nor ``model_base`` does, and what these have
    and the folder does not; returns the names. (A cast to another dtype is no difference.)

    Tensors keep the dtype and device that they have. Raises ``ValueError`` where the folder has changed.
    """
    found, state = tower_tensors(model_path, model_base), tower.state_dict()
    prefix = "vision_tower."
    own = tower.read_folder().state_dict()
    missing, other = [], []
    for name, here in state.items():
        folder_value = own.get(name.removeprefix(prefix))
        if folder_value is None or not is_readable(here):  # offloaded or quantized by the caller's own wish
            continue
        saved = found.get(name)
        if saved is None:
            missing.append(name)
            here.copy_(folder_value)
        elif not is_cast_of(saved, folder_value):
            other.append(name)
            here.copy_(saved)
    if missing:
        logger.info("the frozen vision tower has the weights of %s", tower.vision_tower_name)
    if other:
        logger.warning(
            "%d tensors of the vision tower differ between %s and %s, for example %s: they were trained, and the "
            "values of the checkpoint are used",
            len(other),
            model_path,
            tower.vision_tower_name,
            other[0],
        )
    return missing + other


def is_cast_of(saved: torch.Tensor, original: torch.Tensor) -> bool:
    """Whether ``saved`` has the values of ``original``, as they are or rounded to a half-precision dtype."""
    if saved.shape != original.shape:
        return False
    return any(
        torch.equal(original.to(dtype).to(saved.dtype), saved) for dtype in (saved.dtype, torch.bfloat16, torch.float16)
    )
