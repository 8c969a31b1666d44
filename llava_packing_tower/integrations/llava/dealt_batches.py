"""Samples dealt over the ranks and micro-batches of an optimizer step, in the host's own training loop.

The loop goes on calling ``training_step`` for each of its accumulation steps. Which samples a call gets, and in how
many micro-batches, is decided in the data loader (:mod:`.dealt_loader`); a weight for each sample keeps the host's
average.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from types import ModuleType

import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from ...data.samples import MEDIA
from ...utils.say import say
from .arguments import current_arguments
from .arguments_table import FAIL_WITH_IMAGES, MICRO_BATCHES, REFUSE, TRUNCATE, check_dealing
from .dealing_report import Dealings, StepTimes, describe
from .dealt_loader import (
    DEALT,
    ITEMS,
    DealtBatches,
    DealtCollator,
    DealtDataset,
    Exchange,
    Rules,
    read_sizes,
    refuse_long_samples,
)
from .methods import Call, add_step
from .packed_step import SampleWeights, is_overridden, unsupported_decoder, unsupported_model, weighing
from .patcher import Patches
from .registry import trainer_class
from .sample_sizes import SizeReader, cost_of, unsupported_sizes
from .trainable_parts import without_adapters

logger = logging.getLogger(__name__)

_STATE = "_llava_packing_dealing"


# ---------------------------------------------------------------- what is asked for


@dataclass(frozen=True)
class Asked:
    """The keys of a run: ``mm_packing_balance``, ``mm_packing_batch_tokens``, ``mm_packing_over_budget``,
    ``mm_packing_loss_average``."""

    balance: bool = True
    batch_tokens: int | None = None
    over_budget: str = REFUSE
    loss_average: str = MICRO_BATCHES

    def __post_init__(self) -> None:
        check_dealing({f"mm_packing_{name}": value for name, value in vars(self).items()})

    @property
    def must(self) -> str | None:
        """The key that cannot be left out silently."""
        if self.batch_tokens is not None:
            return f"mm_packing_batch_tokens {self.batch_tokens}"
        return None if self.loss_average == MICRO_BATCHES else f"mm_packing_loss_average {self.loss_average}"


def asked_of(model: nn.Module) -> Asked:
    """The keys in the arguments that train.py has read, else in the model's config, else their defaults."""
    given = {}
    for name in Asked.__dataclass_fields__:
        for owner in (current_arguments("ModelArguments"), model.config):
            value = getattr(owner, f"mm_packing_{name}", None)
            if value is not None:
                given[name] = value
                break
    return Asked(**given)


def unsupported_dealing(trainer: object, model: nn.Module, loader: object) -> str | None:
    """None if the samples of a trainer can be dealt, else why its own order stays."""
    from accelerate.data_loader import BatchSamplerShard, DataLoaderShard

    reason = unsupported_model(model) or unsupported_decoder(model)
    if reason is not None:
        return reason
    args, ranks = trainer.args, trainer.accelerator.num_processes
    if is_overridden(trainer.compute_loss) or getattr(trainer, "compute_loss_func", None) is not None:
        return "the trainer computes its loss itself"
    if trainer.label_smoother is not None:
        return "label smoothing"
    if not _hands_on(type(trainer)):
        return f"{type(trainer).__name__} has a training step of its own"
    if getattr(trainer, "trainer_mode", "regular") != "regular":
        return f"trainer_mode {trainer.trainer_mode}"
    if args.n_gpu > 1 or getattr(trainer.accelerator, "parallelism_config", None) is not None:
        return "ranks do not each have samples of their own"
    if not isinstance(loader, DataLoaderShard) or not isinstance(loader.batch_sampler, torch.utils.data.BatchSampler):
        return f"the data loader is a {type(loader).__name__}"
    sampler = loader.batch_sampler
    if ranks > 1 and not (isinstance(sampler, BatchSamplerShard) and sampler.even_batches):
        return "ranks may have different numbers of micro-batches"
    if getattr(trainer, "model_accepts_loss_kwargs", False) and not args.average_tokens_across_devices:
        return "average_tokens_across_devices: false"
    reason = _ranks_apart(trainer, len(loader)) or _angles_of_the_batch(model.config)
    return reason or unsupported_sizes(trainer.train_dataset, model)


