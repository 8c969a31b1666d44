"""The output of the demo: the table, the checks and the figures."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from rich import box
from rich.table import Table

from ...checkpoint.hashing import differing
from ...utils.files import write_aside, write_text
from .train_process import Engine

NEEDED = 0.8
"""Share of right answers below which the demo fails."""


@dataclass(frozen=True)
class Row:
    """One photo of the table. Sizes in pixels, grid in patches (rows, columns) as they reached the tower, tokens as the
    projector handed them to the decoder."""

    photo: str
    width: int
    height: int
    grid: tuple[int, int]
    tokens: int
    expected: str
    before: str
    after: str

    @property
    def patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def right(self) -> bool:
        return same_answer(self.after, self.expected)

    def cells(self) -> list[str]:
        """The table's columns as text for 80 characters; what a model wrote is cut to one short line."""
        return [
            Path(self.photo).stem,
            f"{self.width}x{self.height}",
            f"{self.grid[0]}x{self.grid[1]}={self.patches}",
            str(self.tokens),
            self.expected,
            shorten(self.before, 9),
            shorten(self.after, 12),
        ]


COLUMNS = ("photo", "size", "patches", "tokens", "expected", "before", "after")


def same_answer(answer: str, expected: str) -> bool:
    """Equal but for case, surrounding space and a full stop at the end."""
    return answer.strip().removesuffix(".").lower() == expected.lower()


def shorten(text: str, width: int) -> str:
    """One printable line of at most `width` characters; an untrained model writes anything."""
    line = "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))
    return line if len(line) <= width else line[: width - 3] + "..."


@dataclass(frozen=True)
class Check:
    """One thing that must hold, and the numbers it was judged by."""

    name: str
    passed: bool
    detail: str


def check_answers(rows: Sequence[Row]) -> Check:
    """At least NEEDED of the answers after training are right."""
    right = sum(row.right for row in rows)
    needed = math.ceil(NEEDED * len(rows))
    passed = bool(rows) and right >= needed
    return Check("answers", passed, f"{right} of {len(rows)} right after training, {needed} needed")


def check_reload(trained: Mapping[str, str], reloaded: Mapping[str, str]) -> Check:
    """Every tower tensor of the reloaded checkpoint has the bits that it had in the training process."""
    wrong = differing(trained, reloaded)
    if not trained or wrong:
        example = f", e.g. {wrong[0]}" if wrong else ""
        return Check("reload", False, f"{len(wrong)} of {len(trained)} tower tensors differ after reloading{example}")
    return Check("reload", True, f"all {len(trained)} tower tensors equal to the last bit in a new process")


def check_trained(initial: Mapping[str, str], trained: Mapping[str, str]) -> Check:
    """Training changed every tensor of the tower (both sides in the same dtype)."""
    still = sorted(trained.keys() - set(differing(initial, trained)))
    foreign = initial.keys() ^ trained.keys()
    if not trained or still or foreign:
        example = f", e.g. {(still or sorted(foreign))[0]}" if still or foreign else ""
        return Check("tower trained", False, f"{len(still)} of {len(trained)} tower tensors did not change{example}")
    return Check("tower trained", True, f"all {len(trained)} tower tensors changed during training")


def check_engine(engine: Engine | None, wanted: Engine) -> Check:
    """The training ran in the engine, at the ZeRO stage and over the number of processes that were asked for."""
    if engine == wanted:
        return Check("engine", True, f"really {engine}")
    return Check("engine", False, f"the training ran in {engine or 'an unknown engine'}; requested: {wanted}")


# ---------------------------------------------------------------- tables


def rich_table(rows: Sequence[Row]) -> Table:
    title = "What the model says about each photo, before and after training"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=0)
    for column in COLUMNS:
        table.add_column(column, no_wrap=True)
    for row in rows:
        *cells, after = row.cells()
        table.add_row(*map(_literal, cells), f"[{'green' if row.right else 'bold red'}]{_literal(after)}[/]")
    return table


