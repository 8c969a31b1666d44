"""A frozen tower keeps the weights of its own folder, also where the files that are loaded around it have none.

Such files are those of the plain decoder under a LoRA. transformers takes the tower in the model for one that was never
trained, and gives it random weights (4.40 to 4.51) or uninitialised memory (later), after it was loaded.
"""

from __future__ import annotations

import functools
import logging
from types import ModuleType

import torch

from ..tower import HEVCViTPackingVisionTower
from .patches import Patches
from .tuning import _tower_tensors, is_packing_tower

logger = logging.getLogger(__name__)


def restore_after_load(builder: ModuleType, patches: Patches) -> None:
    """Have ``load_pretrained_model`` give a frozen tower its own weights again where no file had them."""
    original = builder.load_pretrained_model

    @functools.wraps(original)
    def load_pretrained_model(model_path, model_base=None, *args, **kwargs):
        result = original(model_path, model_base, *args, **kwargs)
        tower = getattr(result[1], "get_vision_tower", lambda: None)()
        if is_packing_tower(tower):
            saved = getattr(result[1].config, "mm_packing_config", None) or {}
            if saved.get("weights") != "checkpoint":
                restore(tower, model_path, model_base)
        return result

    patches.set(builder, "load_pretrained_model", load_pretrained_model)


@torch.no_grad()
def restore(tower: HEVCViTPackingVisionTower, model_path: str, model_base: str | None = None) -> list[str]:
    """Copy from the tower's own folder what neither ``model_path`` nor ``model_base`` has; returns the names.

    Tensors keep the dtype and device that they have. Raises ``ValueError`` where the folder has changed.
    """
    found = _tower_tensors(model_path, model_base)
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
