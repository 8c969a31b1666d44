"""Compat patches of DeepSpeed. The first three are for machines without a GPU and touch nothing where there is one."""

from __future__ import annotations

import functools
import inspect
import math
from types import ModuleType
from typing import TYPE_CHECKING

from ..patcher import Patches
from . import compat_patch

if TYPE_CHECKING:  # `import builder_patch` must stay cheap
    import torch


def _on_cpu() -> bool:
    from deepspeed.accelerator import get_accelerator

    return get_accelerator().device_name() == "cpu"


def _backend_globals() -> dict:
    """The globals of ``deepspeed/comm/torch.py`` (as an attribute, its name is taken by torch itself)."""
    from deepspeed.comm.torch import TorchBackend

    return TorchBackend.__init__.__globals__


@compat_patch(
    module="deepspeed",
    reason="a C++ operation that only inference uses is compiled when the process group starts, which needs a compiler",
    defect=lambda deepspeed: _on_cpu() and "build_shm_op" in _backend_globals(),
)
def ds_shm_op(deepspeed: ModuleType, patches: Patches) -> None:
    patches.set_item(_backend_globals(), "build_shm_op", lambda: None)


def _waits_for_the_last_gather_only(deepspeed: ModuleType) -> bool:
    from deepspeed.runtime.zero import partition_parameters

    return _on_cpu() and "launch_handles[-1].wait()" in inspect.getsource(partition_parameters)


@compat_patch(
    module="deepspeed",
    reason="ZeRO-3 waits only for the last of several all-gathers; gloo does not finish them in order, and an "
    "unfinished one overwrites weights that were just loaded",
    issue="deepspeedai/DeepSpeed#8539",
    defect=_waits_for_the_last_gather_only,
)
def ds_agsync(deepspeed: ModuleType, patches: Patches) -> None:
    for name in ("all_gather_into_tensor", "all_gather"):
        gather = getattr(deepspeed.comm, name)

        @functools.wraps(gather)
        def waited(*args, _gather=gather, **kwargs):
            handle = _gather(*args, **kwargs)
            if handle is not None and hasattr(handle, "wait"):
                handle.wait()
            return handle

        patches.set(deepspeed.comm, name, waited)


def _names_cpu_types_with_a_device(deepspeed: ModuleType) -> bool:
    from deepspeed.runtime.zero import stage_1_and_2

    return _on_cpu() and "torch.{}.HalfTensor" in inspect.getsource(stage_1_and_2.split_half_float_double)


@compat_patch(
    module="deepspeed",
    reason="with contiguous_gradients false, ZeRO-1 and ZeRO-2 sort gradients by names of types, which have no "
    "device on a CPU: each rank would train with its own gradients",
    defect=_names_cpu_types_with_a_device,
)
def ds_gradient_types(deepspeed: ModuleType, patches: Patches) -> None:
    from deepspeed.runtime.zero import stage_1_and_2

    def split_half_float_double(tensors: list[torch.Tensor]) -> list[list[torch.Tensor]]:
        dtypes = dict.fromkeys(tensor.dtype for tensor in tensors)
        return [[tensor for tensor in tensors if tensor.dtype == dtype] for dtype in dtypes]

    patches.set(stage_1_and_2, "split_half_float_double", split_half_float_double)


def _leaves_plain_parameters_uncast(deepspeed: ModuleType) -> bool:
    cast = getattr(deepspeed.DeepSpeedEngine, "_cast_module_mixed_precision", None)
    return cast is not None and "not is_zero_init_model" in inspect.getsource(cast)


@compat_patch(
    module="deepspeed",
    reason="under ZeRO-3, DeepSpeed 0.19 no longer casts parameters that were made outside of zero.Init, such as "
    "LLaVA's projector, and then fails on mixed dtypes",
    defect=_leaves_plain_parameters_uncast,
)
def zero3_cast(deepspeed: ModuleType, patches: Patches) -> None:
    original = deepspeed.DeepSpeedEngine._cast_module_mixed_precision

    @functools.wraps(original)
    def _cast_module_mixed_precision(self, param_dtype, buffer_dtype, is_zero_init_model, *args, **kwargs):
        if param_dtype is not None and is_zero_init_model:
            for parameter in self.module.parameters():
                if not hasattr(parameter, "ds_id") and parameter.is_floating_point():
                    parameter.data = parameter.data.to(param_dtype)
        return original(self, param_dtype, buffer_dtype, is_zero_init_model, *args, **kwargs)

    patches.set(deepspeed.DeepSpeedEngine, "_cast_module_mixed_precision", _cast_module_mixed_precision)


def _looks_at_each_gradient(deepspeed: ModuleType) -> bool:
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    check = getattr(DeepSpeedZeroOptimizer, "has_overflow_partitioned_grads_serial", None)
    return check is not None and _total_norm() is not None and "_has_inf_or_nan(grad)" in inspect.getsource(check)


def _total_norm():
    import torch

    return getattr(torch.nn.utils, "get_total_norm", None)  # torch before 2.6 has none


@compat_patch(
    module="deepspeed",
    reason="ZeRO-1 and ZeRO-2 look for infinities and NaN in one gradient after the other, in ten kernels each: "
    "small batches wait for them; the largest value of all gradients says the same",
    defect=_looks_at_each_gradient,
)
def overflow_check(deepspeed: ModuleType, patches: Patches) -> None:
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    original = DeepSpeedZeroOptimizer.has_overflow_partitioned_grads_serial

    @functools.wraps(original)
    def has_overflow_partitioned_grads_serial(self):
        groups = (self.averaged_gradients[group] for group in range(len(self.bit16_groups)))
        gradients = [gradient for group in groups for gradient in group if gradient is not None]
        if any(gradient.is_sparse for gradient in gradients):
            return original(self)
        # The largest absolute value is one of the values: no dtype overflows by it, and NaN is larger than all.
        largest = _total_norm()([gradient for gradient in gradients if gradient.numel()], math.inf)
        return largest.isfinite().logical_not().reshape(1)

    patches.set(DeepSpeedZeroOptimizer, original.__name__, has_overflow_partitioned_grads_serial)
