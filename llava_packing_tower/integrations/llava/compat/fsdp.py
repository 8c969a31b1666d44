"""Compat patches for FSDP in the hosts' own trainers. They are looked for in runs that are given ``--fsdp`` only."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from types import ModuleType

from ..methods import Call, add_step
from ..patcher import Patches
from ..registry import host_of, meta_model, trainer_class
from . import compat_patch
from .trainer import _source


def _asked() -> bool:
    return any(word.partition("=")[0] == "--fsdp" for word in sys.argv)


def _cpu_is_left_out(accelerate: ModuleType) -> bool:
    if not _asked():
        return False
    import torch
    from accelerate.state import AcceleratorState

    if torch.cuda.is_available():
        return False
    before, _, _ = _source(AcceleratorState.__init__).partition("DistributedType.FSDP")
    return "MULTI_CPU" not in before


@compat_patch(
    module="accelerate",
    reason="without a GPU, accelerate silently uses DDP instead of FSDP, or fails with 'no available devices'",
    defect=_cpu_is_left_out,
)
def fsdp_on_cpu(accelerate: ModuleType, patches: Patches) -> None:
    import torch
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
    from torch.distributed.fsdp._flat_param import FlatParamHandle

    prepare, init = FullyShardedDataParallelPlugin.__post_init__, AcceleratorState.__init__
    to_cpu = FlatParamHandle.to_cpu

    @functools.wraps(prepare)
    def __post_init__(self):
        # torch copies weights from rank 0 on GPUs only. Every rank has read, or seeded, the same ones anyway.
        os.environ["FSDP_SYNC_MODULE_STATES"] = "false"
        prepare(self)

    @functools.wraps(init)
    def __init__(self, *args, **kwargs):
        init(self, *args, **kwargs)
        plugin = kwargs.get("fsdp_plugin")
        if plugin is None or self.distributed_type != DistributedType.MULTI_CPU:
            return
        self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        if self.mixed_precision != "no":
            plugin.set_mixed_precision(self.mixed_precision)
        self.fsdp_plugin = plugin
        # accelerate says "cpu:0", and to torch's FSDP that is another device than "cpu".
        self.device = PartialState._shared_state["device"] = torch.device("cpu")

    @functools.wraps(to_cpu)
    def stay(self):
        # From a CPU to itself nothing is copied, yet torch frees what it takes for the GPU's: reading it crashes.
        return contextlib.nullcontext() if self.flat_param.device.type == "cpu" else to_cpu(self)

    patches.set(FlatParamHandle, "to_cpu", stay)
    patches.set(FullyShardedDataParallelPlugin, "__post_init__", __post_init__)
    patches.set(AcceleratorState, "__init__", __init__)


@compat_patch(
    module="{arch}",
    reason="under --fsdp the host keeps the tower in a list outside of the model, so that it is neither trained nor "
    "saved; later steps of the host fail on that list",
    defect=lambda arch: (
        _asked() and "self.vision_tower = [vision_tower]" in _source(meta_model(arch).initialize_vision_modules)
    ),
)
def fsdp_tower(arch: ModuleType, patches: Patches) -> None:
    from ..tower_builder import tower_class

    def in_the_model(call: Call) -> None:
        # All that the host does with `fsdp` is to make that list.
        asked = getattr(call.arguments["model_args"], host_of(arch).tower_settings[1])
        if call.self.get_vision_tower() is not None or tower_class(asked) is not None:
            call.arguments["fsdp"] = None

    add_step(meta_model(arch), "LlavaMetaModel.initialize_vision_modules", "fsdp_tower", in_the_model, patches)


@compat_patch(
    module="{train}",
    reason="the projector is made in float32 beside a decoder in half precision, and FSDP takes one dtype only; the "
    "projector is cast, as DeepSpeed does, and trained parameters are upcast to float32 again",
    defect=lambda train: _asked() and "fsdp=training_args.fsdp" in _source(train.train),
)
def fsdp_dtypes(train: ModuleType, patches: Patches) -> None:
    def one_dtype(call: Call) -> None:
        arguments, model = call.arguments.get("args"), call.arguments.get("model")
        if model is not None and arguments is not None and arguments.fsdp and (arguments.bf16 or arguments.fp16):
            model.to(model.dtype)

    add_step(trainer_class(train), "LLaVATrainer.__init__", "fsdp_dtypes", one_dtype, patches)


@compat_patch(
    module="{train}",
    reason="under FSDP the host gathers the whole model on every GPU to save it, or (transformers 5) cannot save its "
    "shards; the trainer's own save_model() gathers it on rank 0",
    defect=lambda train: (
        _asked() and "state_dict = trainer.model.state_dict()" in _source(train.safe_save_model_for_hf_trainer)
    ),
)
def fsdp_save(train: ModuleType, patches: Patches) -> None:
    def by_trainer(call: Call) -> None:
        trainer = call.arguments["trainer"]
        if not trainer.args.fsdp or getattr(trainer.args, "tune_mm_mlp_adapter", False):
            return
        plugin = trainer.accelerator.state.fsdp_plugin
        plugin.set_state_dict_type("FULL_STATE_DICT")  # else transformers saves nothing here
        call.result = trainer.save_model(call.arguments["output_dir"])

    add_step(train, "train.safe_save_model_for_hf_trainer", "fsdp_save", by_trainer, patches)


def _unwraps_before_gathering(accelerate: ModuleType) -> bool:
    _, _, rest = _source(accelerate.Accelerator.get_state_dict).partition("FullStateDictConfig, ")
    return _asked() and "unwrap_model" in rest.partition("FullStateDictConfig(")[0]


@compat_patch(
    module="accelerate",
    reason="accelerate unwraps a model before it gathers its weights under FSDP, so that what FSDP's outermost wrapper "
    "holds (embeddings, projector, tower) is saved as the shard of one rank",
    defect=_unwraps_before_gathering,
)
def fsdp_pieces(accelerate: ModuleType, patches: Patches) -> None:
    from accelerate.utils import DistributedType

    gather = accelerate.Accelerator.get_state_dict

    @functools.wraps(gather)
    def get_state_dict(self, model, unwrap=True):
        return gather(self, model, unwrap and self.distributed_type != DistributedType.FSDP)

    patches.set(accelerate.Accelerator, "get_state_dict", get_state_dict)
