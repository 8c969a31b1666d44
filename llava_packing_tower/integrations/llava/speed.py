"""How fast a training is: measured on each rank (:mod:`.speed_meter`), gathered and logged when the trainer logs."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterator
from types import ModuleType

import torch
from transformers import Trainer, TrainerCallback

from ...utils import environment
from ...utils.device_peaks import datasheet_peak
from ...utils.say import say
from .host import PREPARE
from .methods import Call, add_step
from .patcher import Patches
from .registry import mixin, trainer_class
from .speed_meter import Meter, Share
from .speed_report import Speed, combine, in_words, over_the_run, write_report
from .trainable_parts import is_packing_tower, without_adapters

logger = logging.getLogger(__name__)


# ---------------------------------------------------------------- all ranks


def gather(share: Share) -> list[Share]:
    """The shares of all ranks, on every rank."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [share]
    everyone: list = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, dataclasses.astuple(share))
    return [Share(*one) for one in everyone]


def peak_of(trainer: Trainer) -> tuple[float | None, str]:
    """Operations per second that MFU is measured against (None if unknown), and where that figure is from.

    The datasheets' figures are for half precision: for float32 there is none, unless it is given. Raises ``ValueError``
    for a given one that is no number above 0.
    """
    given, source = getattr(trainer.args, "mm_packing_peak_tflops", None), "mm_packing_peak_tflops"
    if given is not None and not given > 0:
        raise ValueError(f"{source} must be a number of TFLOP/s above 0, got {given!r}")
    if given is None:
        given, source = environment.number(environment.PEAK_TFLOPS), environment.PEAK_TFLOPS
    if given is not None:
        return given * 1e12, source
    if trainer.args.device.type != "cuda":
        return None, "no GPU"
    name = torch.cuda.get_device_name(trainer.args.device)
    if not (trainer.args.bf16 or trainer.args.fp16):
        return None, "float32 training"
    peak = datasheet_peak(name)
    return peak, f"datasheet of {name}, dense bfloat16" if peak else f"no datasheet figure for {name}"


class SpeedLog(TrainerCallback):
    """Measures a training from the trainer's events; what :func:`into_trainers` puts into its logs."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.meter = trainer, Meter(trainer)
        self.peak, source = peak_of(trainer)
        if self.peak is None:
            self.basis = f"MFU is not logged ({source}; mm_packing_peak_tflops gives a peak)"
        elif not self.meter.known:
            self.basis = "MFU is not logged (an unknown decoder)"
        else:
            self.basis = f"MFU is over {self.peak / 1e12:g} TFLOP/s ({source})"
        self.windows: list[Speed] = []
        self.due: dict[str, float] | None = None
        self.disturbed = False
        """Whether something slows the steps that are running; they are left out."""
        self.first, self.began = 0, 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        global _running
        _running = self.meter
        self.windows, self.due, self.disturbed = [], None, False  # of an earlier train()
        self.first, self.began = state.global_step, time.perf_counter()
        self.meter.start()
        say(logger, "speed: %s", self.basis)

    def on_step_begin(self, args, state, control, **kwargs):
        self.meter.step = state.global_step

    def on_step_end(self, args, state, control, **kwargs):
        if control.should_log:
            self._measure(state)

    def on_epoch_end(self, args, state, control, **kwargs):
        if control.should_log:
            self._measure(state)

    def _measure(self, state) -> None:
        """Of a window that ends now: on every rank, for all ranks log at the same steps."""
        if not self.meter.micro_steps:
            return
        plugin = getattr(self.trainer.accelerator.state, "deepspeed_plugin", None)
        stage = 0 if plugin is None else plugin.zero_stage
        lock_step = stage == 3 or bool(self.trainer.args.fsdp)
        share = self.meter.take(state.global_step, lock_step, by_micro_step=lock_step or stage == 2)
        speed = combine(gather(share), state.global_step, self.peak)
        if self.disturbed:
            self.disturbed = False
            self.meter.began = time.perf_counter()  # other ranks have waited in here for what disturbed this one
            return
        self.windows.append(speed)
        done = state.global_step - self.first
        left = (time.perf_counter() - self.began) / done * (state.max_steps - state.global_step) if done else None
        self.due = speed.log(left)

    def on_train_end(self, args, state, control, **kwargs):
        global _running
        _running = None
        logged = len(self.windows)
        if state.global_step > (self.windows[-1].step if self.windows else self.first):
            self._measure(state)  # the steps since the last log
        self.meter.stop()
        if not state.is_world_process_zero or not self.windows:
            return
        whole = over_the_run(self.windows, self.first)
        say(logger, "speed: %s; %s", in_words(whole.log(None)), self.basis)
        rest = [{"step": window.step, **window.log(0.0)} for window in self.windows[logged:]]
        write_report(args.output_dir, [*state.log_history, *rest], self.basis)


_running: Meter | None = None


# ---------------------------------------------------------------- into the host


class TimedBatches:
    """An iterator over batches that notes how long each was waited for; once, where a loader waits in it for another
    one, as for the sizes of samples that are dealt."""

    def __init__(self, batches: Iterator, meter: Meter) -> None:
        self._batches, self._meter = batches, meter

    def __iter__(self) -> TimedBatches:
        return self

    def __next__(self) -> object:
        began, before = time.perf_counter(), self._meter.wait
        try:
            return next(self._batches)
        finally:
            self._meter.wait = before + time.perf_counter() - began

    def __getattr__(self, name: str) -> object:
        return getattr(self._batches, name)


def count_tokens(arch: ModuleType, patches: Patches) -> None:
    """Count the tokens of every batch that a host's model puts together, while a training is measured."""

    def count(call: Call) -> Iterator[None]:
        given, meter = dict(call.arguments), _running
        yield
        if meter is None or meter.current is None or given.get("input_ids") is None:
            return
        ids, seen = given["input_ids"], given.get("attention_mask")
        words = ids != arch.IMAGE_TOKEN_INDEX
        words = words if seen is None else words & seen.bool()
        mask, _, embeds, labels = call.result[-4:]  # GeoChat returns no positions in front of them
        shape = ids.shape if embeds is None else embeds.shape[:2]
        tokens = torch.ones(shape, dtype=torch.bool, device=ids.device) if mask is None else mask.bool()
        meter.count_tokens(words, tokens, labels)

    add_step(mixin(arch), f"LlavaMetaForCausalLM.{PREPARE}", "count_tokens", count, patches)


