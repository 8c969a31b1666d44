"""Timing: every system in turn, round after round, with the card's own matmul rate among them; medians over rounds.

In turns, because a GPU's clock follows its load: a system that is measured alone, or after a pause, is measured at
another clock than the rest. Work shorter than 0.1 s is called for so long in its turn, and the first call is not
counted: the matmul before it leaves the GPU at the clock of its power limit, which only time undoes.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from .availability import Unavailable
from .systems import Setting, Step, System, lowest_cosine, recorded_backend, training_step
from .workloads import Workload, reordered, useful_flops

logger = logging.getLogger(__name__)

LEAST_ROUNDS = 3
WARM_UPS = (3, 12)
"""At least and at most so many runs before anything is timed; in between until nothing more is compiled."""


class Deadline:
    """The time that a run may take. ``share(n)``: the end of the first of n equal parts of what is left."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    def share(self, parts: int) -> float:
        return time.monotonic() + max(self.left, 0.0) / max(parts, 1)


class Clock:
    """Milliseconds of device time from the call to the last kernel (CUDA events), or of wall time on a CPU.

    ``host_ms``: of the last call, the time until it returned.
    """

    host_ms = 0.0

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cuda = device.type == "cuda"

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def __call__(self, run: Callable[[], object]) -> float:
        self.wait()
        start = time.perf_counter()
        if not self.cuda:
            run()
            self.host_ms = (time.perf_counter() - start) * 1e3
            return self.host_ms
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        run()
        self.host_ms = (time.perf_counter() - start) * 1e3
        last.record()
        last.synchronize()
        return first.elapsed_time(last)


TURN_MS = 100.0
MOST_CALLS = 40


def turn_of(clock: Clock, run: Callable[[], object], host: list[float] | None = None) -> list[float]:
    """The times of one turn: one call on a CPU; on a GPU as many as fill :data:`TURN_MS`, without the first of them.

    ``host`` gets the host times of the same calls.
    """
    times, hosts = [clock(run)], [clock.host_ms]
    while clock.cuda and sum(times) < TURN_MS and len(times) < MOST_CALLS:
        times.append(clock(run))
        hosts.append(clock.host_ms)
    if host is not None:
        host += hosts[1:] or hosts
    return times[1:] or times


@contextlib.contextmanager
def without_collections() -> Iterator[None]:
    """No garbage collection in here, as timeit does: one takes as long as a training step."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class PeakMatmul:
    """The rate that MFU is measured against: an 8192^3 bf16 matmul (1024^3 float32 on a CPU).

    On a GPU for about 0.3 s at a time: bursts of a few matmuls run before the power limit sets in and are up to a tenth
    faster, which no work of that length can follow."""

    def __init__(self, device: torch.device) -> None:
        self.size, self.times = (8192, 200) if device.type == "cuda" else (1024, 1)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        generator = torch.Generator(device).manual_seed(0)
        self.a, self.b = (
            torch.randn(self.size, self.size, generator=generator, device=device).to(dtype) for _ in range(2)
        )
        self.out = torch.empty_like(self.a)

    def run(self) -> None:
        for _ in range(self.times):
            torch.mm(self.a, self.b, out=self.out)

    def flops_per_second(self, ms: float) -> float:
        return 2.0 * self.size**3 * self.times / (ms * 1e-3)


@dataclass
class Measured:
    """One system on one workload. ms: device times; host_ms: until the call returned (on a GPU, what the host needs to
    launch everything). note: why there is no time. Bytes are of the peak, weights (and gradients) included:
    ``allocated`` by tensors, ``reserved`` also what the allocator holds (graph pools, fragmentation)."""

    name: str
    packed: bool
    ms: list[float] = field(default_factory=list)
    host_ms: list[float] = field(default_factory=list)
    note: str | None = None
    backend: str | None = None
    lowest_cosine: float | None = None
    warm_up_seconds: float | None = None
    allocated: int | None = None
    reserved: int | None = None

    @property
    def median(self) -> float | None:
        return statistics.median(self.ms) if self.ms else None

    @property
    def host_median(self) -> float | None:
        return statistics.median(self.host_ms) if self.host_ms else None


@dataclass
class Result:
    """One workload on all systems; ``peak`` in floating-point operations per second."""

    family: str
    title: str
    work: Workload
    flops: float
    systems: list[Measured]
    peak: float | None = None
    rounds: int = 0
    note: str | None = None

    def mfu(self, system: Measured) -> float | None:
        """Useful operations per second over those of the peak matmul; see ``useful_flops``."""
        return None if system.median is None or not self.peak else self.flops / (system.median * 1e-3) / self.peak


def first_line(error: Exception) -> str:
    """An error's type and message, short enough for a table."""
    return f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0][:150]}"


