"""A trained weight that gets no gradient stops the run with an error that names it; else it would silently not change.

Causes are reentrant checkpointing above frozen layers, a part of the model that is never called, and ``no_grad`` or
``detach`` somewhere in between.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType

import torch
from torch import nn

from ...towers.packing_tower import HEVCViTPackingVisionTower
from .methods import Call, add_step
from .patcher import Patches
from .registry import trainer_class
from .trainable_parts import is_packing_tower

# Which experts of a layer are asked depends on the words of a batch.
NOT_IN_EVERY_BATCH = (".experts.",)
WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")


def idle_names(model: nn.Module) -> set[str]:
    """Trained parameters of packing towers that a selected feature does not depend on, and that may stay without a
    gradient: blocks above the selected layer, and what stands behind or beside the blocks.

    Under ZeRO-3 and FSDP they are not tied to the features (see :mod:`...models.unused_parameters`).
    """
    names = set()
    for prefix, tower in model.named_modules():
        if not isinstance(tower, HEVCViTPackingVisionTower) or not tower.is_loaded:
            continue
        above, used = [], []
        for start, part in tower.encoders().items():
            layers = range(max(part.feature_layers), part.config.num_hidden_layers)
            above += [f"{start}encoder.layers.{index}." for index in layers]
            used += [f"{start}encoder.", f"{start}patch_embed."]
        for name, _ in tower.named_parameters():
            clean = plain_name(name)
            if not clean.startswith(tuple(used)) or clean.startswith(tuple(above)):
                names.add(plain_name(f"{prefix}.{name}"))
    return names


def plain_name(name: str) -> str:
    """A parameter's name without the wrappers of FSDP, checkpointing and compilation."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


class GradientWatch:
    """Which trained parameters of a model got a gradient since it was made.

    By hooks on the parameters, which DDP and DeepSpeed leave alone. FSDP's first version computes with views in place
    of them, which are there once a unit has gathered its weights; its second keeps a gradient for each.
    """

    def __init__(self, model: nn.Module) -> None:
        self.names = [name for name, p in model.named_parameters() if p.requires_grad]
        self._reached: set[str] = set()
        self._hooks = []
        if units := fsdp_units(model):
            for unit in units:
                self._hooks.append(unit.module.register_forward_pre_hook(self._on_views(model, unit)))
            return
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and not hasattr(parameter, "full_tensor"):
                self._hooks.append(parameter.register_hook(functools.partial(self._mark, name)))

    def _mark(self, name: str, gradient: torch.Tensor | None) -> None:
        if gradient is not None:
            self._reached.add(name)

    def _on_views(self, model: nn.Module, unit: nn.Module) -> Callable:
        modules = dict(model.named_modules())
        mine = {id(module) for module in unit.modules()}
        owned = []
        for name in self.names:
            owner, _, leaf = name.rpartition(".")
            if id(modules[owner]) in mine:
                owned.append((name, modules[owner], leaf))

        def hook(*_: object) -> None:
            for name, module, leaf in owned:
                tensor = getattr(module, leaf, None)
                if isinstance(tensor, torch.Tensor) and tensor.requires_grad and not tensor.is_leaf:
                    tensor.register_hook(functools.partial(self._mark, name))

        return hook

    def without(self, model: nn.Module) -> list[str]:
        """The names of those that got none, on no rank. Collective where there are several; ends the watch."""
        for hook in self._hooks:
            hook.remove()
        kept = {n for n, p in model.named_parameters() if p.grad is not None and hasattr(p, "full_tensor")}
        whole = {n for n, p in model.named_parameters() if p.grad is not None and n.endswith("_flat_param")}
        reached = self._reached | kept | whole
        flags = torch.tensor([name in reached for name in self.names], dtype=torch.int32)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            on_cuda = torch.distributed.get_backend() == "nccl"
            flags = flags.to("cuda" if on_cuda else "cpu")
            torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
        excused = idle_names(model)
        names = [plain_name(name) for name, reached in zip(self.names, flags.tolist()) if not reached]
        return [n for n in names if n not in excused and not any(word in n for word in NOT_IN_EVERY_BATCH)]


def fsdp_units(model: nn.Module) -> list[nn.Module]:
    """The units of FSDP's first version in a model."""
    if not torch.distributed.is_available():
        return []
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel.fsdp_modules(model)


def refuse_without(names: Iterable[str]) -> None:
    """Raises ``RuntimeError`` that names parameters without a gradient, and what to do; nothing if there are none."""
    names = list(names)
    if names:
        raise RuntimeError(
            f"{len(names)} trained tensors got no gradient in the first step: {', '.join(names[:5])}"
            f"{', ...' if len(names) > 5 else ''}. They would not change. Freeze them (mm_tunable_parts), or let the "
            f"gradient through: gradient_checkpointing_kwargs with use_reentrant: false, or "
            f"enable_input_require_grads() where the layers below are frozen"
        )


def check_gradients(train: ModuleType, patches: Patches) -> None:
    """Have the host's trainer check the gradients of its first step, before the optimizer uses them."""

    def watch(call: Call) -> Iterator[None]:
        self = call.self
        if getattr(self, "_llava_packing_watched", False):
            yield
            return
        plain = getattr(self.model, "get_vision_tower", lambda: None)
        if not is_packing_tower(plain()):
            self._llava_packing_watched = True
            yield
            return
        watched = call.arguments["model"] if self.args.fsdp else self.model
        if not hasattr(self, "_llava_packing_watch"):
            self._llava_packing_watch = GradientWatch(watched)
        yield
        if self.accelerator.sync_gradients:  # not before all batches of the step were seen
            refuse_without(self._llava_packing_watch.without(watched))
            self._llava_packing_watched = True
            del self._llava_packing_watch

    add_step(trainer_class(train), "LLaVATrainer.training_step", "check_gradients", watch, patches)
