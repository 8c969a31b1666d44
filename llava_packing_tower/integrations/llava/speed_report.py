"""The speed of a training in numbers: of all ranks together, in words, as a table and as a figure."""

from __future__ import annotations

import csv
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ...utils.files import write_aside
from ...utils.say import say

if TYPE_CHECKING:
    from .speed_meter import Share

logger = logging.getLogger(__name__)

TABLE, PICTURE = "speed.csv", "speed.png"
SETTLED = 10
"""Steps at the start of a run that the figures of the whole run leave out: kernels are built, caches are empty."""
COLUMNS = (
    "samples_per_second",
    "visual_tokens_per_second",
    "text_tokens_per_second",
    "mfu",
    "peak_memory_gib",
    "data_wait",
    "rank_wait",
    "seconds_left",
)


@dataclass(frozen=True)
class Speed:
    """A window of a training, over all ranks.

    step: the last one in it; flops, peak: operations, and operations per second, of all ranks together; memory: GiB of
    the rank that had the most so far; data, ranks: seconds that a rank on average waited in the data loader, and for
    the slowest rank.
    """

    step: int
    seconds: float
    samples: int
    visual: int
    text: int
    flops: float
    peak: float | None
    memory: float
    data: float
    ranks: float

    def log(self, left: float | None) -> dict[str, float]:
        """What goes into the trainer's log. Shares are of the time; ``left``: seconds until the end."""
        found = {
            "samples_per_second": self.samples / self.seconds,
            "visual_tokens_per_second": self.visual / self.seconds,
            "text_tokens_per_second": self.text / self.seconds,
        }
        if self.peak and self.flops:
            found["mfu"] = self.flops / self.seconds / self.peak
        if self.memory:
            found["peak_memory_gib"] = self.memory
        found |= {"data_wait": self.data / self.seconds, "rank_wait": self.ranks / self.seconds}
        if left is not None:
            found["seconds_left"] = left
        return {name: round(value, 4 if value < 10 else 1) for name, value in found.items()}


def combine(shares: Sequence[Share], step: int, peak: float | None) -> Speed:
    """The window of all ranks.

    All ranks meet at the end of each step (:class:`.speed_meter.Share`), so a step takes as long as on the slowest
    rank. A rank's own time for it is what it waited for data, and ``work`` times a factor: forward passes stand for all
    that is computed. The factor is such that the steps of the slowest ranks fill the window.
    """
    ranks, seconds = len(shares), max(share.seconds for share in shares)
    waits = list(zip(*(share.waits for share in shares)))
    work = list(zip(*(share.work for share in shares)))
    longest_waits, longest_work = sum(map(max, waits)), sum(map(max, work))
    factor = max(seconds - longest_waits, 0.0) / longest_work if longest_work else 0.0
    slowest = 0.0
    for waited, worked in zip(waits, work):
        own = [w + factor * x for w, x in zip(waited, worked)]
        slowest += max(own) - sum(own) / ranks
    return Speed(
        step=step,
        seconds=seconds,
        samples=sum(share.samples for share in shares),
        visual=sum(share.visual for share in shares),
        text=sum(share.text for share in shares),
        flops=sum(share.flops for share in shares),
        peak=peak * ranks if peak else None,
        memory=max(share.memory for share in shares),
        data=sum(map(sum, waits)) / ranks,
        ranks=slowest,
    )


def over_the_run(windows: Sequence[Speed], first: int) -> Speed:
    """All windows together, without those that begin in the first :data:`SETTLED` steps after step ``first`` (without
    the first one, in a shorter run)."""
    begins = [first, *(window.step for window in windows)]
    kept = [window for window, begin in zip(windows, begins) if begin - first >= SETTLED]
    return total(kept or windows[1:] or windows)


def total(windows: Sequence[Speed]) -> Speed:
    """Several windows as one."""
    names = ("seconds", "samples", "visual", "text", "flops", "data", "ranks")
    return Speed(
        step=windows[-1].step,
        peak=windows[-1].peak,
        memory=max(window.memory for window in windows),
        **{name: sum(getattr(window, name) for window in windows) for name in names},
    )


def in_words(log: Mapping[str, float]) -> str:
    """A log's figures in one line; nothing for a log without them."""
    if "samples_per_second" not in log:
        return ""
    tokens = f"{_short(log['visual_tokens_per_second'])} visual + {_short(log['text_tokens_per_second'])} text tokens/s"
    words = [f"{log['samples_per_second']:.1f} samples/s", tokens]
    words += [f"MFU {log['mfu']:.2f}"] if "mfu" in log else []
    words += [f"{log['peak_memory_gib']:.1f} GiB"] if "peak_memory_gib" in log else []
    words += [f"waits: data {log['data_wait']:.0%}, ranks {log['rank_wait']:.0%}"]
    return "  ".join(words)


def _short(number: float) -> str:
    return f"{number / 1e3:.0f}k" if number >= 10e3 else f"{number:.0f}"


def write_report(folder: str | Path, history: Sequence[Mapping[str, float]], basis: str) -> None:
    """``speed.csv`` with a row for each log that has a speed and, with matplotlib, ``speed.png``.

    history: ``log_history`` of the trainer's state; basis: what MFU is measured against.
    """
    rows = [log for log in history if "samples_per_second" in log]
    if not rows:
        return
    columns = ["step", "loss", *(name for name in COLUMNS if any(name in row for row in rows))]

    def write(aside: Path) -> None:
        with aside.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)

    folder = Path(folder)
    write_aside(folder / TABLE, write)
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        say(logger, "speed: %s has the table; %s needs matplotlib", folder / TABLE, PICTURE)
        return
    write_aside(folder / PICTURE, lambda aside: _plot(rows, basis, aside))
    say(logger, "speed: %s, %s", folder / TABLE, folder / PICTURE)


def _plot(rows: Sequence[Mapping[str, float]], basis: str, file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 7.5))
    top, middle, bottom = figure.subplots(3, 1, sharex=True)
    steps = [row["step"] for row in rows]
    top.plot(steps, [row["samples_per_second"] for row in rows], color="#1a7f5a")
    top.set_ylabel("samples/s")
    middle.stackplot(
        steps,
        [row["text_tokens_per_second"] / 1e3 for row in rows],
        [row["visual_tokens_per_second"] / 1e3 for row in rows],
        labels=("text", "visual"),
        colors=("#9aa5b1", "#1a7f5a"),
    )
    middle.set_ylabel("thousand tokens/s")
    bottom.plot(steps, [row["data_wait"] for row in rows], color="#c2571a", label="waits for data")
    bottom.plot(steps, [row["rank_wait"] for row in rows], color="#6b4fa0", label="waits for the slowest rank")
    if any("mfu" in row for row in rows):
        bottom.plot(steps, [row.get("mfu", float("nan")) for row in rows], color="#1a7f5a", label="MFU")
    bottom.set_ylabel("share")
    bottom.set_xlabel(f"step ({basis})", fontsize=8)
    for axis in (top, middle, bottom):
        axis.set_ylim(bottom=0)
        axis.spines[["top", "right"]].set_visible(False)
    middle.legend(fontsize=8)
    bottom.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=120, format="png")
