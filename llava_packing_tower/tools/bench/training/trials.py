"""A row of the table at one size of its micro-batch: its batches, its steps, what was measured."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from ....data.smart_resize import SmartResize
from ....integrations.llava.packed_step import forget_plan
from ....multimodal.flops import decoder_flops, encoder_flops, head_flops, step_flops
from ....multimodal.packed_decoder import only_backend
from ..timing import first_line
from .models import set_checkpointing, train_parts, weight_bytes
from .photos import IGNORE, PATCH, Batch, Mode, assemble, draw_photos, prepared, processed
from .rows import KEYS, STOCK, WIDE, Row, Size

logger = logging.getLogger(__name__)

GROUPS, TIMED = 3, 2
"""Micro-batches of a trial; timed steps in a turn."""
WARM_UPS = {True: GROUPS, False: 1}
"""Steps that are not timed: in the first turn each micro-batch once (memory is taken, kernels are built), later one."""
PHOTOS = {True: 8, False: 64}
"""How many there are: in small, and on a GPU."""
AT_ONCE = 8  # photos whose tokens are counted
GIB = 1 << 30
ROOM = 0.9
"""Of the memory: a size that needs more is not gone on with, since the next turn may not find that much."""


@dataclass(frozen=True)
class Step:
    """A micro-batch, ready to run. flops: of a step by the rule; tokens: real ones; padded: to how many positions."""

    run: Callable[[], torch.Tensor]
    flops: float
    tokens: int
    padded: int


class Bench:
    """The models, built when first asked for, and the photos as each of them takes them, made once for all rows.

    memory: bytes that may be used.
    """

    memory = float("inf")

    def __init__(self, size: dict, device: torch.device, tiny: bool, build: dict[str, Callable[[], nn.Module]]) -> None:
        self.size, self.device, self.tiny = size, device, tiny
        self.photos = draw_photos(PHOTOS[tiny], size["scale"])
        self.seconds: dict[str, float] = {}
        self._build, self._models, self._pixels, self._lengths, self._steps = build, {}, {}, {}, {}

    def model(self, name: str) -> nn.Module:
        if name not in self._models:
            began = time.monotonic()
            self._models[name] = self._build[name]()
            self.seconds[f"build {name}"] = time.monotonic() - began
        return self._models[name]

    def mode(self, ratio: str) -> Mode:
        bounds = (1 if self.tiny else 16, (2 * self.size["tile"] // PATCH) ** 2)
        return Mode(ratio, bounds if ratio == "native" else None)

    def _numbers(self, group: int, samples: int) -> list[int]:
        return [(group * samples + i) % len(self.photos) for i in range(samples)]

    def batch(self, row: Row, group: int, samples: int) -> tuple[Batch, list[int]]:
        """A micro-batch, and how many tokens each of its samples has in the decoder."""
        numbers = self._numbers(group, samples)
        pixels = self._of_photos(self._pixels, "photos", row, numbers, self._process)
        tokens = self._of_photos(self._lengths, "count tokens", row, numbers, self._count)
        return self._assemble(row, numbers, pixels), tokens

    def _of_photos(self, made: dict, what: str, row: Row, numbers: list[int], make: Callable) -> list:
        """What ``make`` makes of each photo for this model, once."""
        known, began = made.setdefault((row.model, row.ratio), {}), time.monotonic()
        missing = [number for number in dict.fromkeys(numbers) if number not in known]
        for start in range(0, len(missing), AT_ONCE):
            some = missing[start : start + AT_ONCE]
            known.update(zip(some, make(row, some), strict=True))
        self.seconds[what] = self.seconds.get(what, 0.0) + time.monotonic() - began
        return [known[number] for number in numbers]

    def _process(self, row: Row, numbers: list[int]) -> list[torch.Tensor]:
        return processed(self.model(row.model), self.mode(row.ratio), [self.photos[n] for n in numbers])

    def _count(self, row: Row, numbers: list[int]) -> list[int]:
        model, pixels = self.model(row.model), self._pixels[row.model, row.ratio]
        self.mode(row.ratio).set(model)
        with torch.no_grad():
            mask = prepared(model, self._assemble(row, numbers, [pixels[n] for n in numbers]))[1]
        return mask.sum(1).tolist()

    def _assemble(self, row: Row, numbers: list[int], pixels: list[torch.Tensor]) -> Batch:
        return assemble(self.model(row.model), [self.photos[n] for n in numbers], pixels, self.size["words"])

    def steps(self, row: Row, samples: int) -> list[Step]:
        """The micro-batches of a row at this size, with their counts."""
        key = (row.model, row.ratio, samples, row.trained)
        if key not in self._steps:
            make = self._decoder_step if row.model == WIDE else self._llava_step
            self._steps[key] = [make(row, group, samples) for group in range(GROUPS)]
        return self._steps[key]

    def _llava_step(self, row: Row, group: int, samples: int) -> Step:
        model, (batch, lengths) = self.model(row.model), self.batch(row, group, samples)
        config, tower = model.config, model.get_vision_tower()
        # LLaVA's CLIP computes all its layers for the one before the last.
        skipped = -1 - tower.select_layer
        encoder = encoder_flops(tower.config, batch.tiles, tower.config.num_hidden_layers - skipped)
        supervised = int((batch.labels[:, 1:] != IGNORE).sum())
        flops = step_flops(
            encoder,
            decoder_flops(config, lengths),
            head_flops(config, supervised),
            **{f"{part}_trained": part in row.trained for part in ("tower", "projector", "decoder")},
        )

        def run() -> torch.Tensor:
            return model(**batch.given, labels=batch.labels, use_cache=False).loss

        return Step(run, flops, sum(lengths), samples * max(lengths))

    def _decoder_step(self, row: Row, group: int, samples: int) -> Step:
        """The decoder alone, from embeddings of as many tokens as these photos have at native resolution."""
        model, rule = self.model(row.model), SmartResize(PATCH, (1, 1), *self.mode("native").bounds)
        words, device = self.size["words"], self.device
        grids = [rule.grid(*self.photos[number].size) for number in self._numbers(group, samples)]
        lengths = [rows * (columns + 1) + sum(words) for rows, columns in grids]  # a newline behind each row
        positions = torch.arange(max(lengths), device=device)
        ends = torch.tensor(lengths, device=device)[:, None]
        mask = positions < ends
        labels = torch.randint(3, model.config.vocab_size, mask.shape, device=device)
        labels = labels.masked_fill(~mask | (positions < ends - words[1]), IGNORE)
        generator = torch.Generator(device).manual_seed(group)
        width = model.config.hidden_size
        embeds = torch.randn(*mask.shape, width, generator=generator, device=device).to(model.dtype).requires_grad_()
        # The head is left out of the count: this is about the layers.
        flops = step_flops(encoder_flops(model.config, ()), decoder_flops(model.config, lengths))

        def run() -> torch.Tensor:
            embeds.grad = None
            return model(inputs_embeds=embeds, attention_mask=mask, labels=labels, use_cache=False).loss

        return Step(run, flops, sum(lengths), mask.numel())


def set_keys(model: nn.Module, keys: dict[str, bool], attention: str | None = None) -> None:
    """Set this package's keys in a model's config, the others to their defaults."""
    wanted = {name: keys.get(name) for name in KEYS}
    if vars(model).get("_bench_keys") == (wanted, attention):
        return
    for name, value in wanted.items():
        setattr(model.config, name, value)
    forget_plan(model)
    model._bench_keys = (wanted, attention)


@dataclass
class Trial:
    """A row at one size. seconds: of each timed step; failure: why there are none; tight: there were, but with
    little memory to spare."""

    bench: Bench
    row: Row
    size: Size
    seconds: list[float] = field(default_factory=list)
    mfu_flops: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    peak: float = 0.0
    failure: str | None = None
    out_of_memory: bool = False
    tight: bool = False
    plan: str = ""
    count: int = 0

    def turn(self) -> None:
        """Steps that are not timed, then :data:`TIMED` that are."""
        model = None
        try:
            model = self.bench.model(self.row.model)
            steps = self.bench.steps(self.row, self.size.samples)
            self._prepare(model)
            with only_backend(self.row.attention):
                for timed in [False] * WARM_UPS[not self.count] + [True] * TIMED:
                    self._step(model, steps[self.count % GROUPS], timed)
                    self.count += 1
            self.plan = str(vars(model).get("_llava_packing_step", "LLaVA's own"))
        except torch.cuda.OutOfMemoryError:
            self.failure, self.out_of_memory = "out of memory", True
        except Exception as error:
            logger.warning("%s, %s failed", self.row.name, self.size, exc_info=True)
            self.failure = first_line(error)
        if model is not None:
            model.zero_grad(set_to_none=True)
        if self.failure and self.bench.device.type == "cuda":
            torch.cuda.empty_cache()

    def _prepare(self, model: nn.Module) -> None:
        """Put the model into this row's state: rows share one."""
        model.train()
        train_parts(model, self.row.trained)
        set_checkpointing(model, self.size.checkpointing)
        model.config.tokenizer_padding_side = "right"
        if self.row.model != WIDE:
            self.bench.mode(self.row.ratio).set(model)
        if self.row.model != STOCK:
            set_keys(model, self.row.keys, self.row.attention)

    def _step(self, model: nn.Module, step: Step, timed: bool) -> None:
        cuda, others = self.bench.device.type == "cuda", 0
        model.zero_grad(set_to_none=True)
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            others = torch.cuda.memory_allocated() - weight_bytes(model)
        began = time.perf_counter()
        loss = step.run()
        loss.backward()
        if cuda:
            torch.cuda.synchronize()
        spent = time.perf_counter() - began
        if cuda:
            most = torch.cuda.max_memory_allocated()
            self.peak = max(self.peak, (most - others) / GIB)
            self.tight = self.tight or most > ROOM * self.bench.memory
        if timed:
            self.seconds.append(spent)
            self.mfu_flops.append(step.flops / spent)
            self.losses.append(loss.item())

    @property
    def rate(self) -> float | None:
        """Samples per second."""
        return self.size.samples / statistics.median(self.seconds) if self.seconds and not self.failure else None

    def record(self, peak_rate: float | None) -> dict:
        """What was measured, as JSON types. peak_rate: of the matmul, in operations per second."""
        base = {"samples": self.size.samples, "checkpointing": self.size.checkpointing, "plan": self.plan}
        if self.rate is None:
            return {**base, "failure": self.failure}
        steps = self.bench.steps(self.row, self.size.samples)
        return {
            **base,
            "ms": statistics.median(self.seconds) * 1e3,
            "ms of each step": [round(seconds * 1e3, 3) for seconds in self.seconds],
            "samples/s": self.rate,
            "MFU": statistics.median(self.mfu_flops) / peak_rate if peak_rate else None,
            "peak GiB": self.peak,
            "tokens": statistics.mean(step.tokens for step in steps),
            "padded to": statistics.mean(step.padded for step in steps),
            "losses": self.losses[:TIMED],
        }


