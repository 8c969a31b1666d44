"""The table of training steps on the screen and as a figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ..report import new_figure, save_figure, show_verdicts
from .rows import STOCK, Verdict


def in_short(row: dict) -> str:
    """A row in one line."""
    if "ms" not in row:
        return str(row.get("failure"))
    return f"{row['samples/s']:.1f} samples/s, {row['ms']:.0f} ms, {row['peak GiB']:.1f} GiB"


def _times_stock(name: str, row: dict, rows: dict) -> str:
    base = rows.get("stock", {}).get("samples/s")
    comparable = base and "samples/s" in row and not name.startswith("7b") and name != "stock"
    return f"{row['samples/s'] / base:.2f} x" if comparable else ""


def show(content: dict, found: Sequence[Verdict], out: Console) -> None:
    """All rows, then the targets where they are about this device and these sizes."""
    rows = content["rows"]
    peak = content["matmul TFLOP/s"]
    out.print(
        f"\n{content['host']}, {content['device']}: forward + backward, {content['rounds']} interleaved rounds, "
        f"matmul {peak:.3g} TFLOP/s" + (", tiny models: the times mean nothing" if content["tiny"] else "")
    )
    table = Table("row", "what", box=None, pad_edge=False)
    for column in ("batch", "ms", "samples/s", "MFU", "peak GiB", "tokens", "padded to", "x stock"):
        table.add_column(column, justify="right")
    for name, row in rows.items():
        batch = f"{row['samples']}{'c' if row['checkpointing'] else ''}"
        if "ms" not in row:
            table.add_row(name, row["title"], batch, str(row["failure"])[:60])
            continue
        numbers = (f"{row['ms']:.0f}", f"{row['samples/s']:.1f}", f"{row['MFU']:.3f}", f"{row['peak GiB']:.1f}")
        counts = (f"{row['tokens']:.0f}", f"{row['padded to']:.0f}", _times_stock(name, row, rows))
        table.add_row(name, row["title"], batch, *numbers, *counts)
    out.print(table)
    out.print("batch: samples of the micro-batch; c: with checkpointing")
    if content["targets"]:
        show_verdicts(found, out)


def plot(content: dict, file: Path) -> None:
    """Bars of samples per second, with MFU and memory at their ends. The decoder alone has another unit: left out."""
    rows = {name: row for name, row in content["rows"].items() if "samples/s" in row and not name.startswith("7b")}
    figure, axes = new_figure(1, 1, (9.0, 0.8 + 0.4 * max(len(rows), 1)))
    axis = axes[0, 0]
    names = list(rows)[::-1]
    rates = [rows[name]["samples/s"] for name in names]
    labels = [f"{rows[name]['title']} ({rows[name]['samples']})" for name in names]
    places = range(len(names))
    colors = ["#9aa5b1" if rows[name]["model"] == STOCK else "#1a7f5a" for name in names]
    bars = axis.barh(places, rates, color=colors)
    axis.set_yticks(places, labels)
    ends = [f" {rows[n]['samples/s']:.1f}, MFU {rows[n]['MFU']:.2f}, {rows[n]['peak GiB']:.0f} GiB" for n in names]
    axis.bar_label(bars, ends, fontsize=8)
    axis.set_xlim(0, max(rates, default=1.0) * 1.4)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)
    axis.set_xlabel(
        f"samples per second, forward and backward ({content['device']}; in brackets: samples of a micro-batch)",
        fontsize=8,
    )
    figure.tight_layout()
    save_figure(figure, file)