def _hands_on(cls: type) -> bool:
    """Whether each ``training_step`` down to transformers' own leaves the work to the one that it overrides: a dealt
    batch has several micro-batches, which only ours takes apart."""
    for owner in cls.__mro__[: cls.__mro__.index(Trainer)]:
        own = inspect.unwrap(vars(owner).get("training_step", Trainer.training_step))  # without our wrapper
        code = getattr(own, "__code__", None)
        if is_overridden(own) and code is not None and "training_step" not in code.co_names:
            return False
    return True


def _ranks_apart(trainer: object, micro_batches: int) -> str | None:
    """Why samples cannot change their rank: until 4.45 transformers does not add up the ranks' gradients at the end
    of an epoch that is shorter than an optimizer step."""
    window = trainer.args.gradient_accumulation_steps
    engine = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    alone = trainer.accelerator.num_processes == 1 or engine is not None
    if alone or micro_batches >= window or hasattr(trainer, "get_batch_samples"):
        return None
    return (
        f"an epoch has {micro_batches} micro-batches and gradient_accumulation_steps is {window}: this transformers "
        f"does not add up the ranks' gradients then"
    )


def _angles_of_the_batch(config: object) -> str | None:
    """Why samples cannot change their batch, where the longest one of a batch sets the rotary angles of all."""
    given = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kind = given.get("rope_type") or given.get("type")
    if kind not in ("dynamic", "longrope"):
        return None
    length = given.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
    length, longest = length or config.max_position_embeddings, getattr(config, "tokenizer_model_max_length", None)
    if longest is not None and longest <= length:
        return None
    return f"rotary scaling {kind}: a sample of more than {length} tokens changes the angles of its whole batch"


# ---------------------------------------------------------------- into the host


def deal_batches(train: ModuleType, patches: Patches) -> None:
    """Have the host's trainer deal its samples, and train on what was dealt."""

    def loader(call: Call) -> Iterator[None]:
        yield
        trainer = call.self
        vars(trainer).pop(_STATE, None)
        dealing = make_dealing(trainer, call.result)
        if dealing is not None:
            setattr(trainer, _STATE, dealing)
            call.result = dealing.loader

    def step(call: Call) -> None:
        if DEALT in call.arguments["inputs"]:
            call.result = getattr(call.self, _STATE).run(call)
        else:
            refuse_undealt(call.self)

    owner = trainer_class(train)
    add_step(owner, "LLaVATrainer.get_train_dataloader", "dealt_batches", loader, patches)
    add_step(owner, "LLaVATrainer.training_step", "dealt_batches", step, patches)


