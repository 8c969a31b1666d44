"""Have LLaVA put text and images together from ids, masks and labels on the host, while it trains.

LLaVA asks each sample, with several questions, where its images belong. On a GPU every one of them waits for the tower,
which LLaVA starts before: 16 samples left an H200 idle for 20 ms of each step. Features and embeddings stay on the GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import torch

from ...data.segments import to_device
from .host import PREPARE
from .methods import Call, add_step
from .patcher import Patches
from .registry import host_of, mixin
from .trainable_parts import is_packing_tower

WORDS = ("input_ids", "attention_mask", "labels")
_COPY, _DEVICE = "_llava_packing_on_host", "_llava_packing_device"


def on_host(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor on the host: the copy that is there already, else a new one, which synchronizes."""
    copy, version = getattr(tensor, _COPY, (None, None))
    return copy if copy is not None and version == tensor._version else tensor.cpu()


def are_moved(ids: torch.Tensor) -> bool:
    """Whether ids are on the host for LLaVA alone."""
    return hasattr(ids, _DEVICE)


def device_before(ids: torch.Tensor) -> torch.device:
    """Where ids were before; where they are, if they were not moved."""
    return getattr(ids, _DEVICE, ids.device)


def join_on_host(arch: ModuleType, patches: Patches) -> None:
    """Add it to a host whose ``prepare_inputs_labels_for_multimodal`` works so (``Host.joins_on_host``).

    ``mm_packing_decoder: false`` leaves all of a step as the host has it.
    """
    from .packed_step import setting

    if not host_of(arch).joins_on_host:
        return

    def words(call: Call) -> Iterator[None]:
        self, given = call.self, call.arguments
        ids = given["input_ids"]
        trains = self.training and torch.is_grad_enabled() and is_packing_tower(self.get_vision_tower())
        if not trains or ids is None or not _is_away(ids) or not setting(self, "mm_packing_decoder", True):
            yield
            return
        given.update({name: given[name].cpu() for name in WORDS if given.get(name) is not None})
        setattr(given["input_ids"], _DEVICE, ids.device)
        yield
        call.result = tuple(_back(value, ids.device) for value in call.result)

    add_step(mixin(arch), f"LlavaMetaForCausalLM.{PREPARE}", "words_on_host", words, patches)


def _is_away(tensor: torch.Tensor) -> bool:
    return tensor.device.type != "cpu"


def _back(value: object, device: torch.device) -> object:
    """What LLaVA returns, on the device of what it was given. Copies remember the tensor that they are of."""
    if not isinstance(value, torch.Tensor) or value.device == device:
        return value
    there = to_device(value, device)
    setattr(there, _COPY, (value, there._version))
    return there
