"""The data loader of a run whose samples are dealt over ranks and micro-batches.

The host's order stays: each rank's own batch sampler says which samples an optimizer step has. Their sizes are read
ahead, exchanged between the ranks, and every rank computes the same deal. Beside its samples a rank gets their weights.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import NamedTuple
from zlib import crc32

import torch
import torch.distributed as dist
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import BatchSampler, DataLoader, Dataset

from ...data.samples import MEDIA
from ...multimodal.dealing import (
    Cost,
    Deal,
    SampleSize,
    balance_of,
    calls_of,
    deal,
    deal_within,
    weights_as_averaged,
)
from ...multimodal.supervised_head import IGNORE
from ...utils.say import say
from .arguments_table import MICRO_BATCHES, TOKENS
from .dealing_report import Dealings
from .left_out import PLACEHOLDER_SUPERVISED, PLACEHOLDER_TOKENS, LeftOut
from .sample_sizes import SizeReader

logger = logging.getLogger(__name__)

DEALT = "packing_dealt"
"""Where a batch carries its micro-batches."""
SHARE, NAMED = 64, 5
ITEMS = "items"
"""Beside MICRO_BATCHES and TOKENS of :mod:`.arguments_table`: a loss that transformers divides by
``num_items_in_batch``."""


class Place(NamedTuple):
    """A sample where it was dealt to: its micro-batch within a training step, its weight, its size and cost.

    logged: what the loss of its training step is multiplied by for the log (:func:`logged_factor`).
    """

    index: int
    part: int
    weight: float
    tokens: int
    supervised: int
    cost: float = 0.0
    logged: float = 1.0


NOTHING = Place(-1, 0, 0.0, PLACEHOLDER_TOKENS, PLACEHOLDER_SUPERVISED)


class Sample(NamedTuple):
    """A sample of a window: the rank and the micro-step that the host gave it to, its index, its size."""

    rank: int
    micro_step: int
    index: int
    size: SampleSize


@dataclass(frozen=True)
class Rules:
    """How the samples of an optimizer step are dealt.

    cost: None where the host's order stays. limit: the most tokens of a micro-batch, None for any number. average: one
    of MICRO_BATCHES, TOKENS, ITEMS.
    """

    ranks: int
    cost: Cost | None
    limit: int | None = None
    average: str = MICRO_BATCHES


# ---------------------------------------------------------------- a window


def deal_window(samples: Sequence[Sample], calls: int, rules: Rules) -> tuple[Deal, list[float]]:
    """The micro-batches of each rank, and the weight of each sample.

    samples: of all ranks, the same in the same order on each of them. calls: training steps of a rank in this window.
    """
    flat = Cost(0, 0, 1, 0, 0)
    costs = [(rules.cost or flat)(sample.size) for sample in samples]
    if rules.limit is not None:
        dealt = deal_within([sample.size.tokens for sample in samples], costs, rules.ranks, rules.limit)
    elif rules.cost is not None:
        dealt = deal(costs, rules.ranks, calls)
    else:
        dealt = as_given(samples, calls, rules.ranks)
    supervised = [sample.size.supervised for sample in samples]
    if rules.average == ITEMS:
        return dealt, [1.0] * len(samples)
    if rules.average == TOKENS:
        total = sum(supervised)
        return dealt, [rules.ranks * calls / total if total else 0.0] * len(samples)
    return dealt, weights_as_averaged([(s.rank, s.micro_step) for s in samples], supervised)


def as_given(samples: Sequence[Sample], calls: int, ranks: int) -> Deal:
    """The host's own micro-batches."""
    made: Deal = [[[] for _ in range(calls)] for _ in range(ranks)]
    for position, sample in enumerate(samples):
        made[sample.rank][sample.micro_step].append(position)
    return made


def logged_factor(samples: Sequence[Sample], average: str) -> float:
    """All micro-batches of the host over those with a supervised token.

    The loss of one without any is NaN, which transformers leaves out of what it logs; its gradients are zero.
    """
    if average != MICRO_BATCHES:
        return 1.0
    groups = {(s.rank, s.micro_step) for s in samples}
    with_loss = {(s.rank, s.micro_step) for s in samples if s.size.supervised}
    return len(groups) / len(with_loss) if with_loss else 1.0


def places_of(
    samples: Sequence[Sample], weights: Sequence[float], parts: Sequence[Sequence[int]], rules: Rules
) -> list[Place]:
    """The samples of one training step. An empty micro-batch gets the shortest sample of the window, which then counts
    nothing: other ranks may be waiting in its collectives."""
    made = []
    logged = logged_factor(samples, rules.average)
    for number, part in enumerate(parts):
        filler = min(range(len(samples)), key=lambda p: (samples[p].size.tokens, p))
        for position in part or [filler]:
            size = samples[position].size
            weight = weights[position] if part else 0.0
            cost = rules.cost(size) if rules.cost else 0.0
            made.append(Place(samples[position].index, number, weight, size.tokens, size.supervised, cost, logged))
    return made


