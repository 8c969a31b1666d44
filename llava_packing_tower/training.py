"""What runs inside a training process beside the host: the check of the engine, progress, an orderly end."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import torch
from torch import nn
from transformers import ProgressCallback, Trainer, TrainerCallback

from .hosts.patches import Patches
from .launch import zero_stage
from .record import TowerRecord


def asked_stage(deepspeed: str | Mapping | None) -> int | None:
    """The ZeRO stage in the ``deepspeed`` training argument (a file, JSON text or a mapping); None without one."""
    if not deepspeed:
        return None
    if isinstance(deepspeed, str):
        file = Path(deepspeed)
        deepspeed = json.loads(file.read_text(encoding="utf-8") if file.is_file() else deepspeed)
    return zero_stage(deepspeed)


def check_engine(wrapped: nn.Module, stage: int | None) -> str:
    """One line about what wraps the model for training.

    Raises ``RuntimeError`` if ZeRO ``stage`` was asked for and ``wrapped`` is not a DeepSpeed engine at that stage: a
    CPU run can be plain DDP without a word (accelerate leaves DeepSpeed out when ``use_cpu`` is set).
    """
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    world = torch.distributed.get_world_size() if distributed else 1
    backend = torch.distributed.get_backend() if distributed else "none"
    kind = type(wrapped).__name__
    line = f"engine: {kind}, world size {world}, backend {backend}"
    if stage is None:
        return line
    from deepspeed import DeepSpeedEngine

    if not isinstance(wrapped, DeepSpeedEngine):
        raise RuntimeError(
            f"DeepSpeed ZeRO-{stage} was asked for, but the model is wrapped in {kind}: refusing to train"
        )
    actual = wrapped.zero_optimization_stage()
    if actual != stage:
        raise RuntimeError(
            f"DeepSpeed ZeRO-{stage} was asked for, but the engine runs stage {actual}: refusing to train"
        )
    return f"engine: {kind}, ZeRO stage {actual}, world size {world}, backend {backend}"


class EngineCheck(TrainerCallback):
    """Runs :func:`check_engine` when training starts, on every rank."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        line = check_engine(self.trainer.model_wrapped, asked_stage(args.deepspeed))
        if state.is_world_process_zero:
            from .hosts import mends

            trained = sum(getattr(p, "ds_numel", p.numel()) for p in self.trainer.model.parameters() if p.requires_grad)
            total = sum(getattr(p, "ds_numel", p.numel()) for p in self.trainer.model.parameters())
            print(f"mends: {', '.join(mends.applied()) or 'none'}")
            print(f"trained: {trained:,} of {total:,} parameters")
            print(line, flush=True)


class Progress(TrainerCallback):
    """A line per log of the trainer, and at least one every ``interval`` seconds: step, loss, time left."""

    def __init__(self, interval: float = 10.0) -> None:
        self.interval = interval
        self.loss = None
        self.rate = None
        self.began = self.printed = 0.0
        self.first = 0

    def on_train_begin(self, args, state, control, **kwargs):
        self.began = self.printed = time.monotonic()
        self.first = state.global_step

    def on_step_end(self, args, state, control, **kwargs):
        if state.is_world_process_zero and time.monotonic() - self.printed >= self.interval and not control.should_log:
            self._print(state)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or "loss" not in (logs or {}):
            return
        self.loss, self.rate = logs["loss"], logs.get("learning_rate")
        self._print(state)

    def _print(self, state) -> None:
        self.printed = time.monotonic()
        done = state.global_step - self.first
        left = (self.printed - self.began) / done * (state.max_steps - state.global_step) if done else float("nan")
        width = len(str(state.max_steps))
        words = [f"step {state.global_step:>{width}}/{state.max_steps}"]
        words += [f"loss {float(self.loss):.4f}"] if self.loss is not None else []
        words += [f"lr {float(self.rate):.1e}"] if self.rate is not None else []
        words += [f"{int(left) // 60}:{int(left) % 60:02d} left"] if done else []
        print("  ".join(words), flush=True)


def install(train: ModuleType, patches: Patches) -> None:
    """Give every trainer that the host's ``train.train`` makes the check and our progress in place of a bar."""
    trainer_class = train.LLaVATrainer
    init = trainer_class.__init__

    @functools.wraps(init)
    def __init__(self, *args, **kwargs):
        init(self, *args, **kwargs)
        # In place of transformers' bar; its log lines (disable_tqdm) stay for the programs that read them.
        self.remove_callback(ProgressCallback)
        self.add_callback(EngineCheck(self))
        self.add_callback(Progress())
        self.add_callback(TowerRecord())

    patches.set(trainer_class, "__init__", __init__)


def finish() -> None:
    """Wait until every rank has written what it writes, then leave the process group.

    The hosts do not: a rank with nothing to save ends first, and the launcher kills the one that is still writing.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
