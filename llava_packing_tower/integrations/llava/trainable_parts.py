"""What is trained, how the checkpoint remembers its tower, and the check of both after a reload."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import nn

from ...data.images import with_keys
from ...towers.names import strip_prefix, tower_kind
from ...towers.packing_tower import HEVCViTPackingVisionTower
from ...towers.passes import budget_of
from ...towers.saved_tower import tower_fingerprint
from ...utils.files import user_path
from ...utils.tracing import is_plain
from .arguments import host_lacks
from .arguments_table import PARTS, tunable_parts
from .methods import Call, add_step
from .patcher import Patches
from .registry import host_of, meta_model, trainer_class

logger = logging.getLogger(__name__)

QUANTISERS = ("bitsandbytes", "quanto", "optimum", "torchao", "hqq", "awq", "gptqmodel")


def is_packing_tower(tower: object) -> bool:
    """Whether a vision tower is one of this package."""
    return isinstance(tower, HEVCViTPackingVisionTower)


def without_adapters(model: nn.Module) -> nn.Module:
    """The model itself, where PEFT has put adapters around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


# ---------------------------------------------------------------- while training starts


def remember_tower(arch: ModuleType, patches: Patches) -> None:
    """Have ``initialize_vision_modules`` note in the LLaVA config where the tower's weights will be found again."""

    host = host_of(arch)

    def remember(call: Call) -> Iterator[None]:
        self, model_args = call.self, call.arguments["model_args"]
        in_config, in_arguments = host.tower_settings
        parts = tunable_parts(getattr(model_args, "mm_tunable_parts", None))
        train = sys.modules.get(host.module(host.train))
        if train is not None and host_lacks(train, "mm_tunable_parts") and parts == ("mm_mlp_adapter",):
            model_args.tune_mm_mlp_adapter = True  # this host's own word for it: it then saves the adapter alone
        kept = self.get_vision_tower()
        other = kept is not None and is_another_tower(kept, self.config, getattr(model_args, in_arguments))
        yield
        if not is_packing_tower(self.get_vision_tower()):
            return
        if other:
            setattr(self.config, in_config, kept.vision_tower_name)
        tuned = "mm_vision_tower" in parts or getattr(model_args, "unfreeze_mm_vision_tower", False)
        earlier = getattr(self.config, "mm_packing_config", None) or {}
        # Tuned in an earlier stage: the folder has not had these weights since then, frozen or not today.
        in_checkpoint = tuned or earlier.get("weights") == "checkpoint"
        self.config.mm_packing_config = self.get_vision_tower().packing_config(
            weights="checkpoint" if in_checkpoint else "folder"
        )
        self.get_vision_tower().set_encoder_tokens(budget_of(model_args))
        processor = self.get_vision_tower().image_processor
        processor.read_images_as(with_keys(processor.image_reading, model_args))  # the checkpoint's, else as asked for
        for name, value in processor.image_reading.items().items():
            setattr(self.config, name, value)
        self.config.mm_packing_conversation = getattr(model_args, "version", None)  # an evaluation asks in it
        for name in ("mm_tunable_parts", "unfreeze_mm_vision_tower"):
            setattr(self.config, name, getattr(model_args, name, None))

    add_step(meta_model(arch), "LlavaMetaModel.initialize_vision_modules", "remember_tower", remember, patches)


def is_another_tower(kept: nn.Module, config: object, asked: str) -> bool:
    """Whether training asks for another tower than the checkpoint that it starts from has: the host keeps that one.

    Raises ``ValueError`` where LLaVA's own tower would be trained in place of ours; another packing tower is a warning.
    """
    if not is_packing_tower(kept):
        if tower_kind(asked) is not None:
            raise ValueError(
                f"{asked} is a packing tower, but the checkpoint that training starts from has a "
                f"{type(kept).__name__}, which LLaVA would keep. Start from the language model (model_name_or_path)"
            )
        return False
    here, there = (user_path(strip_prefix(name)) for name in (kept.vision_tower_name, asked))
    noted = (getattr(config, "mm_packing_config", None) or {}).get("fingerprint")
    if here == there or here.resolve() == there.resolve():
        return False
    if noted is not None and there.is_dir() and tower_fingerprint(there) == noted:
        return False
    logger.warning(
        "the vision tower is loaded from the checkpoint (%s); %s is not loaded", kept.vision_tower_name, asked
    )
    return True