def compiled_so_far() -> int:
    """Graphs that torch.compile has made in this process."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


def release(device: torch.device) -> None:
    """Give memory back that nobody uses."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def measure(
    setting: Setting,
    work: Workload,
    systems: list[System],
    clock: Clock,
    rounds: int,
    until: float,
) -> Result:
    """Warm up each system, measure its memory, compare its features with the packed encoder's, then time
    all of them interleaved.

    ``until`` (of ``time.monotonic``) ends the rounds early, after three at least. A system other than the packed
    encoder that fails is noted and left out.
    """
    flops = useful_flops(setting.config, work.lengths, setting.layers, work.train, work.grids)
    result = Result(setting.family, setting.title, work, flops, [])
    images = work.images(setting.config.patch_size, setting.device, setting.dtype)
    reference: list[torch.Tensor] | None = None
    running: list[tuple[System, Measured]] = []
    for system in sorted(systems, key=lambda s: not s.packed):
        measured = Measured(system.name, system.packed)
        result.systems.append(measured)
        try:
            features = _first_runs(setting, work, system, images, clock, measured)
        except torch.cuda.OutOfMemoryError:
            if system.packed:
                raise
            measured.note = "out of memory"
        except (Unavailable, RuntimeError, TypeError, ValueError, AttributeError, AssertionError, ImportError) as error:
            if system.packed:
                raise
            logger.warning("%s on %s failed", system.name, work.label, exc_info=True)
            measured.note = f"failed: {first_line(error)}"
        else:
            running.append((system, measured))
            if system.same_weights:
                if reference is None:
                    reference = features
                else:
                    measured.lowest_cosine = lowest_cosine(reference, features)
        system.model.zero_grad(set_to_none=True)
        features = None
        release(setting.device)
    reference = None
    _rounds(setting, work, running, images, clock, rounds, until, result)
    return result


def prepared(setting: Setting, work: Workload, system: System, step: Step) -> Callable[[], object]:
    """What is timed: the forward, or a training step."""
    return training_step(system, step, setting.dtype, setting.device) if work.train else step.run


def _first_runs(setting, work, system, images, clock: Clock, measured: Measured) -> list[torch.Tensor] | None:
    """Warm-up and memory; returns the features of the first order of the images, on the device."""
    cuda = setting.device.type == "cuda"
    release(setting.device)
    before = (
        (torch.cuda.memory_allocated(setting.device), torch.cuda.memory_reserved(setting.device)) if cuda else (0, 0)
    )
    start, least, most = time.perf_counter(), *WARM_UPS
    with torch.set_grad_enabled(work.train), recorded_backend(system):
        for turn in range(most):
            run = prepared(setting, work, system, system.prepare(reordered(images, -1 - turn)))
            graphs = compiled_so_far()
            clock(run)
            if turn + 1 >= least and compiled_so_far() == graphs:
                break
    if system.packed:
        measured.backend = system.backend
    measured.warm_up_seconds = time.perf_counter() - start
    del run
    with torch.set_grad_enabled(work.train):
        step = system.prepare(images)
        run = prepared(setting, work, system, step)
        system.model.zero_grad(set_to_none=True)
        if cuda:
            release(setting.device)
            torch.cuda.reset_peak_memory_stats(setting.device)
        run()
        clock.wait()
    if cuda:
        measured.allocated = torch.cuda.max_memory_allocated(setting.device) - before[0] + system.weight_bytes
        measured.reserved = torch.cuda.max_memory_reserved(setting.device) - before[1] + system.weight_bytes
    if not system.same_weights:
        return None
    with torch.no_grad():
        return [x.clone() for x in step.features(step.run())]


def _rounds(setting, work, running, images, clock: Clock, rounds: int, until: float, result: Result) -> None:
    peak, peak_ms = PeakMatmul(setting.device), []
    for _ in range(LEAST_ROUNDS):
        clock(peak.run)
    with without_collections():
        for turn in range(rounds):
            if turn >= LEAST_ROUNDS and time.monotonic() > until:
                break
            order = reordered(images, turn)
            first = turn % len(running) if running else 0  # so that not always the same one follows the matmul
            for system, measured in running[first:] + running[:first]:
                try:
                    with torch.set_grad_enabled(work.train):
                        run = prepared(setting, work, system, system.prepare(order))
                        measured.ms += turn_of(clock, run, measured.host_ms)
                except torch.cuda.OutOfMemoryError:
                    if system.packed:
                        raise
                    measured.ms, measured.note = [], "out of memory"
                    running.remove((system, measured))
                system.model.zero_grad(set_to_none=True)
            peak_ms.append(clock(peak.run))
            result.rounds = turn + 1
    result.peak = peak.flops_per_second(statistics.median(peak_ms))