def make_dealing(trainer: object, loader: object) -> Dealing | None:
    """What deals the samples of a trainer, or None where its own order stays; says so once.

    Raises ``ValueError`` where that would leave out a key, and for samples above the budget.
    """
    model = without_adapters(trainer.model)
    if not hasattr(model, "get_vision_tower"):
        return None
    check_not_empty(trainer, loader)
    check_columns(trainer)
    asked, ranks = asked_of(model), trainer.accelerator.num_processes
    if not asked.balance and asked.must is None:
        return _not_dealt("mm_packing_balance: false")
    reason = unsupported_dealing(trainer, model, loader)
    window = trainer.args.gradient_accumulation_steps
    if reason is None and asked.must is None and (ranks == 1 or window * loader.batch_sampler.batch_size == 1):
        return _not_dealt("one process" if ranks == 1 else "one sample per rank and optimizer step")
    exchange = None if reason is not None else Exchange(ranks, timedelta(seconds=trainer.args.ddp_timeout))
    if exchange is not None and not exchange.agrees(trainer.train_dataset.list_data_dict):
        reason = "the ranks have different samples"
    if reason is not None and asked.must is not None:
        raise ValueError(f"{asked.must} cannot be kept: {reason}")
    if reason is not None:
        return _not_dealt(reason)
    if len(loader) < window:  # where such epochs end differs between versions of transformers
        window = 1
    limit, truncates = asked.batch_tokens, asked.over_budget == TRUNCATE
    reader = SizeReader(trainer.train_dataset, model, limit if truncates else None)
    rank = trainer.accelerator.process_index
    if limit is not None and not truncates:
        refuse_long_samples(reader, limit, exchange, rank, loader)
    cost = cost_of(model) if asked.balance else None
    model.config.mm_packing_cost = cost.items() if cost else None
    average = asked.loss_average
    if getattr(trainer, "model_accepts_loss_kwargs", False):
        average = ITEMS  # of the whole step already
    dealing = Dealing(trainer, model.config, Rules(ranks, cost, limit, average), reader.limit if truncates else None)
    sizes = read_sizes(reader, loader, min(1, loader.num_workers))
    batches = DealtBatches(loader.batch_sampler, sizes, exchange, dealing.rules, rank, window, dealing.taken)
    dealing.seen = batches.seen
    dealing.loader = _loader_of(loader, DealtDataset(loader.dataset, reader), batches)
    trainer.remove_callback(DealingReport)  # of an earlier train()
    trainer.add_callback(DealingReport(dealing))
    say(logger, "dealing: %s", dealing)
    return dealing


def refuse_undealt(trainer: object) -> None:
    """Raises ``ValueError`` for a batch that was not dealt though a key asks for it: that of a data loader which a
    trainer makes itself."""
    model = without_adapters(trainer.model)
    if hasattr(model, "get_vision_tower") and (asked := asked_of(model).must) is not None:
        raise ValueError(f"{asked} cannot be kept: {type(trainer).__name__} makes its data loader itself")


def check_columns(trainer: object) -> None:
    """Raises ``ValueError`` for arguments with which the host fails in the first step with an image."""
    smooths = trainer.label_smoother is not None and not is_overridden(trainer.compute_loss)
    asked = {"remove_unused_columns": trainer.args.remove_unused_columns, "label_smoothing_factor": smooths}
    entries = getattr(trainer.train_dataset, "list_data_dict", None)
    if not any(asked.values()) or not isinstance(entries, list):
        return
    if any(entry.get(name) for entry in entries for name in MEDIA):
        name = next(name for name, given in asked.items() if given)
        raise ValueError(f"{name}: {FAIL_WITH_IMAGES[name]}")


def check_not_empty(trainer: object, loader: object) -> None:
    """Raises ``ValueError`` for a loader without a batch: transformers trains nothing, or fails in its first step."""
    if len(loader) == 0:
        raise ValueError(
            f"{len(trainer.train_dataset)} samples make no micro-batch: per_device_train_batch_size is "
            f"{loader.batch_sampler.batch_size} on {trainer.accelerator.num_processes} processes, and "
            f"dataloader_drop_last drops what is left"
        )


def _not_dealt(reason: str) -> None:
    say(logger, "dealing: off (%s)", reason)


def _loader_of(loader: torch.utils.data.DataLoader, dataset: DealtDataset, batches: DealtBatches) -> object:
    """accelerate's loader with another dataset and batch sampler, as its own ``skip_first_batches`` makes one."""
    from accelerate.data_loader import DataLoaderShard

    names = ["num_workers", "pin_memory", "timeout", "worker_init_fn", "generator", "persistent_workers", "in_order"]
    names += ["multiprocessing_context", "prefetch_factor"] if loader.num_workers else []
    return DataLoaderShard(
        dataset,
        device=loader.device,
        rng_types=loader.rng_types,
        synchronized_generator=loader.synchronized_generator,
        batch_sampler=batches,
        collate_fn=DealtCollator(loader.collate_fn),
        **{name: getattr(loader, name) for name in names if hasattr(loader, name)},
    )


