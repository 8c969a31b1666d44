"""Compat patches of the hosts' trainers against the Trainer of newer versions of transformers."""

from __future__ import annotations

import inspect
import os
import re
import sys
from collections.abc import Iterator
from types import ModuleType

from ..methods import Call, add_step
from ..patcher import Patches
from ..registry import trainer_class
from . import compat_patch


def _source(thing: object) -> str:
    try:
        return inspect.getsource(thing)
    except (OSError, TypeError):  # no source file
        return ""


def _takes(function: object, name: str, unwrap: bool = True) -> bool:
    """Whether a function takes an argument; without ``unwrap``, whether what is wrapped around it does."""
    parameters = inspect.signature(function, follow_wrapped=unwrap).parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _base(trainer: ModuleType) -> type:
    """transformers' own Trainer, under the host's."""
    return next(cls for cls in trainer_class(trainer).__mro__ if cls.__module__ == "transformers.trainer")


def _accelerator_is_made_wrongly(trainer: ModuleType) -> bool:
    make = vars(trainer_class(trainer)).get("create_accelerator_and_postprocess")
    if make is None or "dispatch_batches=self.args.dispatch_batches" not in _source(make):
        return False
    from accelerate import Accelerator
    from transformers import TrainingArguments

    has_argument = "dispatch_batches" in TrainingArguments.__dataclass_fields__
    return not (has_argument and _takes(Accelerator.__init__, "dispatch_batches"))


@compat_patch(
    module="{trainer}",
    reason="the trainer creates its Accelerator with arguments that no longer exist; transformers' own method is used "
    "instead (timeout: ddp_timeout)",
    issue="LLaVA-VL/LLaVA-NeXT#388",
    defect=_accelerator_is_made_wrongly,
)
def accelerator_arguments(trainer: ModuleType, patches: Patches) -> None:
    patches.delete(trainer_class(trainer), "create_accelerator_and_postprocess")


def _save_passes_metrics(trainer: ModuleType) -> bool:
    own = vars(trainer_class(trainer)).get("_save_checkpoint")
    return own is not None and _takes(own, "metrics") and not _takes(_base(trainer)._save_checkpoint, "metrics")


@compat_patch(
    module="{trainer}",
    reason="the trainer passes `metrics` to transformers' _save_checkpoint, which no longer accepts it",
    defect=_save_passes_metrics,
)
def save_metrics(trainer: ModuleType, patches: Patches) -> None:
    drop = lambda call: call.take("metrics")  # noqa: E731
    add_step(_base(trainer), "Trainer._save_checkpoint", "save_metrics", drop, patches)


def _samplers_without_dataset(trainer: ModuleType) -> list[type]:
    """The module's trainers whose own sampler transformers would call with a dataset that it does not take."""
    base = _base(trainer)
    if not _takes(base._get_train_sampler, "train_dataset"):
        return []
    return [
        cls
        for cls in vars(trainer).values()
        if isinstance(cls, type) and issubclass(cls, base) and cls.__module__ == trainer.__name__
        # With a data loader of its own, the host calls its sampler as it is.
        if "_get_train_sampler" in vars(cls) and "get_train_dataloader" not in vars(cls)
        if not _takes(cls._get_train_sampler, "train_dataset")
    ]


@compat_patch(
    module="{trainer}",
    reason="transformers calls _get_train_sampler with the dataset, which the host's own method does not accept",
    defect=lambda trainer: bool(_samplers_without_dataset(trainer)),
)
def sampler_dataset(trainer: ModuleType, patches: Patches) -> None:
    for cls in _samplers_without_dataset(trainer):
        drop = lambda call: call.take("train_dataset")  # noqa: E731  (it reads self.train_dataset, the same one)
        add_step(cls, "LLaVATrainer._get_train_sampler", "sampler_dataset", drop, patches)


def _seeds_workers_by_number_alone(trainer: ModuleType) -> bool:
    seed = vars(trainer).get("seed_worker")
    if seed is None:
        return False
    try:
        inspect.signature(seed).bind(0)
    except TypeError:
        return True
    return False


@compat_patch(
    module="{trainer}",
    reason="the host passes seed_worker to its own DataLoader, which calls it with the worker's number only; from "
    "transformers 4.52 on it also needs the number of workers and the rank",
    defect=_seeds_workers_by_number_alone,
)
def worker_seeds(trainer: ModuleType, patches: Patches) -> None:
    patches.set(trainer, "seed_worker", seed_worker)


def seed_worker(worker_id: int) -> None:
    """Seed a worker as transformers' own DataLoader does. Runs in the worker, which knows how many there are.

    A function of a module, without a closure: a worker that is spawned gets it by name. The rank is the launcher's.
    """
    from torch.utils.data import get_worker_info
    from transformers.trainer_utils import seed_worker as seed

    seed(worker_id, num_workers=get_worker_info().num_workers, rank=int(os.environ.get("RANK", "0")))


def _orders_are_not_drawn_again(trainer: ModuleType) -> bool:
    """Earlier versions began an iteration of each epoch that a resumed run had done."""
    return "get_dataloader_sampler" not in _source(_base(trainer)._inner_training_loop)


