"""Out of memory in a training step: how much was asked for, and which keys lower it."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from ...data.native_config import asks_for_native
from ...towers.passes import KEY, is_explained, is_out_of_memory
from .dealt_batches import asked_of
from .methods import Call, add_step
from .patcher import Patches
from .speed_meter import Meter, MicroStep
from .trainable_parts import is_packing_tower, without_adapters


def explain_out_of_memory(patches: Patches) -> None:
    """Have every trainer add to torch's message what the step was asked for, unless the tower has done so for its own
    forward pass. The original error is the cause of the new one."""

    def explain(call: Call) -> Iterator[None]:
        trainer = call.self
        speed = getattr(trainer, "_llava_packing_speed", None)
        meter = None if speed is None else speed.meter
        before = 0 if meter is None else len(meter.micro_steps)
        try:
            yield
        except RuntimeError as error:
            model = without_adapters(trainer.model)
            tower = getattr(model, "get_vision_tower", lambda: None)()
            if not is_out_of_memory(error) or is_explained(error) or not is_packing_tower(tower):
                raise
            kind = torch.cuda.OutOfMemoryError if isinstance(error, torch.cuda.OutOfMemoryError) else RuntimeError
            raise kind(f"{error}\n{asked_for(meter, before)}. {advice(trainer.args, model)}") from error

    add_step(Trainer, "Trainer.training_step", "out_of_memory", explain, patches)


def asked_for(meter: Meter | None, before: int) -> str:
    """What the step was about, where a meter has seen it; before: how many forward passes it had seen when it began."""
    where, step = "training step", None
    if meter is not None and meter.current is not None:
        where, step = "forward pass of a training step", meter.current
    elif meter is not None and len(meter.micro_steps) > before:
        where, step = "backward pass of a training step", meter.micro_steps[-1]
    return f"The memory did not suffice for the {where}{'' if step is None else in_words(step)}"


def in_words(step: MicroStep) -> str:
    """The tokens of a forward pass, and the patches that some of them are made of."""
    parts = []
    if step.counts is not None:
        tokens, words, _ = step.counts.sum(1).tolist()
        parts.append(f"{tokens} tokens of {step.counts.shape[1]} samples, {tokens - words} of them visual")
    if step.grids:
        parts.append(f"{sum(map(math.prod, step.grids))} patches of {len(step.grids)} images")
    return f" with {', and '.join(parts)}" if parts else ""


def advice(args: TrainingArguments, model: nn.Module) -> str:
    """The keys that lower it, with the values that they have."""
    config = model.config
    keys = {"per_device_train_batch_size": args.per_device_train_batch_size}
    keys["mm_packing_batch_tokens"] = asked_of(model).batch_tokens
    if asks_for_native(config):
        keys["mm_packing_max_patches"] = getattr(config, "mm_packing_max_patches", None)
    if args.gradient_checkpointing:  # else all passes keep what their backward needs
        keys[KEY] = model.get_vision_tower().encoder_tokens
    keys["model_max_length"] = getattr(config, "tokenizer_model_max_length", None)
    lower = ", ".join(f"{key} ({'not set' if value is None else value})" for key, value in keys.items())
    return f"Lower {lower}" + ("" if args.gradient_checkpointing else ", or set gradient_checkpointing: true")
