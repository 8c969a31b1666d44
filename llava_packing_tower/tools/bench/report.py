"""The output of a run: tables, JSON, figure."""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from ...utils.files import write_aside, write_text
from .targets import Verdict, ratio, verdicts
from .timing import Measured, Result

PACKAGES = (
    "llava-packing-tower",
    "torch",
    "transformers",
    "triton",
    "flash-attn",
    "fa3-fwd",
    "flash-attn-4",
    "timm",
    "einops",
    "numpy",
)
GIB = 1 << 30


def console() -> Console:
    return Console() if sys.stdout.isatty() else Console(width=150)


def environment(device: torch.device, argv: Sequence[str]) -> dict:
    """What a reader needs to repeat the run."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    versions["torch"] = torch.__version__
    cuda = device.type == "cuda"
    versions["cuda"] = torch.version.cuda if cuda else None
    versions["cudnn"] = torch.backends.cudnn.version() if cuda else None
    return {
        "command": shlex.join(argv),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device) if cuda else f"CPU, {torch.get_num_threads()} threads",
        "versions": versions,
        "settings": {name: value for name, value in os.environ.items() if name.startswith("LLAVA_PACKING_")},
    }


def _number(value: float | None, form: str, otherwise: str = "-") -> str:
    return otherwise if value is None else format(value, form)


def _bytes(value: int | None) -> str:
    return _number(None if value is None else value / GIB, ".2f")


def show(result: Result, out: Console, judge: bool) -> None:
    """The table of one workload and, if ``judge``, its targets."""
    work = result.work
    title = f"{result.title}, {work.name}, {'forward + backward' if work.train else 'forward'}"
    size = f"{len(work.grids)} images, {work.tokens} tokens, {result.flops / 1e12:.3g} useful TFLOP"
    out.print(f"\n[bold]{title}[/bold]: {size}")
    if result.note:
        out.print(f"  {result.note}")
        return
    packed = next((s for s in result.systems if s.packed), None)
    table = Table("system", box=None, pad_edge=False)
    for heading in (
        "ms",
        "min to max",
        "host ms",
        "tokens/ms",
        "MFU",
        "peak GiB",
        "speedup",
        "lowest cosine",
        "attention",
    ):
        table.add_column(heading, justify="right")
    for system in result.systems:
        faster = ratio(result, packed, system.name) if packed and not system.packed else None
        if not system.ms:
            continue
        table.add_row(
            system.name,
            _number(system.median, ".2f"),
            f"{min(system.ms):.2f} to {max(system.ms):.2f}",
            _number(system.host_median, ".2f"),
            _number(work.tokens / system.median if system.median else None, ".0f"),
            _number(result.mfu(system), ".2f"),
            _bytes(system.allocated),
            _number(faster, ".2f", "") + (" x" if faster else ""),
            _number(system.lowest_cosine, ".5f"),
            system.backend or "",
        )
    out.print(table)
    for system in result.systems:
        if system.note:
            out.print(f"  {system.name}: {system.note}", markup=False)
    out.print(f"  peak matmul {result.peak / 1e12:.3g} TFLOP/s, {result.rounds} interleaved rounds")
    if judge:
        show_verdicts(verdicts(result), out)


def show_verdicts(found: Sequence[Verdict], out: Console) -> None:
    """A colored line for each."""
    for verdict in found:
        style = {True: "green", False: "red", None: "yellow"}[verdict.met]
        out.print(f"  [{style}]{verdict}[/{style}]")


def verdict_record(verdict: Verdict) -> dict:
    """One target as JSON types."""
    found = {
        "system": verdict.system,
        "target": str(verdict),
        "asked": verdict.target.value,
        "measured": verdict.measured,
        "met": verdict.met,
    }
    return {**found, "draws": list(verdict.draws), "drawn": verdict.drawn} if verdict.draws else found


def _system_record(result: Result, system: Measured) -> dict:
    median = system.median
    return {
        "name": system.name,
        "packed": system.packed,
        "ms": median,
        "host_ms": system.host_median,
        "ms_of_each_round": [round(ms, 4) for ms in system.ms],
        "tokens_per_ms": result.work.tokens / median if median else None,
        "mfu": result.mfu(system),
        "peak_allocated_bytes": system.allocated,
        "peak_reserved_bytes": system.reserved,
        "lowest_cosine_to_packed": system.lowest_cosine,
        "attention_backend": system.backend,
        "warm_up_seconds": system.warm_up_seconds,
        "note": system.note,
    }


def record(result: Result, judge: bool) -> dict:
    """One workload as JSON types."""
    packed = [s for s in result.systems if s.packed]
    return {
        "family": result.family,
        "model": result.title,
        "work": result.work.label,
        "grids": [list(grid) for grid in result.work.grids],
        "tokens": result.work.tokens,
        "useful_flops": result.flops,
        "peak_matmul_flops_per_second": result.peak,
        "rounds": result.rounds,
        "note": result.note,
        "systems": [_system_record(result, s) for s in result.systems],
        "times_faster": {
            s.name: {other.name: ratio(result, s, other.name) for other in result.systems if not other.packed}
            for s in packed
        },
        "targets": [verdict_record(v) for v in (verdicts(result) if judge else ())],
    }


def write_json(content: dict, file: Path) -> None:
    """The file appears whole, by rename."""
    write_text(file, json.dumps(content, indent=1) + "\n")


def save_figure(figure, file: Path) -> None:
    kind = file.suffix.lstrip(".") or "png"
    write_aside(file, partial(figure.savefig, dpi=150, bbox_inches="tight", format=kind))


def new_figure(columns: int, rows: int = 1, size: tuple[float, float] = (6.0, 3.6)):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(rows, columns, figsize=(size[0] * columns, size[1] * rows), squeeze=False)


def plot(results: Sequence[Result], file: Path, caption: str) -> None:
    """Bars of tokens per millisecond, one panel per workload, MFU at each bar's end."""
    results = [r for r in results if any(s.ms for s in r.systems)]
    figure, axes = new_figure(1, max(len(results), 1), (9.0, 2.4))
    for axis, result in zip(axes[:, 0], results):
        systems = [s for s in result.systems if s.ms][::-1]
        rates = [result.work.tokens / s.median for s in systems]
        bars = axis.barh(
            [s.name for s in systems], rates, color=["#1a7f5a" if s.packed else "#9aa5b1" for s in systems]
        )
        axis.bar_label(bars, [f" {rate:.0f}, MFU {result.mfu(s):.2f}" for rate, s in zip(rates, systems)], fontsize=8)
        axis.set_title(f"{result.title}, {result.work.label}: {result.work.tokens} tokens", fontsize=10, loc="left")
        axis.set_xlim(0, max(rates) * 1.3)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    axes[-1, 0].set_xlabel(f"tokens per millisecond ({caption})", fontsize=8)
    figure.tight_layout()
    save_figure(figure, file)


def plot_scaling(series: Sequence[dict], file: Path, caption: str) -> None:
    """Tokens per second over images per batch and over tokens per image, with and without attention."""
    figure, axes = new_figure(len(series))
    for axis, line in zip(axes[0], series):
        done = [p for p in line["points"] if p["ms"]]
        x = [p[line["over"]] for p in done]
        axis.plot(x, [p["tokens"] / p["ms"] for p in done], "o-", color="#1a7f5a", label="all")
        rest = [p["ms"] - p["attention_ms"] for p in done]
        axis.plot(
            x,
            [p["tokens"] / ms if ms > 0 else math.nan for p, ms in zip(done, rest)],
            "s--",
            color="#9aa5b1",
            label="without attention",
        )
        axis.set_xscale("log", base=2)
        axis.set_ylim(bottom=0)
        axis.set_xlabel(line["title"])
        axis.set_ylabel("thousand tokens per second")
        axis.legend()
    figure.suptitle(caption, fontsize=8)
    figure.tight_layout()
    save_figure(figure, file)
