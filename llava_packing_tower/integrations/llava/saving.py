"""What is saved of a model, and what its config says of its tower, follows ``requires_grad`` at the moment of saving.

Arguments say what somebody meant to train. The hosts go by them, and silently lose other weights that were trained.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType

import torch
from torch import nn
from transformers import PretrainedConfig

from .checkpoint_files import LORA_EXTRAS, tensors_of
from .host import PREPARE
from .methods import Call, add_step
from .patcher import Patches
from .registry import meta_model, trainer_class
from .trainable_parts import is_packing_tower

logger = logging.getLogger(__name__)

TOWER = "vision_tower."
ADAPTER_WORD = "lora_"
# What a checkpoint of the projector alone keeps; the second with mm_use_im_start_end.
PROJECTOR_WORDS = ("mm_projector", "vision_resampler")
TOKEN_WORDS = ("embed_tokens", "embed_in")

_models: weakref.WeakSet[nn.Module] = weakref.WeakSet()


# ---------------------------------------------------------------- the config


def is_trained(tower: nn.Module) -> bool:
    """Whether any weight of the tower itself is trained. (A LoRA of it is saved with the LoRA.)"""
    return any(p.requires_grad for name, p in tower.named_parameters() if ADAPTER_WORD not in name)


def refresh_note(config: PretrainedConfig, tower: nn.Module) -> None:
    """Have ``mm_packing_config`` say that the checkpoint has the tower's weights, if the tower is trained.

    It is not taken back when the tower is frozen later: its folder has not had these weights since.
    """
    note = getattr(config, "mm_packing_config", None)
    weights = "checkpoint" if is_trained(tower) else "folder"
    if note is None:
        config.mm_packing_config = tower.packing_config(weights)
    elif weights == "checkpoint" and note.get("weights") != "checkpoint":
        config.mm_packing_config = {
            **{key: value for key, value in note.items() if key not in ("fingerprint", "folder")},
            "weights": "checkpoint",
        }


def note_when_saving(arch: ModuleType, patches: Patches) -> None:
    """Refresh the note whenever the config of a LLaVA is saved, with the model or without it.

    The hosts save the config alone for a LoRA and for a projector. A config does not know its model: they are looked
    up among the living ones.
    """

    def know(call: Call) -> Iterator[None]:
        yield
        _models.add(call.self)

    def refresh(call: Call) -> None:
        for model in list(_models):
            if model.config is call.self:
                _refresh(model)

    add_step(meta_model(arch), "LlavaMetaModel.__init__", "know_model", know, patches)
    add_step(PretrainedConfig, "PretrainedConfig.save_pretrained", "refresh_note", refresh, patches)


def note_with_models(models: ModuleType, patches: Patches) -> None:
    """The same for ``save_pretrained`` of the model classes of a host, which also covers copies of a model."""
    for cls in {id(c): c for c in vars(models).values() if isinstance(c, type)}.values():
        if hasattr(cls, PREPARE) and hasattr(cls, "save_pretrained"):
            refresh = lambda call: _refresh(call.self)  # noqa: E731
            add_step(cls, "LlavaForCausalLM.save_pretrained", "refresh_note", refresh, patches)


def _refresh(model: nn.Module) -> None:
    tower = model.get_vision_tower()
    if is_packing_tower(tower) and tower.is_loaded:
        refresh_note(model.config, tower)


# ---------------------------------------------------------------- the weights


def complete_tower(named: Iterable[tuple[str, torch.Tensor]]) -> list[tuple[str, torch.Tensor]]:
    """Names and parameters that are saved beside a LoRA: the trained ones, and the whole tower if any of it is trained.

    A reloaded tower comes from one place: the checkpoint, where a part of it was trained.
    """
    named = [(name, p) for name, p in named if ADAPTER_WORD not in name]
    tower = any(TOWER in name and p.requires_grad for name, p in named)
    return [(name, p) for name, p in named if p.requires_grad or (tower and TOWER in name)]


def lost_in_projector(model: nn.Module, tokens: bool) -> list[str]:
    """Names of trained parameters that a checkpoint of the projector alone does not keep; tokens: whether it keeps
    those of the embedding."""
    kept = PROJECTOR_WORDS + (TOKEN_WORDS if tokens else ())
    return [name for name, p in model.named_parameters() if p.requires_grad and not any(word in name for word in kept)]


@contextlib.contextmanager
def saves_what_is_trained(trainer: object) -> Iterator[None]:
    """Within it, the trainer's arguments ask for the projector alone only if nothing else is trained."""
    args, changed = trainer.args, {}
    if not getattr(args, "lora_enable", False) and _asks_for_the_projector(args):
        lost = lost_in_projector(trainer.model, getattr(args, "use_im_start_end", False))
        if lost:
            _log_whole(len(lost), lost[0])
            changed = {"tune_mm_mlp_adapter": False, "mm_tunable_parts": "mm_mlp_adapter,mm_language_model"}
    before = {name: getattr(args, name) for name in changed if hasattr(args, name)}
    for name in before:
        setattr(args, name, changed[name])
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(args, name, value)


