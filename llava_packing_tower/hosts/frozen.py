"""A frozen tower keeps the weights of its own folder, also where the files that are loaded around it have none.

Such files are those of the plain decoder under a LoRA. transformers takes the tower in the model for one that was never
trained, and gives it random weights (4.40 to 4.51) or uninitialised memory (later), after it was loaded.
"""

from __future__ import annotations

import logging

import torch
from torch import nn

from ..tower import HEVCViTPackingVisionTower
from .tuning import tower_tensors

logger = logging.getLogger(__name__)


def restore_frozen(model: nn.Module, model_path: str, model_base: str | None = None) -> None:
    """Give the tower of a loaded LLaVA its own weights again where it is a frozen one; see :func:`restore`."""
    saved = getattr(model.config, "mm_packing_config", None) or {}
    if saved.get("weights") != "checkpoint":
        restore(model.get_vision_tower(), model_path, model_base)


@torch.no_grad()
def restore(tower: HEVCViTPackingVisionTower, model_path: str, model_base: str | None = None) -> list[str]:
    """Copy from the tower's own folder what neither ``model_path`` nor ``model_base`` has; returns the names.

    Tensors keep the dtype and device that they have. Raises ``ValueError`` where the folder has changed.
    """
    found = tower_tensors(model_path, model_base)
    prefix = "vision_tower."
    missing = [name for name in tower.state_dict() if name not in found]
    if not missing:
        return []
    own = tower._from_folder(torch.device("cpu"))[0].state_dict()
    for name, here in tower.state_dict().items():
        # Offloaded or quantised by the caller's own wish: nothing that could be written to.
        if name in missing and not here.is_meta and here.is_floating_point():
            here.copy_(own[name.removeprefix(prefix)])
    logger.info("the frozen vision tower has the weights of %s", tower.vision_tower_name)
    return missing