def set_trainable(model: nn.Module, lora: bool) -> None:
    """Carry out ``mm_tunable_parts`` of the model's config, in the meaning that LLaVA-NeXT gave it."""
    parts = tunable_parts(getattr(model.config, "mm_tunable_parts", None))
    for name, parameter in model.named_parameters():
        if parts:
            parameter.requires_grad_("lora_" in name if lora and _part(name) == PARTS[3] else _part(name) in parts)
        elif getattr(model.config, "unfreeze_mm_vision_tower", False) and _part(name) == PARTS[0]:
            parameter.requires_grad_(True)


def _part(name: str) -> str:
    words = {"vision_tower": PARTS[0], "mm_projector": PARTS[1], "vision_resampler": PARTS[2]}
    return next((part for word, part in words.items() if word in name), PARTS[3])


def count_parts(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Trained and all parameters of each part that the model has, in the order of PARTS."""
    counts = {part: [0, 0] for part in PARTS}
    for name, parameter in model.named_parameters():
        size = getattr(parameter, "ds_numel", parameter.numel())
        counts[_part(name)][0] += size * parameter.requires_grad
        counts[_part(name)][1] += size
    return {part: (trained, total) for part, (trained, total) in counts.items() if total}


def tune_parts(train: ModuleType, patches: Patches) -> None:
    """On a host without ``mm_tunable_parts`` and ``mm_vision_tower_lr``: carry them out as its trainer is made."""
    trainer = trainer_class(train)
    if host_lacks(train, "mm_tunable_parts"):

        def tune(call: Call) -> None:
            if (model := call.arguments.get("model")) is not None:
                set_trainable(model, lora=getattr(call.arguments.get("args"), "lora_enable", False))

        add_step(trainer, "LLaVATrainer.__init__", "tune_parts", tune, patches)
    if host_lacks(train, "mm_vision_tower_lr") or "create_optimizer" not in vars(trainer):  # LLaVA-NeXT's for DPO

        def split(call: Call) -> Iterator[None]:
            yield
            rate = getattr(call.self.args, "mm_vision_tower_lr", None)
            if rate is not None:
                tower = {id(p) for n, p in call.self.model.named_parameters() if _part(n) == PARTS[0]}
                split_groups(call.result, tower, rate)

        add_step(trainer, "LLaVATrainer.create_optimizer", "tower_learning_rate", split, patches)


def split_groups(optimizer: torch.optim.Optimizer, ids: set[int], rate: float) -> None:
    """Give the parameters with these ids groups of their own with learning rate ``rate``, other options unchanged."""
    for group in list(optimizer.param_groups):
        chosen = [p for p in group["params"] if id(p) in ids]
        if chosen:
            group["params"] = [p for p in group["params"] if id(p) not in ids]
            optimizer.param_groups.append({**group, "params": chosen, "lr": rate})
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]


# ---------------------------------------------------------------- after a reload


def is_readable(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds weights that can be read here: in memory, floating-point, no library's own kind."""
    return is_plain(tensor) and not tensor.is_meta and tensor.is_floating_point()


def foreign_layers(module: nn.Module) -> list[str]:
    """The names of layers that hold their weight in another form than a file does: quantized ones.

    By what they hold (integers, a library's own tensors) or by having no parameter ``weight`` in the state at all.
    """
    names = []
    for name, layer in module.named_modules():
        own = {**dict(layer.named_parameters(recurse=False)), **dict(layer.named_buffers(recurse=False))}
        quantized = any(not tensor.is_floating_point() or not is_plain(tensor) for tensor in own.values())
        if own and (quantized or _is_foreign(layer)):
            names.append(name)
    return names


def _is_foreign(layer: nn.Module) -> bool:
    """A layer of a quantization library, by its package."""
    return type(layer).__module__.split(".")[0] in QUANTISERS
