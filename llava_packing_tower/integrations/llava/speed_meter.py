"""What one rank does in a training, counted beside the host's own loop.

Counting costs no synchronization. Patches are known on the host; the lengths of samples stay on the device until a log
is due, when the trainer reads its loss anyway. Time is that of the rank's clock, of forward passes that of the device.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import Trainer

from ...multimodal.flops import Flops, decoder_flops, encoder_flops, head_flops, step_flops
from .packed_step import decoder_base
from .trainable_parts import without_adapters

IGNORE = -100
GIB = 1 << 30


class Span:
    """The time between two moments: of the current CUDA stream, without waiting for it, or of the clock."""

    def __init__(self, cuda: bool) -> None:
        self.cuda = cuda
        self.start = self._now()
        self.stop: torch.cuda.Event | float | None = None

    def _now(self) -> torch.cuda.Event | float:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def end(self) -> None:
        self.stop = self._now()

    @property
    def seconds(self) -> float:
        """Waits for the second moment."""
        if isinstance(self.start, float):
            return self.stop - self.start
        self.stop.synchronize()
        return self.start.elapsed_time(self.stop) / 1e3


@dataclass
class MicroStep:
    """One forward pass for training. step: of the optimizer; wait: seconds in the data loader before it; counts:
    ``[3, B]``, tokens, words and supervised positions of each sample, where the model is; grids: (frames, rows,
    columns) of each image, clip or tile."""

    step: int
    wait: float
    forward: Span
    counts: torch.Tensor | None = None
    grids: list[Sequence[int]] = field(default_factory=list)


@dataclass(frozen=True)
class Share:
    """What one rank did in a window. waits, work: of each optimizer step (or forward pass, where the ranks meet in
    each): seconds in the data loader, and seconds of forward passes, or operations where those meet other ranks."""

    seconds: float
    samples: int
    visual: int
    text: int
    patches: int
    flops: float
    memory: float
    waits: tuple[float, ...]
    work: tuple[float, ...]


class Meter:
    """Counts what one rank does in a training."""

    def __init__(self, trainer: Trainer) -> None:
        model = without_adapters(trainer.model)
        self.trainer, self.config, self.tower = trainer, model.config, model.get_vision_tower()
        self.known = decoder_base(type(model)) is not None
        self.trained = trained_parts(model)  # now: FSDP and ZeRO leave pieces
        self.cuda = trainer.args.device.type == "cuda"
        self.micro_steps: list[MicroStep] = []
        self.current: MicroStep | None = None
        self.wait = self.paused = self.began = 0.0
        self.apart = False
        self.step = 0
        self._handles: list = []

    # ------------------------------------------------------------ while training

    def start(self) -> None:
        self.stop()  # an earlier train() may have ended in an error
        self.micro_steps, self.current, self.wait, self.paused = [], None, 0.0, 0.0
        model = self.trainer.model
        self._handles = [
            model.register_forward_pre_hook(lambda *_: self.begin_forward()),
            model.register_forward_hook(lambda *_: self.end_forward()),
        ]
        self.tower.on_grids = self.count_patches
        self.began = time.perf_counter()

    def stop(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.tower.on_grids = None

    def begin_forward(self) -> None:
        self.current = None
        if self.trainer.model.training and torch.is_grad_enabled():
            self.current = MicroStep(self.step, self.wait, Span(self.cuda))
            self.wait = 0.0

    def end_forward(self) -> None:
        if self.current is not None:
            self.current.forward.end()
            self.micro_steps.append(self.current)
            self.current = None

    def count_patches(self, grids: Sequence[Sequence[int]]) -> None:
        if self.current is not None:
            self.current.grids += grids

    def count_tokens(self, words: torch.Tensor, tokens: torch.Tensor, labels: torch.Tensor | None) -> None:
        """words, tokens: bool ``[B, L]``, true for text before images came in, and for real positions after that;
        labels: ``[B, L]`` of these positions. Nothing is read from the device."""
        if self.current is None:
            return
        lengths = tokens.sum(1)
        supervised = torch.zeros_like(lengths) if labels is None else (labels[:, 1:] != IGNORE).sum(1)
        self.current.counts = torch.stack([lengths, words.sum(1), supervised])

    # ------------------------------------------------------------ when a log is due

    def take(self, step: int, lock_step: bool, by_micro_step: bool) -> Share:
        """What was done since the last call. Waits for the device.

        lock_step: forward passes meet other ranks, so that their time is not this rank's own; by_micro_step: the ranks
        meet after each forward and backward pass, not only at the end of an optimizer step.
        """
        micro_steps, self.micro_steps, self.step = self.micro_steps, [], step
        samples = visual = text = 0
        waits, work, flops = {}, {}, 0.0
        for number, micro in enumerate(micro_steps):
            counts = [[0], [0], [0]] if micro.counts is None else micro.counts.tolist()
            samples += 0 if micro.counts is None else len(counts[0])
            text += sum(counts[1])
            # Of a sample that was cut, words may be gone: it has no more of them than tokens.
            visual += sum(max(tokens - words, 0) for tokens, words in zip(counts[0], counts[1]))
            operations = self.operations(micro.grids, counts[0], sum(counts[2]))
            flops += operations
            key = number if by_micro_step else micro.step
            waits[key] = waits.get(key, 0.0) + micro.wait
            work[key] = work.get(key, 0.0) + (operations if lock_step else micro.forward.seconds)
        if self.cuda:
            torch.cuda.synchronize()
        now = time.perf_counter()
        seconds, self.began, self.paused = now - self.began - self.paused, now, 0.0
        return Share(
            seconds=seconds,
            samples=samples,
            visual=visual,
            text=text,
            patches=sum(math.prod(grid) for micro in micro_steps for grid in micro.grids),
            flops=flops,
            memory=torch.cuda.max_memory_allocated() / GIB if self.cuda else 0.0,
            waits=tuple(waits.values()),
            work=tuple(work.values()),
        )

    def operations(self, grids: Sequence[Sequence[int]], tokens: Sequence[int], supervised: int) -> float:
        """Of a forward and backward pass; 0 for a decoder whose layers are not known."""
        if not self.known:
            return 0.0
        towers = self.tower.encoders().values()
        lengths = [math.prod(grid) for grid in grids]
        encoder = sum(
            (encoder_flops(part.config, lengths, max(part.feature_layers), grids) for part in towers), Flops()
        )
        decoder, head = decoder_flops(self.config, tokens), head_flops(self.config, supervised)
        return step_flops(encoder, decoder, head, **self.trained)


def trained_parts(model: nn.Module) -> dict[str, bool]:
    """What :func:`step_flops` is told. Adapters do not count: gradients go through, the weights get none."""

    def any_of(module: nn.Module | None) -> bool:
        named = [] if module is None else module.named_parameters()
        return any(parameter.requires_grad for name, parameter in named if "lora_" not in name)

    inner = model.get_model()
    return {
        "tower_trained": any_of(model.get_vision_tower()),
        "projector_trained": any_of(getattr(inner, "mm_projector", None)),
        "decoder_trained": any_of(getattr(inner, "layers", None)),
    }