@dataclass
class Dealing:
    """The dealing of one training, on one rank.

    longest: decoder tokens at which the model cuts a sample while it trains, None for those of its ``config``.
    """

    trainer: object
    config: object
    rules: Rules
    longest: int | None
    loader: object = None
    seen: Dealings = field(default_factory=Dealings)
    done: int = 0
    times: StepTimes = field(default_factory=StepTimes)

    def __str__(self) -> str:
        order = "LLaVA's order" if self.rules.cost is None else f"by cost over {self.rules.ranks} ranks"
        limit = "" if self.rules.limit is None else f", at most {self.rules.limit} tokens in a micro-batch"
        return f"{order}{limit}, the loss averaged over {self.rules.average}"

    def taken(self) -> int:
        """Training steps since the last optimizer step."""
        return self.done

    def run(self, call: Call) -> torch.Tensor:
        """One training step of the host's loop: each micro-batch through the host's own method. Returns their loss,
        for the log."""
        trainer, parts = self.trainer, call.arguments["inputs"][DEALT]
        accelerator, model = trainer.accelerator, call.arguments["model"]
        ends_here, losses = accelerator.sync_gradients, [torch.zeros((), device=trainer.args.device)]
        floor = self.rules.cost.micro_step if self.rules.cost else 0.0
        with self.times.measuring(sum(floor + part["cost"] for part in parts), trainer.args.device):
            for number, part in enumerate(parts, 1):
                weighed = weighing(SampleWeights(part["weights"], part["tokens"], part["supervised"]))
                ends = ends_here and number == len(parts)
                with self._ending(accelerator, model, ends), self._cutting(), weighed:
                    call.arguments["inputs"] = part["batch"]
                    losses.append(call.run() * part["logged"])
        self.done = 0 if ends_here else self.done + 1
        return sum(losses)

    @contextlib.contextmanager
    def _ending(self, accelerator: object, model: nn.Module, ends: bool) -> Iterator[None]:
        """Within it, a backward pass is the last one of its optimizer step, or it is not."""
        if self.rules.limit is None:  # one micro-batch in each call, as the host counts them
            yield
            return
        before = accelerator.sync_gradients
        accelerator.sync_gradients = ends
        apart = contextlib.nullcontext()
        if hasattr(model, "set_gradient_accumulation_boundary"):  # DeepSpeed would count micro-batches
            model.set_gradient_accumulation_boundary(ends)
        elif not ends and not accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False):
            apart = accelerator.no_sync(model)
        try:
            with apart:
                yield
        finally:
            accelerator.sync_gradients = before

    @contextlib.contextmanager
    def _cutting(self) -> Iterator[None]:
        """Within it, the model cuts samples at the budget."""
        if self.longest is None:
            yield
            return
        before = getattr(self.config, "tokenizer_model_max_length", None)
        self.config.tokenizer_model_max_length = self.longest
        try:
            yield
        finally:
            self.config.tokenizer_model_max_length = before


class DealingReport(TrainerCallback):
    """Logs, at the end of a training, what :func:`describe_dealing` says."""

    def __init__(self, dealing: Dealing) -> None:
        self.dealing = dealing

    def on_train_end(self, args: object, state: object, control: object, **kwargs: object) -> None:
        line = describe(self.dealing.seen, self.dealing.times)
        if line is not None and state.is_world_process_zero:
            say(logger, "%s", line)


def describe_dealing(trainer: object) -> str | None:
    """How busy the ranks are by cost, and how far costs are from measured times; None where nothing is dealt."""
    dealing = getattr(trainer, _STATE, None)
    return None if dealing is None else describe(dealing.seen, dealing.times)
