"""A training run's own record of the tower it ended with, to hold a reloaded checkpoint against."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

import torch
from torch import nn
from transformers import TrainerCallback

from .digest import tensor_digest
from .tower import HEVCViTPackingVisionTower

TOWER_RECORD = "packing_tower.json"


def gathered(parameter: torch.Tensor) -> contextlib.AbstractContextManager:
    """Under ZeRO-3 the whole parameter on every rank (all ranks must enter), else nothing."""
    if not hasattr(parameter, "ds_id"):
        return contextlib.nullcontext()
    from deepspeed import zero

    return zero.GatheredParameters([parameter])


def digests_in_memory(model: nn.Module) -> dict[str, str]:
    """A digest of every tensor of the packing tower inside ``model``, by its name in the tower; {} without one.

    Collective under ZeRO-3.
    """
    digests = {}
    for module in model.modules():
        if isinstance(module, HEVCViTPackingVisionTower):
            for name, parameter in module.vision_tower.named_parameters():
                with gathered(parameter):
                    digests[name] = tensor_digest(parameter)
    return digests


class TowerRecord(TrainerCallback):
    """When training ends, writes the digests of the tower in memory to ``packing_tower.json`` in the output folder."""

    def on_train_end(self, args, state, control, model=None, **kwargs):
        digests = digests_in_memory(model)
        if digests and state.is_world_process_zero:
            file = Path(args.output_dir) / TOWER_RECORD
            file.parent.mkdir(parents=True, exist_ok=True)
            aside = file.with_suffix(f".{os.getpid()}")
            aside.write_text(json.dumps({"step": state.global_step, "tensors": digests}, indent=1), encoding="utf-8")
            aside.replace(file)
