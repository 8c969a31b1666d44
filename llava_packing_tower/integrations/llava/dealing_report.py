"""What dealing did for a run, and how far its predicted costs were from measured times. Nothing is dealt by these."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from ...multimodal.dealing import error_of, fit_of

KEPT = 2000
WARM_UP, FEWEST = 3, 10


@dataclass
class Dealings:
    """By cost, the part of the ranks' time that is work: in the host's order and as dealt, summed over windows."""

    windows: int = 0
    before: float = 0.0
    after: float = 0.0

    def count(self, before: float, after: float) -> None:
        self.windows, self.before, self.after = self.windows + 1, self.before + before, self.after + after


@dataclass
class StepTimes:
    """Predicted costs of the training steps of one rank beside measured seconds, without those of the first steps.

    On CUDA by events, which are read when they are over: nothing waits.
    """

    measured: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=KEPT))
    begun: int = 0
    _running: deque = field(default_factory=deque)

    @contextlib.contextmanager
    def measuring(self, cost: float, device: torch.device) -> Iterator[None]:
        self.begun += cost > 0
        if cost <= 0 or self.begun <= WARM_UP:
            yield
            return
        if device.type != "cuda":
            start = time.perf_counter()
            yield
            self.measured.append((cost, time.perf_counter() - start))
            return
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        yield
        events[1].record()
        self._running.append((cost, *events))
        self._read()

    def _read(self) -> None:
        while self._running and self._running[0][2].query():
            cost, start, end = self._running.popleft()
            self.measured.append((cost, start.elapsed_time(end) / 1000))

    def error(self) -> float | None:
        """How far the measured seconds were from those that costs predict, as a part of them; None for too few."""
        self._read()
        if len(self.measured) < FEWEST:
            return None
        return error_of(*zip(*self.measured))

    def fitted(self) -> tuple[float, float] | None:
        """Seconds of a step without any cost, and of one unit of it, by least squares: the first is 0 where the formula
        is right."""
        return fit_of(*zip(*self.measured)) if len(self.measured) >= FEWEST else None


def describe(seen: Dealings, times: StepTimes) -> str | None:
    """One line for the log; None where nothing was dealt by cost."""
    if not seen.windows:
        return None
    before, after = (round(100 * part / seen.windows) for part in (seen.before, seen.after))
    line = f"dealing: by cost, ranks work {after} % of a step ({before} % in LLaVA's order)"
    error = times.error()
    if error is None:
        return line
    line += f"; costs are {100 * error:.0f} % off the measured times"
    fitted = times.fitted()
    return (
        line if fitted is None else f"{line} ({fitted[0]:+.3f} s a step, {1e6 * fitted[1]:.3f} s for 10^15 operations)"
    )