@compat_patch(
    module="{trainer}",
    reason="LLaVA's sampler (group_by_modality_length) draws each epoch's order from torch's random numbers, and a "
    "resumed run does not draw those of the epochs that it has done: the next one had the order of the first",
    defect=_orders_are_not_drawn_again,
)
def epoch_orders(trainer: ModuleType, patches: Patches) -> None:
    from accelerate.data_loader import SeedableRandomSampler
    from torch.utils.data import DataLoader
    from transformers import TrainerCallback

    from ..dealt_loader import innermost

    class DrawOrders(TrainerCallback):
        resumed = False

        def on_train_begin(self, args, state, control, **kwargs):
            self.resumed = state.global_step > 0 and not args.ignore_data_skip

        def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
            done, self.resumed = int(state.epoch or 0) if self.resumed else 0, False
            batches = innermost(train_dataloader)
            if isinstance(getattr(batches, "sampler", None), SeedableRandomSampler):
                return  # its order is that of the epoch's number
            for _ in range(done):  # as the training does, without the samples
                numbers = range(len(train_dataloader.dataset))
                for _ in DataLoader(numbers, batch_sampler=batches, generator=train_dataloader.generator):
                    pass

    def attach(call: Call) -> Iterator[None]:
        yield
        call.self.add_callback(DrawOrders())

    add_step(trainer_class(trainer), "LLaVATrainer.__init__", "epoch_orders", attach, patches)


def _optimizer_gets_the_model(trainer: ModuleType) -> bool:
    own = vars(trainer_class(trainer)).get("create_optimizer")
    return own is not None and _takes(_base(trainer).create_optimizer, "model") and not _takes(own, "model")


@compat_patch(
    module="{trainer}",
    reason="under FSDP 1 transformers 5 calls create_optimizer with the wrapped model, which the host's own method "
    "does not accept",
    defect=_optimizer_gets_the_model,
)
def optimizer_model(trainer: ModuleType, patches: Patches) -> None:
    def as_self_model(call: Call) -> Iterator[None]:
        self, model = call.self, call.take("model")
        own = self.model
        self.model = own if model is None else model  # the host reads self.model
        try:
            yield
        finally:
            self.model = own

    add_step(trainer_class(trainer), "LLaVATrainer.create_optimizer", "optimizer_model", as_self_model, patches)


@compat_patch(
    module="{trainer}",
    reason="the host passes `tokenizer` to its trainer, which transformers 5 calls `processing_class`",
    # From 4.46 to the last 4.x, a decorator takes it and hands it on under its new name.
    defect=lambda trainer: not _takes(_base(trainer).__init__, "tokenizer", unwrap=False),
)
def tokenizer_argument(trainer: ModuleType, patches: Patches) -> None:
    def rename(call: Call) -> None:
        if "tokenizer" in call.arguments:
            call.arguments["processing_class"] = call.arguments.pop("tokenizer")

    add_step(trainer_class(trainer), "LLaVATrainer.__init__", "tokenizer_argument", rename, patches)


def _adapters_are_no_models(trainer: ModuleType) -> bool:
    source = _source(sys.modules[_base(trainer).__module__])
    kinds = re.search(r"elif isinstance\((self\.)?model, PreTrainedModel\)", source)
    return kinds is not None and "find_unused_parameters" in source


@compat_patch(
    module="{trainer}",
    reason="with a LoRA under DDP, transformers has DDP look for weights without a gradient, which fails in the first "
    "step with gradient checkpointing (marked as ready twice); without a LoRA it does not",
    issue="huggingface/transformers#4659",
    defect=_adapters_are_no_models,
)
def ddp_adapters(trainer: ModuleType, patches: Patches) -> None:
    def as_for_a_model(call: Call) -> None:
        args, model = call.arguments.get("args"), call.arguments.get("model")
        if args is None or not hasattr(model, "get_base_model"):
            return
        if args.gradient_checkpointing and args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = False

    add_step(trainer_class(trainer), "LLaVATrainer.__init__", "ddp_adapters", as_for_a_model, patches)


def _group_by_length_is_gone(trainer: ModuleType) -> bool:
    from transformers import TrainingArguments

    sampler = vars(trainer_class(trainer)).get("_get_train_sampler")
    gone = "group_by_length" not in TrainingArguments.__dataclass_fields__
    return gone and "self.args.group_by_length" in _source(sampler)


@compat_patch(
    module="{trainer}",
    reason="the sampler reads the argument group_by_length, which transformers 5 calls train_sampling_strategy",
    defect=_group_by_length_is_gone,
)
def group_by_length(trainer: ModuleType, patches: Patches) -> None:
    from transformers import TrainingArguments

    asked = property(lambda self: self.train_sampling_strategy == "group_by_length")
    patches.set(TrainingArguments, "group_by_length", asked)


def _bf16_needs_a_gpu(arguments: ModuleType) -> bool:
    import torch

    if torch.cuda.is_available() or not hasattr(arguments, "is_torch_bf16_gpu_available"):
        return False
    # Earlier versions asked for the GPU's kind only where there is one.
    guarded = "torch.cuda.is_available() and not is_torch_bf16_gpu_available()" in _source(arguments)
    return not guarded and not arguments.is_torch_bf16_gpu_available()


@compat_patch(
    module="transformers.training_args",
    reason="without a GPU, bf16 is refused unless use_cpu is set, and use_cpu switches DeepSpeed off",
    defect=_bf16_needs_a_gpu,
)
def bf16_on_cpu(arguments: ModuleType, patches: Patches) -> None:
    patches.set(arguments, "is_torch_bf16_gpu_available", lambda: True)