def _literal(text: str) -> str:
    """Text in which rich finds no markup."""
    return text.replace("[", "\\[")


def markdown(rows: Sequence[Row], checks: Sequence[Check], facts: Mapping[str, object]) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    lines = ["# Demo", "", line(COLUMNS), line(["---"] * len(COLUMNS)), *(line(row.cells()) for row in rows), ""]
    lines += [f"- {'passed' if check.passed else 'FAILED'}: {check.name}: {check.detail}" for check in checks]
    lines += ["", *(f"- {key}: {value}" for key, value in facts.items()), ""]
    return "\n".join(lines)


def write_tables(folder: Path, rows: Sequence[Row], checks: Sequence[Check], facts: Mapping[str, object]) -> None:
    """`table.md` and `table.json`."""
    write_text(folder / "table.md", markdown(rows, checks, facts))
    content = {
        "photos": [{**asdict(row), "patches": row.patches, "right": row.right} for row in rows],
        "checks": [asdict(check) for check in checks],
        **facts,
    }
    write_text(folder / "table.json", json.dumps(content, indent=1, ensure_ascii=False))


# ---------------------------------------------------------------- pictures


def _figure(width: float, height: float):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, layout="tight")
    FigureCanvasAgg(figure)
    return figure


def draw_loss(path: Path, history: Sequence[tuple[int, float]]) -> None:
    """The training loss, (step, loss) pairs, as PNG. Raises ``ValueError`` if there are none."""
    if not history:
        raise ValueError("no step has been logged: there is no loss to draw")
    steps, losses = zip(*history)
    figure = _figure(7, 4)
    axes = figure.add_subplot()
    axes.plot(steps, losses, color="tab:blue", marker=".", markersize=4)
    axes.set(xlabel="step", ylabel="training loss", title="Fine-tuning through the packed tower", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.annotate(f"{losses[-1]:.3f}", (steps[-1], losses[-1]), textcoords="offset points", xytext=(-4, 8), ha="right")
    write_aside(path, partial(figure.savefig, format="png", bbox_inches="tight", pad_inches=0.1))


def draw_grid(path: Path, photo: Image.Image, pixels: np.ndarray, patch: int, title: str) -> None:
    """A photo beside what reached the tower, cut into its patches, as PNG.

    pixels: uint8 ``[H, W, 3]``, multiples of ``patch`` (pixels). Raises ``ValueError`` for other sizes.
    """
    height, width = pixels.shape[:2]
    if height % patch or width % patch:
        raise ValueError(f"{height} x {width} pixels cannot be cut into patches of {patch}")
    rows, columns = height // patch, width // patch
    figure = _figure(9, 4.6)
    left, right = figure.subplots(1, 2)
    left.imshow(photo.convert("RGB"))
    left.set_title(f"{title}, {photo.width} x {photo.height} pixels", fontsize=10)
    right.imshow(apart(pixels, patch), interpolation="nearest")
    right.set_title(f"{rows} x {columns} = {rows * columns} patches of {patch} x {patch} pixels", fontsize=10)
    for axes in (left, right):
        axes.set_axis_off()
    write_aside(path, partial(figure.savefig, format="png", bbox_inches="tight", pad_inches=0.1))


def apart(pixels: np.ndarray, patch: int, gap: int = 2) -> np.ndarray:
    """The patches of `[H, W, 3]` uint8 with `gap` white pixels between them."""
    rows, columns = pixels.shape[0] // patch, pixels.shape[1] // patch
    pitch = patch + gap
    canvas = np.full((rows * pitch - gap, columns * pitch - gap, 3), 255, np.uint8)
    for row in range(rows):
        for column in range(columns):
            tile = pixels[row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
            canvas[row * pitch : row * pitch + patch, column * pitch : column * pitch + patch] = tile
    return canvas