# ---------------------------------------------------------------- batches


class SizedDataset(Dataset):
    """The sizes of a dataset's samples, with their indices, for a loader of its own."""

    def __init__(self, reader: SizeReader) -> None:
        self.reader = reader

    def __getitem__(self, index: int) -> tuple[int, SampleSize]:
        return index, self.reader(index)


class Exchange:
    """Gives every rank the sizes that each has read, through a process group on the CPU: GPUs do not wait for it."""

    def __init__(self, ranks: int, timeout: timedelta) -> None:
        self.ranks = ranks
        self.group = dist.new_group(backend="gloo", timeout=timeout) if ranks > 1 else None

    def agrees(self, entries: Sequence[Mapping]) -> bool:
        """Whether all ranks have the same entries of a dataset, by their ids, files and lengths. Collective."""
        own, every = 0, [0]
        for entry in entries:
            turns = entry.get("conversations") or []
            words = len(turns[0]["value"]) if turns else 0
            own = crc32(repr([entry.get(name) for name in ("id", *MEDIA)] + [len(turns), words]).encode(), own)
        if self.group is not None:
            every = [0] * self.ranks
            dist.all_gather_object(every, own, group=self.group)
        return len(set(every)) == 1

    def __call__(self, share: Sequence[Sequence[tuple[int, SampleSize]]], most: int) -> list[Sample]:
        """share: the host's micro-batches of this rank; most: samples of one of them, at most.

        Returns the samples of all ranks, in the same order everywhere. Collective.
        """
        width = 2 + len(SampleSize._fields)
        rows = torch.full((most * len(share), width), -1, dtype=torch.int64)
        own = [(step, index, *size) for step, batch in enumerate(share) for index, size in batch]
        rows[: len(own)] = torch.tensor(own, dtype=torch.int64).view(-1, width)
        gathered = [rows]
        if self.group is not None:
            gathered = [torch.empty_like(rows) for _ in range(self.ranks)]
            dist.all_gather(gathered, rows, group=self.group)
        return [
            Sample(rank, step, index, SampleSize(*size))
            for rank, part in enumerate(gathered)
            for step, index, *size in part.tolist()
            if step >= 0
        ]


@dataclass(eq=False)
class DealtBatches(BatchSampler):
    """What one rank trains on, one list of :class:`Place` for each training step.

    Args:
        batch_sampler: the host's own, of this rank.
        sizes: gives the sizes of its samples, batch by batch.
        window: training steps of an optimizer step. taken: how many of the current one were done before this epoch.
        seen: what was dealt so far.
    """

    batch_sampler: BatchSampler
    sizes: Callable[[Iterable[list[int]]], Iterable[list[tuple[int, SampleSize]]]]
    exchange: Exchange
    rules: Rules
    rank: int
    window: int
    taken: Callable[[], int]
    seen: Dealings = field(default_factory=Dealings)

    def __iter__(self) -> Iterator[list[Place]]:
        sizes, steps = iter(self.sizes(self.batch_sampler)), self.window - self.taken() % self.window
        while share := list(itertools.islice(sizes, steps)):
            steps = self.window
            samples = self.exchange(share, self.batch_size)
            dealt, weights = deal_window(samples, len(share), self.rules)
            if self.rules.cost is not None:
                costs = [self.rules.cost(sample.size) for sample in samples]
                given = as_given(samples, len(share), self.rules.ranks)
                self.seen.count(*(balance_of(costs, made, self.rules.cost.micro_step) for made in (given, dealt)))
            mine = iter(dealt[self.rank])
            for count in calls_of(len(dealt[self.rank]), len(share)):
                yield places_of(samples, weights, list(itertools.islice(mine, count)), self.rules)

    def __len__(self) -> int:
        return len(self.batch_sampler)

    @property
    def batch_size(self) -> int:
        return self.batch_sampler.batch_size

    @property
    def drop_last(self) -> bool:
        return self.batch_sampler.drop_last

    @property
    def sampler(self) -> object:
        """The host's own, where accelerate looks for what it tells the number of an epoch."""
        return getattr(innermost(self), "sampler", None)


def innermost(batches: object) -> object:
    """The batch sampler that the host has made, under a rank's part of it and what is dealt of that."""
    while hasattr(batches, "batch_sampler"):
        batches = batches.batch_sampler
    return batches


class Dealt(NamedTuple):
    """A sample that was read, or a mark in its place: what the host's dataset returned, and where it was dealt to."""

    item: Mapping | LeftOut
    place: Place