def _asks_for_the_projector(args: object) -> bool:
    parts = [part.strip() for part in (getattr(args, "mm_tunable_parts", None) or "").split(",")]
    alone = len(parts) == 1 and parts[0] in ("mm_mlp_adapter", "mm_vision_resampler")
    return bool(getattr(args, "tune_mm_mlp_adapter", False)) or alone


@functools.cache
def _log_whole(count: int, example: str) -> None:
    logger.warning(
        "the arguments ask for the projector only, but %d other tensors are trained, for example %s: the whole model "
        "is saved",
        count,
        example,
    )


def save_what_is_trained(train: ModuleType, patches: Patches) -> None:
    """Have the host's train.py and trainer save what is trained, whatever the arguments say."""

    def what_is_trained(call: Call) -> Iterator[None]:
        with saves_what_is_trained(call.arguments["trainer"] if call.self is None else call.self):
            yield

    def whole_tower(call: Call) -> None:
        given = call.arguments
        if given.get("require_grad_only", True):
            given.update(named_params=complete_tower(given["named_params"]), require_grad_only=False)

    trainer = trainer_class(train)
    add_step(trainer, "LLaVATrainer._save", "save_what_is_trained", what_is_trained, patches)
    add_step(trainer, "LLaVATrainer._save_checkpoint", "save_what_is_trained", what_is_trained, patches)
    add_step(train, "train.safe_save_model_for_hf_trainer", "save_what_is_trained", what_is_trained, patches)
    add_step(train, "train.get_peft_state_non_lora_maybe_zero_3", "complete_tower", whole_tower, patches)
    resume_extras(trainer, patches)


def resume_extras(trainer: type, patches: Patches) -> None:
    """Save what is trained beside a LoRA in checkpoints that DeepSpeed does not write, and load it when resuming.

    transformers' own Trainer saves and loads only the adapter; the projector would start anew.
    """

    def concerned(self) -> bool:
        return getattr(self.args, "lora_enable", False) and not self.is_deepspeed_enabled and not self.args.fsdp

    def save(call: Call) -> Iterator[None]:
        yield
        self = call.self
        if concerned(self) and self.args.should_save:
            folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            extras = {name: p.detach().cpu() for name, p in complete_tower(self.model.named_parameters())}
            aside = folder / f".{LORA_EXTRAS}"
            torch.save(extras, aside)
            aside.replace(folder / LORA_EXTRAS)

    def load(call: Call) -> Iterator[None]:
        yield
        self, resume_from_checkpoint = call.self, call.arguments["resume_from_checkpoint"]
        if not concerned(self):
            return
        file = Path(resume_from_checkpoint) / LORA_EXTRAS
        extras = tensors_of(file) if file.is_file() else {}
        named = dict(complete_tower(self.model.named_parameters()))
        if missing := sorted(named.keys() - extras.keys()):
            raise ValueError(
                f"cannot resume from {resume_from_checkpoint}: it has a LoRA, but not the {len(missing)} other trained "
                f"tensors, for example {missing[0]}. Use another output_dir, or DeepSpeed"
            )
        with torch.no_grad():
            for name, parameter in named.items():
                parameter.copy_(extras[name])

    add_step(trainer, "LLaVATrainer._save_checkpoint", "lora_extras", save, patches)
    add_step(trainer, "LLaVATrainer._load_from_checkpoint", "lora_extras", load, patches)
