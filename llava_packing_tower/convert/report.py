"""The output of `convert` and `verify`: what is converted into what, what does not fit, the results of the tests."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

import rich.markup
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from ..utils.console import plain_console
from .plan import Conversion, WriteReport
from .verify import TestResult

KIND_NAMES = {
    "llava_vit": "standard LlavaViT",
    "onevision_encoder": "OneVision encoder",
    "llava_vit_source": "LlavaViT training checkpoint",
    "llava_vit_packing": "packing LlavaViT",
}
_WORDS = {True: "[green]PASS[/]", False: "[bold red]FAIL[/]", None: "[yellow]SKIPPED[/]"}


def make_console(stderr: bool = False) -> Console:
    """To standard output, or for errors; wide enough for tensor names where that is not a terminal."""
    return plain_console(160, markup=True, highlight=False, stderr=stderr)


def progress_bars(console: Console) -> Progress:
    """Bars with the share that is done and the time left."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def announce(console: Console, bars: Progress, task: TaskID, what: str) -> None:
    """Advance the progress bar of the verification; without a terminal, print a line per step."""
    bars.update(task, description=f"verifying, {what}", visible=True, advance=1)
    if not console.is_terminal:
        console.print(f"  verifying, {what}", markup=False, soft_wrap=True)


def print_plan(console: Console, conversion: Conversion) -> None:
    """What was found and what it becomes, and everything that is left out."""
    source, config = conversion.source, conversion.config
    kind = KIND_NAMES.get(source.kind, source.kind)
    shapes = source.files.shapes()
    console.print(f"[bold]{rich.markup.escape(source.name)}[/]: {kind}, {len(shapes)} tensors")
    sizes = ", ".join(
        f"{label} {getattr(config, name)}"
        for label, name in (
            ("patch", "patch_size"),
            ("width", "hidden_size"),
            ("layers", "num_hidden_layers"),
            ("heads", "num_attention_heads"),
            ("MLP", "intermediate_size"),
            ("eps", "layer_norm_eps"),
            ("theta", "rope_theta"),
            ("image", "image_size"),
        )
        if getattr(config, name, None) is not None
    )
    target = KIND_NAMES.get(config.model_type, config.model_type)
    dtype = str(conversion.dtype).removeprefix("torch.")
    console.print(
        f"  becomes {target}, {len(conversion.specs)} tensors, {dtype}, {conversion.nbytes / 1e9:.3f} GB: {sizes}"
    )
    for name, value in conversion.config_dropped.items():
        console.print(f"  config field that the result does not have: {name} = {value!r}", markup=False, soft_wrap=True)
    reasons = Counter({**source.ignored, **conversion.plan.dropped}.values())
    for reason, count in reasons.items():
        names = [name for name, why in {**source.ignored, **conversion.plan.dropped}.items() if why == reason]
        more = f" and {count - 4} more" if count > 4 else ""
        console.print(f"  left out ({reason}): {', '.join(names[:4])}{more}", markup=False, soft_wrap=True)


def print_problems(console: Console, message: str, rows: Iterable[tuple[str, str, str]]) -> None:
    """The table of tensors that do not fit, all of them."""
    rows = list(rows)
    counts = ", ".join(f"{count} {kind}" for kind, count in Counter(kind for kind, _, _ in rows).items())
    table = Table("problem", "tensor", "detail", title=counts, title_justify="left")
    for column in table.columns:
        column.overflow = "fold"
    for row in rows:
        table.add_row(*(rich.markup.escape(cell) for cell in row))
    console.print(message, markup=False, soft_wrap=True)
    console.print(table)


def print_written(console: Console, report: WriteReport) -> None:
    pace = f" ({report.seconds_per_gb:.1f} s per GB)" if report.nbytes >= 1e8 else ""  # below: mostly opening files
    console.print(
        f"  converted {report.nbytes / 1e9:.3f} GB in {report.seconds:.1f} s{pace}, "
        f"peak memory {report.peak_memory / 1e9:.2f} GB"
    )


def _number(value: float | None, form: str) -> str:
    return "" if value is None else "NaN" if math.isnan(value) else format(value, form)


def print_results(console: Console, results: Iterable[TestResult], threshold: float) -> None:
    """The table of the tests."""
    table = Table(title=f"verification (minimum cosine above {threshold})", title_justify="left")
    table.add_column("test")
    for title in ("vectors", "min cosine", "mean cosine", "max difference"):
        table.add_column(title, justify="right")
    table.add_column("")
    table.add_column("", overflow="fold")
    for row in results:
        numbers = (_number(row.min_cosine, ".8f"), _number(row.mean_cosine, ".8f"), _number(row.max_difference, ".2e"))
        table.add_row(row.name, _number(row.vectors, "d"), *numbers, _WORDS[row.passed], rich.markup.escape(row.note))
    console.print(table)
