"""A profile of a few training steps, and what it says of the time.

The steps are run twice: first as they are, for how long they take, then with torch's profiler on rank 0, which slows
the host, for what the GPU did in them.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import Trainer, TrainerCallback

from ...utils.files import write_aside
from ...utils.kernel_times import COLLECTIVES, KINDS, OTHER, busy_time, is_range, kind_of
from .speed import SpeedLog
from .speed_report import Speed, total

logger = logging.getLogger(__name__)

FOLDER = "profile"
SETTLING = 5  # steps before those that count


@dataclass(frozen=True)
class Kernels:
    """What ran in a profile, in seconds of one step: by kind, all together (``busy``), and without collectives
    (``computing``). On a CPU, operators by the time that they spend themselves."""

    by_kind: Mapping[str, float]
    busy: float
    computing: float


def kernels_of(profiler: torch.profiler.profile, cuda: bool, steps: int) -> Kernels:
    """Read a profile of so many steps."""
    by_kind = {kind: 0.0 for kind, _ in KINDS}
    if not cuda:
        for event in profiler.key_averages():
            by_kind[kind_of(event.key)] += event.self_cpu_time_total / 1e6 / steps
        busy = sum(by_kind.values())
        return Kernels(by_kind, busy, busy - by_kind[COLLECTIVES])
    spans: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA and not is_range(event):
            kind = kind_of(event.name)
            by_kind[kind] += event.time_range.elapsed_us() / 1e6 / steps
            spans[kind == COLLECTIVES].append((event.time_range.start, event.time_range.end))
    computing = busy_time(spans[False]) / 1e6 / steps
    return Kernels(by_kind, busy_time([*spans[False], *spans[True]]) / 1e6 / steps, computing)


def shares(kernels: Kernels, step: float, data: float, ranks: float) -> dict[str, float]:
    """The parts of a step's time that sum up to it.

    step: seconds; data, ranks: of these, waiting for data and for the slowest rank (from the log of the same steps).
    Collectives count where nothing is computed beside them.
    """
    collectives = kernels.busy - kernels.computing
    idle = max(step - kernels.busy, 0.0)
    ranks = min(ranks, step)
    found = {
        "data": min(data, idle),
        "host launches": max(idle - data, 0.0),
        "the slowest rank": ranks,
        "collectives": max(collectives - ranks, 0.0),
        "kernels": kernels.computing,
    }
    whole = sum(found.values())
    return {name: value / whole for name, value in found.items()} if whole else found


ADVICE = {
    "data": "more dataloader_num_workers, or smaller images",
    "host launches": "larger micro-batches, or liger-kernel: the GPU waits for Python",
    "the slowest rank": "samples of other sizes on each rank: see mm_packing_balance",
    "collectives": "fewer or larger collectives: a lower ZeRO stage, or larger micro-batches",
    "kernels": "the device is busy",
    "Python": "larger micro-batches: it runs between the operators",
    "operators": "the processor is busy",
}
ON_A_CPU = {"host launches": "Python", "kernels": "operators"}
"""What two of the parts are called without a GPU, where nothing is launched."""


def describe(kernels: Kernels, step: float, data: float, ranks: float, cuda: bool) -> list[str]:
    """Three lines about where the time of a step goes."""
    found = shares(kernels, step, data, ranks)
    named = {} if cuda else ON_A_CPU
    words = ", ".join(f"{named.get(name, name)} {share:.0%}" for name, share in found.items())
    kinds = {kind: spent for kind, spent in kernels.by_kind.items() if kind != COLLECTIVES}
    total = sum(kinds.values()) or 1.0
    order = sorted(kinds, key=lambda kind: -kinds[kind])
    parts = ", ".join(f"{'other (norms, elementwise)' if k == OTHER else k} {kinds[k] / total:.0%}" for k in order)
    largest = max(found, key=lambda name: found[name])
    what = named.get(largest, largest) + (f", mostly {order[0]}" if largest == "kernels" else "")
    advice = ADVICE[named.get(largest, largest)]
    return [
        f"profile: a step takes {step * 1e3:.0f} ms: {words}",
        f"profile: {'GPU kernels' if cuda else 'operators'}: {parts}",
        f"profile: bound by {what} ({advice})",
    ]


class Profile(TrainerCallback):
    """Profiles ``steps`` steps of a training, once it has settled. Raises ``ValueError`` for less than one step."""

    def __init__(self, trainer: Trainer, speed: SpeedLog, steps: int) -> None:
        if steps < 1:
            raise ValueError(f"mm_packing_profile must be at least 1 step, got {steps}")
        self.trainer, self.speed, self.asked = trainer, speed, steps
        self.cuda = trainer.args.device.type == "cuda"
        self.profiler: torch.profiler.profile | None = None
        self.plain: Speed | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        left = state.max_steps - state.global_step
        if left < 3 and state.is_world_process_zero:
            logger.warning("profile: %d steps are too few for one: at least 3 are needed", left)
        settling = min(SETTLING, max(left - 2 * self.asked, 1))
        self.steps = min(self.asked, (left - settling) // 2)
        # The last steps of: settling, as they are, profiled.
        self.settled = state.global_step + settling
        self.measured, self.end = self.settled + self.steps, self.settled + 2 * self.steps

    def on_step_begin(self, args, state, control, **kwargs):
        if self.measured <= state.global_step < self.end:
            self.speed.disturbed = True  # in each of them: a log that is due in between is another window
        if state.global_step == self.measured and self.steps > 0:
            windows = [window for window in self.speed.windows if self.settled < window.step <= self.measured]
            self.plain = total(windows) if windows else None
            if state.is_world_process_zero:
                activities = [torch.profiler.ProfilerActivity.CPU]
                activities += [torch.profiler.ProfilerActivity.CUDA] * self.cuda
                self.profiler = torch.profiler.profile(activities=activities)
                self.profiler.start()

    def on_step_end(self, args, state, control, **kwargs):
        if self.steps > 0 and state.global_step in (self.settled, self.measured, self.end):
            control.should_log = True  # on every rank: what is logged then is of these steps alone
        if state.global_step == self.end and self.profiler is not None:
            self._finish(args)

    def on_train_end(self, args, state, control, **kwargs):
        if self.profiler is not None:  # stopped early
            self.profiler.stop()

    def _finish(self, args) -> None:
        if self.cuda:
            torch.cuda.synchronize()
        profiler, self.profiler = self.profiler, None
        profiler.stop()
        file = Path(args.output_dir) / FOLDER / f"rank0_steps_{self.measured + 1}_to_{self.end}.json.gz"
        write_aside(file, lambda aside: profiler.export_chrome_trace(str(aside)))
        lines = [f"profile: {file} (chrome://tracing or https://ui.perfetto.dev)"]
        if self.plain is not None:
            step, data, ranks = (
                value / self.steps for value in (self.plain.seconds, self.plain.data, self.plain.ranks)
            )
            lines += describe(kernels_of(profiler, self.cuda, self.steps), step, data, ranks, self.cuda)
        print("\n".join(lines), flush=True)
