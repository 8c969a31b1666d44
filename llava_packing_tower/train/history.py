"""A training run's own record of the tower it ended with, to hold a reloaded checkpoint against."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

import torch
from torch import nn
from transformers import TrainerCallback

from ..checkpoint.hashing import tensor_digest
from ..towers.packing_tower import HEVCViTPackingVisionTower

TOWER_RECORD = "packing_tower.json"


def gathered(parameter: torch.Tensor) -> contextlib.AbstractContextManager:
    """Under ZeRO-3 the whole parameter on every rank (all ranks must enter), else nothing."""
    if not hasattr(parameter, "ds_id"):
        return contextlib.nullcontext()
    from deepspeed import zero

    return zero.GatheredParameters([parameter])


def summoned(model: nn.Module) -> contextlib.AbstractContextManager:
    """Under FSDP's first version all parameters whole, on GPUs in the memory of rank 0's CPU alone (all ranks must
    enter), else nothing."""
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
    from torch.distributed.fsdp import ShardingStrategy

    if not isinstance(model, FSDP):
        return contextlib.nullcontext()
    # torch refuses to offload what is not sharded, and crashes where it is on a CPU already.
    offload = model.compute_device.type != "cpu" and all(
        part.sharding_strategy != ShardingStrategy.NO_SHARD for part in FSDP.fsdp_modules(model)
    )
    return FSDP.summon_full_params(model, writeback=False, rank0_only=offload, offload_to_cpu=offload)


def digests_in_memory(model: nn.Module) -> dict[str, str]:
    """A digest of every tensor of the packing tower inside ``model``, by its name in the tower; {} without one.

    Collective under ZeRO-3 and FSDP; under FSDP those of rank 0 count.
    """
    digests = {}
    with summoned(model):
        for module in model.modules():
            if isinstance(module, HEVCViTPackingVisionTower):
                for name, parameter in module.vision_tower.named_parameters():
                    with gathered(parameter):
                        # FSDP's second version has DTensors; the first frees its memory afterwards, which nothing else
                        # may hold then: hence a copy.
                        whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter.clone()
                        digests[name.replace("_fsdp_wrapped_module.", "")] = tensor_digest(whole)
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
