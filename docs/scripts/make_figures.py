"""Draw the figures of README and docs into ``docs/images``: ``python docs/scripts/make_figures.py`` (needs matplotlib).

``speed.png`` is drawn from the JSON files in ``benchmarks/results``, ``data_flow.png`` from the table below.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

ROOT = Path(__file__).parents[2]
IMAGES = ROOT / "docs" / "images"
RESULTS = ROOT / "benchmarks" / "results"
PACKED, OTHER, EDGE = "#2563a8", "#c9ced6", "#56606e"

WORK = {
    "uni1": "forward, 1 image of 448²",
    "uni32": "forward, 32 images of 448²",
    "ragged64": "forward, 64 ragged images",
    "train:uni16": "forward + backward, 16 images of 448²",
    "train:ragged8": "forward + backward, 8 ragged images",
    "ragged32": "forward, 32 ragged images",
}
PEERS = {
    "original tower": "original tower",
    "transformers, image by image": "transformers",
    "timm NaFlexVit, padded + mask": "timm",
}


def rows(file: str) -> list[tuple[str, float, str]]:
    """(label, speedup, other system) of each workload in a file of ``llava-packing bench``.

    The speedup is the time of the fastest other system over the packed encoder's.
    """
    found = []
    for result in json.loads((RESULTS / file).read_text("utf-8"))["results"]:
        packed = result["systems"][0]
        others = [s for s in result["systems"] if s["name"] in PEERS and s["ms"]]
        best = min(others, key=lambda s: s["ms"])
        label = f"{result['model']}: {WORK[result['work']]}"
        found.append((label, best["ms"] / packed["ms"], PEERS[best["name"]]))
    return found


def speed() -> None:
    entries = rows("h100_2026-11-22_bench_2.json") + rows("h100_2026-11-22_families.json")
    figure, axes = plt.subplots(figsize=(8.4, 3.4))
    places = range(len(entries), 0, -1)
    axes.barh(places, [entry[1] for entry in entries], color=PACKED, height=0.62)
    axes.axvline(1, color=EDGE, linewidth=1, linestyle="--")
    for place, (_, factor, other) in zip(places, entries, strict=True):
        axes.text(factor + 0.12, place, f"{factor:.1f} x  ({other})", va="center", fontsize=8.5)
    axes.set_yticks(list(places), [entry[0] for entry in entries], fontsize=8.5)
    axes.set_xlim(0, max(entry[1] for entry in entries) * 1.22)
    axes.set_xlabel("speedup over the fastest other implementation (bf16, one H100)", fontsize=8.5)
    axes.tick_params(axis="x", labelsize=8.5)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    save(figure, "speed.png")


# (x, y, width, title, text); the arrows follow the order.
STEPS = (
    (0.0, 1.0, "image files", "photos and videos\nof any size"),
    (1.0, 1.0, "data", "read, resize to whole\npatches, cut into rows"),
    (2.0, 1.0, "packed batch", "hidden_states [N, patch]\ngrid_thw [B, 3]\ncu_seqlens [B + 1]"),
    (3.0, 1.0, "models, attention", "all images in one\nvariable-length pass"),
    (3.0, 0.0, "towers", "select hidden states,\nsplit by image"),
    (2.0, 0.0, "multimodal", "merge or pool patches,\nprojector, newlines"),
    (1.0, 0.0, "LLaVA", "visual tokens between\nthe words (unedited)"),
    (0.0, 0.0, "language model", "loss or answer"),
)


def data_flow() -> None:
    figure, axes = plt.subplots(figsize=(9.2, 3.2))
    axes.set_axis_off()
    axes.set_xlim(-0.45, 3.45)
    axes.set_ylim(-0.42, 1.42)
    half_width, half_height = 0.40, 0.33
    for x, y, title, text in STEPS:
        packed = title not in ("image files", "LLaVA", "language model")
        axes.add_patch(
            FancyBboxPatch(
                (x - half_width, y - half_height),
                2 * half_width,
                2 * half_height,
                boxstyle="round,pad=0,rounding_size=0.04",
                facecolor="#e8f0fa" if packed else "#f1f2f4",
                edgecolor=PACKED if packed else EDGE,
            )
        )
        axes.text(x, y + 0.18, title, ha="center", va="center", fontsize=9.5, fontweight="bold")
        axes.text(x, y - 0.09, text, ha="center", va="center", fontsize=8)
    for (x, y, *_), (to_x, to_y, *_) in pairwise(STEPS):
        dx, dy = to_x - x, to_y - y
        start = (x + half_width * dx, y + half_height * dy)
        end = (to_x - half_width * dx, to_y - half_height * dy)
        axes.add_patch(
            FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=12, color=EDGE, shrinkA=0, shrinkB=0)
        )
    save(figure, "data_flow.png")


def save(figure: plt.Figure, name: str) -> None:
    IMAGES.mkdir(exist_ok=True)
    figure.savefig(IMAGES / name, dpi=110, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)


if __name__ == "__main__":
    speed()
    data_flow()
