"""Which rank computes which samples of an optimizer step, and in which micro-batch. Plain numbers, no torch.

The samples of a step are dealt by their predicted cost, the most expensive one first, so that no rank waits for the
one that got the panoramas. Every rank computes the same deal from the same sizes. A weight for each sample, from the
micro-batch that the host would have put it in, keeps the host's average: dealing changes no gradient.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

Deal = list[list[list[int]]]
"""``deal[rank][micro_step]``: the positions of the samples in a micro-batch, ascending."""


class SampleSize(NamedTuple):
    """What is known of a sample before its pixels are read.

    patches: rows of the encoder; pairs: the sum of the squared lengths of the encoder's segments; tokens: of the
    decoder, after truncation; supervised: those that are predicted by another one.
    """

    patches: int
    pairs: int
    tokens: int
    supervised: int


@dataclass(frozen=True)
class Cost:
    """Constants of the cost of a sample, in billions of floating-point operations of a forward and a backward pass.

    patch, patch_pair: of a row of the encoder, and of two that see each other; token, token_pair: of the decoder, where
    half of the pairs see each other; supervised: of a row of the head; micro_step: of a micro-batch, whatever is in it.
    """

    patch: float
    patch_pair: float
    token: float
    token_pair: float
    supervised: float
    micro_step: float = 0.0

    def __call__(self, size: SampleSize) -> float:
        encoder = self.patch * size.patches + self.patch_pair * size.pairs
        decoder = self.token * size.tokens + self.token_pair * size.tokens**2 / 2
        return encoder + decoder + self.supervised * size.supervised

    def items(self) -> dict[str, float]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


def layer_cost(hidden: int, layers: int, weights: int, passes: float) -> tuple[float, float]:
    """Cost of a row and of a pair of rows, from the sizes of a transformer.

    A multiplication by ``weights`` parameters is 2 operations a row, attention 4 ``hidden`` a pair and layer.
    passes: 1 for the forward pass, 1 more for gradients of its inputs, and 1 more for those of its weights or the part
    of them that is trained. Attention has no weights: its backward pass is 2.
    """
    return 2e-9 * weights * passes, 4e-9 * hidden * layers * (3 if passes > 1 else 1)


LAYER_FLOOR = 4000.0
"""Billions of operations that a layer costs in a forward and a backward pass however few rows it has: the host launches
its kernels meanwhile. 5.7 ms of a card that makes 700 TFLOP/s (fitted to runs on H200: docs/benchmarks.md). It does not
grow with the width of the layer."""


def layer_floor(layers: int, passes: float) -> float:
    """What the layers cost a micro-batch of no rows. passes: as in :func:`layer_cost`."""
    return LAYER_FLOOR * layers * min(passes, 3.0) / 3


# ---------------------------------------------------------------- dealing


def deal(costs: Sequence[float], ranks: int, steps: int) -> Deal:
    """Deal samples over ``ranks x steps`` micro-batches: the next most expensive one to the cheapest micro-batch.

    Micro-batches of similar cost share a micro-step, the most expensive ones the first. No micro-batch is empty where
    there are as many samples. Ties are broken by position.
    """
    groups: list[list[int]] = [[] for _ in range(ranks * steps)]
    heap = [(0.0, 0, group) for group in range(ranks * steps)]
    for position in _by_cost(costs):
        load, count, group = heapq.heappop(heap)
        groups[group].append(position)
        heapq.heappush(heap, (load + costs[position], count + 1, group))
    return _arrange(groups, costs, ranks)


def deal_within(tokens: Sequence[int], costs: Sequence[float], ranks: int, limit: int) -> Deal:
    """Deal samples over the fewest micro-batches of at most ``limit`` tokens, equally many on each rank.

    Where there are fewer samples than micro-batches, some are empty. Raises ``ValueError`` for a sample above the
    limit.
    """
    largest = max(tokens)
    if largest > limit:
        raise ValueError(f"a sample has {largest} tokens, but a micro-batch may have {limit}")
    steps = max(1, -(-sum(tokens) // (limit * ranks)))
    while True:
        groups = _fill_cheapest(tokens, costs, ranks * steps, limit) or _fill_first(tokens, ranks * steps, limit)
        if groups is not None:
            return _arrange(_spread(groups, costs), costs, ranks)
        steps += 1


def _by_cost(costs: Sequence[float]) -> list[int]:
    return sorted(range(len(costs)), key=lambda position: (-costs[position], position))


def _fill_cheapest(tokens: Sequence[int], costs: Sequence[float], count: int, limit: int) -> list[list[int]] | None:
    """``count`` groups by cost, as :func:`deal`, passing over those that have no room; None where one finds none."""
    groups: list[list[int]] = [[] for _ in range(count)]
    loads, used = [0.0] * count, [0] * count
    for position in _by_cost(costs):
        room = [group for group in range(count) if used[group] + tokens[position] <= limit]
        if not room:
            return None
        best = min(room, key=lambda group: (loads[group], len(groups[group]), group))
        groups[best].append(position)
        loads[best] += costs[position]
        used[best] += tokens[position]
    return groups


def _fill_first(tokens: Sequence[int], count: int, limit: int) -> list[list[int]] | None:
    """``count`` groups, the longest sample first into the first group that has room; None where one finds none."""
    groups: list[list[int]] = [[] for _ in range(count)]
    used = [0] * count
    for position in _by_cost(tokens):
        group = next((group for group in range(count) if used[group] + tokens[position] <= limit), None)
        if group is None:
            return None
        groups[group].append(position)
        used[group] += tokens[position]
    return groups


def _spread(groups: list[list[int]], costs: Sequence[float]) -> list[list[int]]:
    """Give an empty group a sample of the most expensive group that has several."""
    for empty in (group for group in groups if not group):
        several = [group for group in groups if len(group) > 1]
        if several:
            richest = max(several, key=lambda group: (sum(costs[p] for p in group), -min(group)))
            empty.append(richest.pop())
    return groups


def _arrange(groups: list[list[int]], costs: Sequence[float], ranks: int) -> Deal:
    """Groups as micro-batches: similar ones in one micro-step, and there the costliest for the rank with the least."""
    loads = [sum(costs[position] for position in group) for group in groups]
    order = sorted(range(len(groups)), key=lambda group: (-loads[group], min(groups[group], default=len(costs)), group))
    made: Deal = [[] for _ in range(ranks)]
    done = [0.0] * ranks
    for first in range(0, len(order), ranks):
        by_load = sorted(range(ranks), key=lambda rank: (done[rank], rank))
        for rank, group in zip(by_load, order[first : first + ranks]):
            made[rank].append(sorted(groups[group]))
            done[rank] += loads[group]
    return made


def calls_of(micro_batches: int, calls: int) -> list[int]:
    """How many micro-batches each of ``calls`` training steps takes: even, and the last one at least one."""
    return [micro_batches * (call + 1) // calls - micro_batches * call // calls for call in range(calls)]


# ---------------------------------------------------------------- weights


def weights_as_averaged(groups: Sequence[Hashable], supervised: Sequence[int]) -> list[float]:
    """What a supervised token of each sample weighs in the host's loss: one part of those of its sample's group.

    groups: the micro-batch of each sample, as the host had them. The weight of a sample in a group without a supervised
    token is 0.
    """
    totals: dict[Hashable, int] = {}
    for group, count in zip(groups, supervised, strict=True):
        totals[group] = totals.get(group, 0) + count
    return [1 / totals[group] if totals[group] else 0.0 for group in groups]


def balance_of(costs: Sequence[float], dealt: Deal, micro_step: float = 0.0) -> float:
    """The part of the ranks' time that is work, by cost: in each micro-step all wait for the most expensive one.

    micro_step: what each costs besides its samples.
    """
    steps = list(zip(*([micro_step + sum(costs[p] for p in part) for part in parts] for parts in dealt)))
    slowest = sum(max(step) for step in steps) * len(dealt)
    return sum(map(sum, steps)) / slowest if slowest else 1.0


def error_of(costs: Sequence[float], seconds: Sequence[float]) -> float:
    """Mean distance of the seconds that costs predict, in proportion, from measured ones; as a part of their mean."""
    rate = sum(seconds) / sum(costs)
    return sum(abs(rate * cost - second) for cost, second in zip(costs, seconds, strict=True)) / sum(seconds)


def fit_of(costs: Sequence[float], seconds: Sequence[float]) -> tuple[float, float] | None:
    """Least squares ``seconds = floor + slope * cost``: (floor, slope), or None where all costs are the same."""
    mean, middle = sum(costs) / len(costs), sum(seconds) / len(seconds)
    spread = sum((cost - mean) ** 2 for cost in costs)
    if spread <= 1e-9 * mean**2 * len(costs):
        return None
    slope = sum((c - mean) * (s - middle) for c, s in zip(costs, seconds, strict=True)) / spread
    return middle - slope * mean, slope