class Contest:
    """A row over its sizes: in the first turn each is tried, after that the best with memory to spare has its turns."""

    SLOWER = 0.97  # of the best rate so far: larger batches are not tried then

    def __init__(self, bench: Bench, row: Row) -> None:
        self.row, self.trials = row, [Trial(bench, row, size) for size in row.sizes]
        self.best: Trial | None = None
        self.searched = False

    def turn(self, time_is_up: Callable[[], bool]) -> None:
        if not self.searched:
            self._search(time_is_up)
            return
        while self.best is not None:
            best = self.best
            best.turn()
            if not best.failure:
                return
            # What did fit once does not always. The turn is the next best's then.
            logger.warning("%s: %s failed in a later turn: %s", self.row.name, best.size, best.failure)
            self._choose()

    def _search(self, time_is_up: Callable[[], bool]) -> None:
        stopped = set()
        for trial in self.trials:
            kind = trial.size.checkpointing
            if kind in stopped or (self.best is not None and time_is_up()):
                continue
            trial.turn()
            best = max((t.rate or 0.0 for t in self.trials if t.size.checkpointing == kind), default=0.0)
            if trial.failure or trial.tight or (trial.rate or 0.0) < self.SLOWER * best:
                stopped.add(kind)
            self._choose()
        self.searched = True

    def _choose(self) -> None:
        done = [t for t in self.trials if t.rate and not t.tight] or [t for t in self.trials if t.rate]
        self.best = max(done, key=lambda t: t.rate) if done else None

    def record(self, peak_rate: float | None) -> dict:
        tried = {str(t.size): t.rate or t.failure for t in self.trials if t.rate or t.failure}
        trial = self.best or next((t for t in self.trials if t.failure), self.trials[0])
        found = {"title": self.row.title, "model": self.row.model, **trial.record(peak_rate)}
        return {**found, "tried": tried} if len(self.trials) > 1 else found

    @property
    def failed(self) -> bool:
        """Whether something went wrong that is not a lack of memory."""
        return any(trial.failure and not trial.out_of_memory for trial in self.trials)
