"""Results of lmms-eval, read from its JSON, as a Markdown table and as a chart, for one run or several."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from ..utils.files import write_aside, write_text

DONE = "done.json"
RESULTS = "*_results.json"


@dataclass(frozen=True)
class TaskResult:
    """One task of one run: metric -> (value, standard error or None), the number of samples, or why there is none."""

    task: str
    metrics: Mapping[str, tuple[float, float | None]] = field(default_factory=dict)
    samples: int = 0
    error: str | None = None

    def headline(self) -> str:
        metric, (value, _) = next(iter(self.metrics.items()))
        return f"{metric} {value:.4g}, {self.samples} samples"


def _number(value: object) -> float | None:
    ok = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if ok else None


def read_task(file: Path, task: str) -> TaskResult:
    """A task's numbers; of a group of tasks that has none of its own, those of its parts (``part/metric``)."""
    content = json.loads(file.read_text(encoding="utf-8"))
    found, counts = content.get("results", {}), content.get("n-samples", {})
    names = [task]
    if not _metrics(found.get(task, {})):
        names = [name for name in found if name != task]
    metrics = {}
    for name in names:
        prefix = "" if name == task else f"{name}/"
        metrics.update({prefix + metric: value for metric, value in _metrics(found.get(name, {})).items()})
    parts = [task] if task in counts else [name for name in counts if name != task]
    return TaskResult(task, metrics, sum(int(counts[name].get("effective") or 0) for name in parts))


def _metrics(values: Mapping[str, object]) -> dict[str, tuple[float, float | None]]:
    """lmms-eval's keys are ``metric,filter`` and ``metric_stderr,filter``."""
    metrics = {}
    for key, value in values.items():
        metric, _, rest = key.partition(",")
        if "_stderr" in metric or not rest or (number := _number(value)) is None:
            continue
        name = metric if rest == "none" else f"{metric} ({rest})"
        metrics[name] = number, _number(values.get(f"{metric}_stderr,{rest}"))
    return metrics


def read_run(folder: Path) -> dict[str, TaskResult]:
    """The tasks that a folder of `llava-packing eval`, or of lmms-eval itself, has results of.

    Of several results of one task the newest counts. Raises ``ValueError`` for a folder without any.
    """
    results: dict[str, TaskResult] = {}
    if markers := sorted(folder.glob(f"*/{DONE}")):
        for marker in markers:
            content = json.loads(marker.read_text(encoding="utf-8"))
            results[content["task"]] = read_task(marker.parent / content["results"], content["task"])
        return results
    for file in sorted(folder.rglob(RESULTS), key=lambda f: f.stat().st_mtime):
        found = json.loads(file.read_text(encoding="utf-8")).get("results", {})
        for task in found:
            result = read_task(file, task)
            if result.metrics:
                results[task] = result
    if not results:
        raise ValueError(f"{folder} has no results of lmms-eval ({RESULTS})")
    return results


# ---------------------------------------------------------------- tables and charts


def table(runs: Mapping[str, Mapping[str, TaskResult]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: a row for each metric of each task, a column for each run. A task that failed says so."""
    header = ["task", "metric", "samples", *runs]
    rows = []
    for task in dict.fromkeys(task for run in runs.values() for task in run):
        here = {name: run[task] for name, run in runs.items() if task in run}
        counts = "/".join(dict.fromkeys(str(result.samples) for result in here.values() if result.error is None))
        metrics = dict.fromkeys(metric for result in here.values() for metric in result.metrics) or {"-": None}
        for metric in metrics:
            cells = [_cell(here.get(name), metric) for name in runs]
            rows.append([task, metric, counts or "-", *cells])
    return header, rows


def _cell(result: TaskResult | None, metric: str) -> str:
    if result is None:
        return "-"
    if result.error is not None:
        return "FAILED"
    value, error = result.metrics.get(metric, (None, None))
    if value is None:
        return "-"
    return f"{value:.4g}" if error is None else f"{value:.4g} ± {error:.2g}"


def markdown(runs: Mapping[str, Mapping[str, TaskResult]]) -> str:
    """The table, and below it the cause of each task that failed."""
    header, rows = table(runs)

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    lines = ["# Evaluation", "", line(header), line(["---"] * len(header)), *map(line, rows), ""]
    lines += [
        f"- {name}: {task} failed: {' '.join(result.error.split())}"
        for name, run in runs.items()
        for task, result in run.items()
        if result.error is not None
    ]
    return "\n".join(lines).rstrip() + "\n"


def draw(path: Path, runs: Mapping[str, Mapping[str, TaskResult]]) -> None:
    """A bar chart as PNG: a panel with an axis of its own for each task's first metric, a bar for each run."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = []
    for task in dict.fromkeys(task for run in runs.values() for task in run):
        metric = next((m for run in runs.values() if task in run for m in run[task].metrics), None)
        if metric is not None:
            panels.append((task, metric))
    columns = min(4, max(1, len(panels)))
    rows = max(1, math.ceil(len(panels) / columns))
    figure = Figure(figsize=(3.2 * columns, 2.8 * rows), dpi=110, layout="tight")
    FigureCanvasAgg(figure)
    for index, (task, metric) in enumerate(panels):
        axes = figure.add_subplot(rows, columns, index + 1)
        values = [_value(run, task, metric) for run in runs.values()]
        bars = axes.bar(
            range(len(runs)), [value or 0 for value in values], color=[f"C{i % 10}" for i in range(len(runs))]
        )
        axes.bar_label(bars, [f"{value:.3g}" if value is not None else "none" for value in values], fontsize=8)
        axes.set_xticks(range(len(runs)), list(runs), fontsize=7, rotation=20 if len(runs) > 1 else 0)
        low, high = min([0, *filter(None, values)]), max([0, *filter(None, values)])
        axes.set_ylim(low * 1.15, 1.12 if 0 <= high <= 1 else high * 1.15)
        axes.set_title(f"{task}: {metric}", fontsize=9)
    write_aside(path, partial(figure.savefig, format="png", bbox_inches="tight", pad_inches=0.1))


def _value(run: Mapping[str, TaskResult], task: str, metric: str) -> float | None:
    return run[task].metrics.get(metric, (None, None))[0] if task in run else None


def write_report(folder: Path, runs: Mapping[str, Mapping[str, TaskResult]]) -> list[Path]:
    """``results.md`` and, where matplotlib is installed and something was measured, ``results.png``."""
    from importlib.util import find_spec

    written = [folder / "results.md"]
    write_text(written[0], markdown(runs))
    measured = any(result.metrics for run in runs.values() for result in run.values())
    if measured and find_spec("matplotlib") is not None:
        written.append(folder / "results.png")
        draw(written[-1], runs)
    return written
