"""What runs inside a training process beside the host: the second half of the plan, the check of the engine, progress,
marks on complete checkpoints, an orderly end."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType

import torch
from torch import nn
from transformers import ProgressCallback, Trainer, TrainerCallback

from ..attention.dispatch import resolve_backend
from ..integrations.llava import compat, registry
from ..integrations.llava.methods import Call, add_step
from ..integrations.llava.patcher import Patches
from ..integrations.llava.speed_report import in_words
from ..integrations.llava.trainable_parts import count_parts
from ..towers.packing_tower import HEVCViTPackingVisionTower
from .data_note import note_of
from .deepspeed_config import zero_stage
from .history import TowerRecord
from .resume import check_count, mark_complete, mark_finished, note_order, other_place


def asked_stage(deepspeed: str | Mapping | None) -> int | None:
    """The ZeRO stage in the ``deepspeed`` training argument (a file, JSON text or a mapping); None without one."""
    if not deepspeed:
        return None
    if isinstance(deepspeed, str):
        file = Path(deepspeed)
        deepspeed = json.loads(file.read_text(encoding="utf-8") if file.is_file() else deepspeed)
    return zero_stage(deepspeed)


def check_engine(wrapped: nn.Module, stage: int | None, fsdp: bool = False) -> str:
    """One line about what wraps the model for training.

    Raises ``RuntimeError`` if ZeRO ``stage`` was asked for and ``wrapped`` is not a DeepSpeed engine at that stage, or
    ``fsdp`` and it is not one of FSDP: a CPU run can silently be plain DDP (accelerate leaves DeepSpeed out when
    ``use_cpu`` is set, and FSDP without a GPU).
    """
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    world = torch.distributed.get_world_size() if distributed else 1
    backend = torch.distributed.get_backend() if distributed else "none"
    kind = type(wrapped).__name__
    line = f"engine: {kind}, world size {world}, backend {backend}"
    if fsdp and not kind.startswith(("FullyShardedDataParallel", "FSDP")):
        raise RuntimeError(f"FSDP was requested, but the model is wrapped in {kind}: refusing to train")
    if stage is None:
        return line
    from deepspeed import DeepSpeedEngine

    if not isinstance(wrapped, DeepSpeedEngine):
        raise RuntimeError(
            f"DeepSpeed ZeRO-{stage} was requested, but the model is wrapped in {kind}: refusing to train"
        )
    actual = wrapped.zero_optimization_stage()
    if actual != stage:
        raise RuntimeError(
            f"DeepSpeed ZeRO-{stage} was requested, but the engine runs stage {actual}: refusing to train"
        )
    return f"engine: {kind}, ZeRO stage {actual}, world size {world}, backend {backend}"


SMALL_BUCKET = 10_000_000
"""Elements. Reducing so few of them takes less time than asking for it."""


def small_buckets(wrapped: nn.Module) -> list[str]:
    """A line about a DeepSpeed engine that reduces gradients in small pieces, as ``auto`` has it for small decoders."""
    if not hasattr(wrapped, "zero_reduce_bucket_size") or not wrapped.zero_optimization_stage():
        return []
    size = wrapped.zero_reduce_bucket_size()
    if size >= SMALL_BUCKET:
        return []
    return [
        f"note: reduce_bucket_size is {size:,} elements (auto: the decoder's width squared), so that most weights have "
        "a reduction of their own. With 200000000, as in the packaged configurations, small batches are faster"
    ]


def describe_tower(tower: nn.Module, args: object) -> list[str]:
    """Lines of the plan about a packing tower: how its attention is computed, and how many tokens it makes.

    args: the training arguments. Raises what :func:`resolve_backend` raises for a backend that cannot run here.
    """
    model, lines = tower.vision_tower, []
    if asked := getattr(model.encoder, "attention_backend", None):
        dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else tower.dtype
        trained = any(p.requires_grad for p in model.parameters())
        backend = resolve_backend(asked, args.device, dtype, model.encoder.head_dim, needs_grad=trained)
        lines.append(f"tower attention: {backend} (requested: {asked})")
    rule = getattr(tower.image_processor, "rule", None)
    if rule is not None:
        each = rule.merge[0] * rule.merge[1]
        lines.append(f"tokens per image: {max(1, rule.min_patches // each)} to {rule.max_patches // each} (native)")
    else:
        pixels = f"{tower.image_size} x {tower.image_size} pixels, patch {model.config.patch_size}"
        lines.append(f"tokens per image or per crop: {tower.num_patches} ({pixels})")
    return lines


def describe_run(trainer: Trainer, parts: Mapping[str, tuple[int, int]]) -> list[str]:
    """The lines of the plan that are known only now: compat patches, what is trained (``count_parts``), the tower."""
    counted = ", ".join(f"{part} {trained:,} of {total:,}" for part, (trained, total) in parts.items())
    trained, total = (sum(column) for column in zip(*parts.values()))
    lines = [f"compat patches: {', '.join(compat.applied()) or 'none'}"]
    lines.append(f"trained: {trained:,} of {total:,} parameters ({counted})")
    for module in trainer.model.modules():
        if isinstance(module, HEVCViTPackingVisionTower):
            lines += describe_tower(module, trainer.args)
    return lines


class EngineCheck(TrainerCallback):
    """Runs :func:`check_engine` when training starts, on every rank; the first one prints the rest of the plan."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.parts = count_parts(trainer.model)  # now: FSDP leaves every rank with pieces of the parameters

    def on_train_begin(self, args, state, control, **kwargs):
        engine = check_engine(self.trainer.model_wrapped, asked_stage(args.deepspeed), bool(args.fsdp))
        lines = describe_run(self.trainer, self.parts) + small_buckets(self.trainer.model_wrapped)
        if state.is_world_process_zero:
            print("\n".join([*lines, engine]), flush=True)