class DealtDataset(Dataset):
    """The host's dataset, asked with a :class:`Place`."""

    def __init__(self, dataset: Dataset, reader: SizeReader) -> None:
        self.dataset, self.reader = dataset, reader

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, place: Place) -> Dealt:
        """Raises ``ValueError`` for a sample of another size than was counted: the weights would be wrong. Only a video
        may have other frames than its header says, which is logged: it gets the part of the loss that was counted for
        it, none where its header could not be read."""
        item = self.dataset[place.index]
        if isinstance(item, LeftOut):
            return Dealt(item, place)
        size = self.reader.of_item(item)
        if (size.tokens, size.supervised) != (place.tokens, place.supervised):
            message = (
                f"sample {item.get('id', place.index)} has {size.tokens} tokens, {size.supervised} of them supervised, "
                f"but {place.tokens} and {place.supervised} were counted before it was read"
            )
            if "video" not in self.dataset.list_data_dict[place.index]:
                raise ValueError(f"{message}. mm_packing_balance: false keeps LLaVA's own order")
            logger.warning(message)
            weight = place.weight * place.supervised / size.supervised if size.supervised else 0.0
            place = place._replace(tokens=size.tokens, supervised=size.supervised, weight=weight)
        return Dealt(item, place)


class DealtCollator:
    """Collates the micro-batches of a training step, each with the host's collator.

    Returns ``{DEALT: [{"batch", "weights", "tokens", "supervised", "cost", "logged"}, ...]}`` and, for what the trainer
    counts in a batch, ``input_ids`` and ``labels`` of all of them. A micro-batch of which no sample could be read
    has the placeholder, whose weight is zero: the other ranks take the same way through the model.
    """

    def __init__(self, collate: Callable[[Sequence[Mapping]], dict]) -> None:
        self.collate = collate

    def __call__(self, samples: Sequence[Dealt]) -> dict:
        parts: dict[int, list[Dealt]] = {}
        for sample in samples:
            parts.setdefault(sample.place.part, []).append(sample)
        made = []
        for part in parts.values():
            places = [sample.place for sample in part if not isinstance(sample.item, LeftOut)]
            if not places:
                places = [NOTHING]
            made.append(
                {
                    "batch": self.collate([sample.item for sample in part]),
                    "weights": [place.weight for place in places],
                    "tokens": [place.tokens for place in places],
                    "supervised": [place.supervised for place in places],
                    "cost": sum(place.cost for place in places),
                    "logged": part[0].place.logged,
                }
            )
        counted = {name: self._rows(made, name, fill) for name, fill in (("input_ids", 0), ("labels", IGNORE))}
        return {DEALT: made, **counted}

    @staticmethod
    def _rows(made: Sequence[Mapping], name: str, fill: int) -> torch.Tensor:
        rows = [row for part in made for row in part["batch"][name]]
        return pad_sequence(rows, batch_first=True, padding_value=fill) if rows else torch.empty(0, 0).long()


def read_sizes(reader: SizeReader, loader: DataLoader, workers: int) -> Callable[[Iterable[list[int]]], DataLoader]:
    """Reads sizes ahead, in ``workers`` processes beside those of ``loader``."""
    dataset = SizedDataset(reader)

    def read(batch_sampler: Iterable[list[int]]) -> DataLoader:
        more = {"multiprocessing_context": loader.multiprocessing_context, "prefetch_factor": 4} if workers else {}
        # A generator of its own: the seeds of its workers must not take numbers that the host would draw.
        return DataLoader(
            dataset,
            batch_sampler=batch_sampler,
            num_workers=workers,
            collate_fn=list,
            generator=torch.Generator(),
            **more,
        )

    return read


def refuse_long_samples(reader: SizeReader, limit: int, exchange: Exchange, rank: int, loader: DataLoader) -> None:
    """Read the sizes of a whole dataset, each rank its share, in as many processes as read images. Collective.

    Raises ``ValueError`` that names the samples with more than ``limit`` tokens.
    """
    entries = reader.dataset.list_data_dict
    share = list(range(rank, len(entries), exchange.ranks))
    batches = [share[first : first + SHARE] for first in range(0, len(share), SHARE)]
    say(logger, "mm_packing_batch_tokens: %d samples are measured before training", len(entries))
    long = [(i, size.tokens) for batch in read_sizes(reader, loader, loader.num_workers)(batches) for i, size in batch]
    long = [entry for entry in long if entry[1] > limit]
    found = [long]
    if exchange.group is not None:
        found = [None] * exchange.ranks
        dist.all_gather_object(found, long, group=exchange.group)
    if long := sorted(entry for part in found for entry in part):
        named = ", ".join(f"{entries[i].get('id', i)} ({tokens})" for i, tokens in long[:NAMED])
        more = f" and {len(long) - NAMED} more" if len(long) > NAMED else ""
        raise ValueError(
            f"{len(long)} of {len(entries)} samples have more tokens than mm_packing_batch_tokens {limit}: {named}"
            f"{more}. Raise it, or set mm_packing_over_budget: truncate"
        )