def into_trainers(train: ModuleType, patches: Patches) -> None:
    """Have every trainer of a host's LLaVA with a packing tower measure its speed, and log it with its loss."""
    owner = trainer_class(train)

    def attach(call: Call) -> Iterator[None]:
        yield
        self = call.self
        steps = getattr(self.args, "mm_packing_profile", None)
        wanted = getattr(self.args, "mm_packing_speed", True) or steps is not None
        plain = without_adapters(self.model)
        tower = getattr(plain, "get_vision_tower", lambda: None)()
        if wanted and is_packing_tower(tower) and tower.is_loaded:
            self._llava_packing_speed = SpeedLog(self)
            if steps is not None:
                from .profiling import Profile

                self.add_callback(Profile(self, self._llava_packing_speed, steps))  # it asks for logs: hence before
            self.add_callback(self._llava_packing_speed)

    def apart(call: Call) -> Iterator[None]:
        """Evaluations and checkpoints are no part of the time."""
        meter = _running
        if meter is None or meter.apart:
            yield
            return
        began, meter.apart = time.perf_counter(), True
        try:
            yield
        finally:
            meter.paused += time.perf_counter() - began
            meter.apart = False

    def log(call: Call) -> None:
        speed = getattr(call.self, "_llava_packing_speed", None)
        if speed is not None and speed.due is not None and "loss" in call.arguments["logs"]:
            call.arguments["logs"].update(speed.due)
            speed.due = None

    def wait(call: Call) -> Iterator[None]:
        yield
        if _running is not None and not _running.apart:  # the loader of the training
            call.result = TimedBatches(call.result, _running)

    add_step(owner, "LLaVATrainer.__init__", "speed_log", attach, patches)
    add_step(owner, "LLaVATrainer.evaluate", "apart_from_speed", apart, patches)
    add_step(owner, "LLaVATrainer._save_checkpoint", "apart_from_speed", apart, patches)
    add_step(Trainer, "Trainer.log", "speed_log", log, patches)
    add_step(torch.utils.data.DataLoader, "DataLoader.__iter__", "data_wait", wait, patches)