class _NothingLeft(Exception):
    """All steps were done before the run was interrupted."""


class StopWhereNothingIsLeft(TrainerCallback):
    """A checkpoint of the last step: the trainer would take one step more, and only the host's last save is due."""

    def on_train_begin(self, args, state, control, **kwargs):
        if 0 < state.max_steps <= state.global_step:
            raise _NothingLeft


class SameData(TrainerCallback):
    """Raises ``ValueError`` for a run that resumes in the middle of other data; keeps what checkpoints note of it."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
        path = getattr(getattr(self.trainer.train_dataset, "data_args", None), "data_path", None)
        if args.local_process_index == 0 and path:
            self.trainer.packing_data_note = note_of(path)
        if state.global_step and not args.ignore_data_skip:
            check_count(Path(args.output_dir) / f"checkpoint-{state.global_step}", len(self.trainer.train_dataset))
            note = other_place(state.global_step, state.epoch, len(train_dataloader), args.gradient_accumulation_steps)
            if note and state.is_world_process_zero:
                print(note, flush=True)


class Progress(TrainerCallback):
    """A line per log of the trainer, and at least one every ``interval`` seconds: step, loss, speed, time left."""

    def __init__(self, interval: float = 10.0) -> None:
        self.interval = interval
        self.loss = None
        self.rate = None
        self.speed = ""
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
        self.loss, self.rate, self.speed = logs["loss"], logs.get("learning_rate"), in_words(logs)
        self._print(state)

    def _print(self, state) -> None:
        self.printed = time.monotonic()
        done = state.global_step - self.first
        left = (self.printed - self.began) / done * (state.max_steps - state.global_step) if done else float("nan")
        width = len(str(state.max_steps))
        words = [f"step {state.global_step:>{width}}/{state.max_steps}"]
        words += [f"loss {float(self.loss):.4f}"] if self.loss is not None else []
        words += [f"lr {float(self.rate):.1e}"] if self.rate is not None else []
        words += [self.speed] if self.speed else []
        words += [f"{int(left) // 60}:{int(left) % 60:02d} left"] if done else []
        print("  ".join(words), flush=True)


def mark_checkpoints(trainer_class: type[Trainer], patches: Patches) -> None:
    """Mark each checkpoint as complete when every rank has written its part; only then are older ones deleted."""

    def mark(call: Call) -> Iterator[None]:
        self = call.self
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            yield
        finally:
            self.args.save_total_limit = limit
        barrier()
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if self.args.local_process_index == 0 and folder.is_dir():  # on every machine that has a folder of its own
            note_order(folder, self.args, len(self.train_dataset), getattr(self, "packing_data_note", None))
            mark_complete(folder)
        barrier()
        if self.args.should_save:
            _rotate(self)

    add_step(trainer_class, "LLaVATrainer._save_checkpoint", "mark_complete", mark, patches)


def _rotate(trainer: Trainer) -> None:
    if hasattr(trainer, "_rotate_checkpoints"):
        trainer._rotate_checkpoints(use_mtime=False, output_dir=trainer.args.output_dir)
        return
    from transformers.trainer_utils import rotate_checkpoints  # transformers 5

    args, best = trainer.args, trainer.state.best_model_checkpoint
    rotate_checkpoints(args.output_dir, save_total_limit=args.save_total_limit, best_model_checkpoint=best)


def barrier() -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()


def install(train: ModuleType, patches: Patches) -> list[Trainer]:
    """Give every trainer that the host's ``train.train`` makes the check, marks on its checkpoints, and the progress in
    place of a bar. Returns the list in which these trainers will be."""
    trainer_class, trainers = registry.trainer_class(train), []

    def add_callbacks(call: Call) -> Iterator[None]:
        yield
        self = call.self
        # In place of transformers' bar; its log lines (disable_tqdm) stay for the programs that read them.
        self.remove_callback(ProgressCallback)
        self.add_callback(EngineCheck(self))
        self.add_callback(SameData(self))
        self.add_callback(Progress())
        self.add_callback(TowerRecord())
        self.add_callback(StopWhereNothingIsLeft())
        trainers.append(self)

    def to_the_end(call: Call) -> Iterator[None]:
        try:
            yield
        except _NothingLeft:
            call.result, state = None, call.self.state
            if state.is_world_process_zero:
                print(f"all {state.global_step} steps were done before: the model is saved", flush=True)

    add_step(trainer_class, "LLaVATrainer.__init__", "training_callbacks", add_callbacks, patches)
    add_step(trainer_class, "LLaVATrainer.train", "end_where_nothing_is_left", to_the_end, patches)
    mark_checkpoints(trainer_class, patches)
    return trainers


def finish(trainers: Sequence[Trainer]) -> None:
    """Wait until every rank has written what it writes, note that the run has ended, leave the process group.

    The hosts do not wait: a rank with nothing to save ends first, and the launcher kills the one that is still writing.
    """
    barrier()
    for trainer in trainers:
        state = trainer.state
        if state.is_world_process_zero and 0 < state.max_steps <= state.global_step:
            mark_finished(trainer.args.output_dir, state.global_step, state.max_steps, trainer.args.num_train_epochs)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
