"""Results of lmms-eval, read from its JSON, as a Markdown table and as a chart, for one run or several."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from ..utils.files import read_json, write_aside, write_text

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
    ok = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    return float(value) if ok else None


def read_task(file: Path, task: str) -> TaskResult:
    """A task's numbers; of a group of tasks that has none of its own, those of its parts (``part/metric``)."""
    content = read_json(file, hook=None)
    found, counts = _tables(content, "results", file), _tables(content, "n-samples", file)
    names = [task]
    if not _metrics(found.get(task, {})):
        names = [name for name in found if name != task]
    metrics = {}
    for name in names:
        prefix = "" if name == task else f"{name}/"
        metrics.update({prefix + metric: value for metric, value in _metrics(found.get(name, {})).items()})
    parts = [task] if task in counts else [name for name in counts if name != task]
    samples = [counts[name].get("effective") or 0 for name in parts]
    if not all(type(count) is int and count >= 0 for count in samples):
        raise ValueError(f"{file}: n-samples must be whole numbers, got {samples!r:.80}")
    return TaskResult(task, metrics, sum(samples))


def _tables(content: Mapping[str, object], key: str, file: Path) -> dict[str, dict]:
    """A mapping of mappings in a results file; empty where it is not there. Raises ``ValueError`` for anything else."""
    found = content.get(key, {})
    if not isinstance(found, dict) or not all(isinstance(value, dict) for value in found.values()):
        raise ValueError(f"{file}: {key} must be a mapping of mappings, got {found!r:.80}")
    return found


def read_marker(marker: Path) -> tuple[str, Path, object]:
    """Task, results file and key of a task that `llava-packing eval` has completed.

    Raises ``ValueError`` for a damaged mark, and for one that names a file outside of its folder or none at all.
    """
    content = read_json(marker)
    task, name = content.get("task"), content.get("results")
    for key, value in (("task", task), ("results", name)):
        if not isinstance(value, str):
            raise ValueError(f"{marker}: {key} is {value!r:.80}, it should be a text")
    folder = os.path.realpath(marker.parent)
    try:
        file = os.path.realpath(os.path.join(folder, name))
    except ValueError:  # it is no name of a file at all
        file = ""
    if not file.startswith(f"{folder}{os.sep}") or not os.path.isfile(file):
        raise ValueError(f"{marker}: results is {name!r:.80}, which is no file in {marker.parent}")
    return task, marker.parent / name, content.get("key")


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
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    results: dict[str, TaskResult] = {}
    if markers := sorted(folder.glob(f"*/{DONE}")):
        for marker in markers:
            task, file, _ = read_marker(marker)
            results[task] = read_task(file, task)
        return results
    for file in sorted(filter(Path.is_file, folder.rglob(RESULTS)), key=lambda f: f.stat().st_mtime):
        for task in _tables(read_json(file, hook=None), "results", file):
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
