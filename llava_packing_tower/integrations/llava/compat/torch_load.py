"""Compat patches for resuming: torch 2.6 and newer unpickle known types only, and these were left out.

Only plain containers of data are declared known: no file gets to run code by it. For it, too, a CPU has no number.
"""

from __future__ import annotations

import functools
import inspect
import io
from collections.abc import Sequence
from types import ModuleType

from ..patcher import Patches
from . import compat_patch


def _reads_known_types_only() -> bool:
    import torch

    return tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 6)


def _declare(types: Sequence[object], patches: Patches) -> None:
    from torch.serialization import add_safe_globals, clear_safe_globals, get_safe_globals

    before = list(get_safe_globals())

    def undo() -> None:
        clear_safe_globals()
        add_safe_globals(before)

    add_safe_globals(list(types))
    patches.on_undo(undo)


def _states_are_read_strictly(deepspeed: ModuleType) -> bool:
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

    source = inspect.getsource(TorchCheckpointEngine.load)
    return _reads_known_types_only() and "torch.load(" in source and "weights_only" not in source


@compat_patch(
    module="deepspeed",
    reason="DeepSpeed cannot read the optimizer states that it saved: torch.load refuses three of their types",
    defect=_states_are_read_strictly,
)
def ds_states(deepspeed: ModuleType, patches: Patches) -> None:
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    _declare([LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address], patches)


@compat_patch(
    module="transformers.trainer",
    reason="the trainer cannot read the random number states that it saved: torch.load refuses numpy arrays",
    defect=lambda trainer: (
        _reads_known_types_only() and "torch.load(rng_file)" in inspect.getsource(trainer.Trainer._load_rng_state)
    ),
)
def rng_states(trainer: ModuleType, patches: Patches) -> None:
    import numpy

    _, keys, *_ = numpy.random.get_state()
    rebuild, (array, *_), _ = keys.__reduce__()
    _declare([rebuild, array, numpy.dtype, type(keys.dtype)], patches)


CPU = "cpu:0"


def _cpu_has_no_number(trainer: ModuleType) -> bool:
    import torch

    if torch.cuda.is_available():
        return False
    torch.save(torch.zeros(1), file := io.BytesIO())
    file.seek(0)
    try:
        torch.load(file, map_location=CPU)
    except RuntimeError:
        return True
    return False


@compat_patch(
    module="transformers.trainer",
    reason="several processes on a CPU, without DeepSpeed, load their optimizer to the device cpu:0, which torch.load "
    "does not know",
    defect=_cpu_has_no_number,
)
def cpu_number(trainer: ModuleType, patches: Patches) -> None:
    _register_cpu()
    _known.add(CPU)
    patches.on_undo(_known.clear)


_known: set[str] = set()


@functools.cache
def _register_cpu() -> None:
    """Once: torch sorts what is registered, takes nothing back, and cannot order two of one priority."""
    from torch.serialization import register_package

    register_package(13, lambda storage: None, lambda storage, location: storage if location in _known else None)
