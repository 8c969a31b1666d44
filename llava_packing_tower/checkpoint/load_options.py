"""The keywords of ``from_pretrained``: which are taken, which are refused, and where weights are to go."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

HUB_OPTIONS = {"revision", "token", "cache_dir", "local_files_only", "force_download"}
AUTO_OPTIONS = {
    "adapter_kwargs",
    "trust_remote_code",
    "low_cpu_mem_usage",
    "_from_auto",
    "_commit_hash",
}
"""What changes nothing here: no code of a checkpoint is run, and no weight is made twice."""
_DISPATCH = "pass device_map= alone, or call accelerate.dispatch_model on the loaded model"
_QUANTISE = "load the model, then quantize its layers"
_STRICT = "every tensor must fit; create a model from the config and load the tensors into it"
INSTEAD = {
    "variant": "keep each variant in a folder of its own and pass subfolder=",
    "max_memory": _DISPATCH,
    "offload_folder": _DISPATCH,
    "offload_state_dict": _DISPATCH,
    "offload_buffers": _DISPATCH,
    "quantization_config": _QUANTISE,
    "load_in_8bit": _QUANTISE,
    "load_in_4bit": _QUANTISE,
    "ignore_mismatched_sizes": _STRICT,
    "state_dict": _STRICT,
    "key_mapping": "convert the checkpoint: llava-packing convert",
    "gguf_file": "convert the checkpoint: llava-packing convert",
    "from_tf": "convert the checkpoint to safetensors",
    "from_flax": "convert the checkpoint to safetensors",
    "tp_plan": "use DeepSpeed, FSDP or DDP",
    "tp_size": "use DeepSpeed, FSDP or DDP",
    "device_mesh": "use DeepSpeed, FSDP or DDP",
    "distributed_config": "use DeepSpeed, FSDP or DDP",
    "adapter_name": "load an adapter with peft.PeftModel.from_pretrained",
    "use_kernels": "choose kernels with attn_implementation= and set_compile()",
}
"""Keywords of transformers that are refused, and the word or step to use in their place."""
SPREADING = ("auto", "balanced", "balanced_low_0", "sequential")


def check_options(cls: type, options: dict[str, object]) -> None:
    """Raises ``TypeError`` for keywords that would have no effect."""
    # What transformers passes along, or means "no".
    strange = {key for key in set(options) - HUB_OPTIONS - AUTO_OPTIONS if key not in INSTEAD or options[key]}
    if strange:
        words = "; ".join(f"instead of {key}: {INSTEAD[key]}" for key in sorted(strange) if key in INSTEAD)
        raise TypeError(
            f"{cls.__name__}.from_pretrained() got unexpected arguments {', '.join(sorted(strange))}"
            + (f" ({words})" if words else "")
        )


def placement(device_map: torch.device | str | int | dict | None) -> tuple[torch.device, str | dict | None]:
    """The device that weights are loaded to, and how they are spread afterwards (None: they stay)."""
    if isinstance(device_map, dict) and len(set(device_map.values())) == 1:
        device_map = next(iter(device_map.values()))
    if isinstance(device_map, dict) or device_map in SPREADING:
        return torch.device("cpu"), device_map
    try:
        device = torch.device("cpu" if device_map is None else device_map)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"device_map {device_map!r} is not a device, a dict of devices or one of {', '.join(SPREADING)}: {error}"
        ) from error
    return device, None


def spread(model: PreTrainedModel, device_map: str | dict) -> None:
    """Put the parts of a model on several devices, by accelerate."""
    from accelerate import dispatch_model, infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    if isinstance(device_map, str):
        whole, memory = model._no_split_modules, None
        if device_map != "sequential":
            low = device_map == "balanced_low_0"
            memory = get_balanced_memory(model, no_split_module_classes=whole, low_zero=low)
        device_map = infer_auto_device_map(model, max_memory=memory, no_split_module_classes=whole)
    dispatch_model(model, device_map)
