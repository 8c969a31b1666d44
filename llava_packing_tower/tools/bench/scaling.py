"""How the cost grows: with the number of images of a batch, and with the tokens of an image."""

from __future__ import annotations

import statistics
import time

import torch
from rich.console import Console
from rich.table import Table

from ...attention.dispatch import varlen_attention
from ...data.segments import make_segments
from .systems import Setting, System, recorded_backend
from .timing import LEAST_ROUNDS, Clock, Deadline
from .workloads import Workload, uniform


def sweeps(tiny: bool) -> list[tuple[str, str, list[Workload]]]:
    """(what varies, axis title, batches): images of 1024 tokens, then images of growing size at one token total."""
    if tiny:
        counts, side, sides, total = (1, 2, 4, 8), 8, (4, 8, 16), 512
    else:
        counts, side, sides, total = (8, 16, 32, 64, 128, 256, 512), 32, (16, 24, 32, 48, 64, 96, 128), 65536
    return [
        ("images", f"images per batch, {side * side} tokens each", [uniform(n, side) for n in counts]),
        (
            "tokens_per_image",
            f"tokens per image, about {total} tokens per batch",
            [uniform(max(1, round(total / s**2)), s) for s in sides],
        ),
    ]


def attention_alone(setting: Setting, work: Workload, backend: str):
    """All the attention of one forward, and nothing else, through the backend that the model took."""
    heads, width = setting.config.num_attention_heads, setting.config.hidden_size
    segments = make_segments(work.lengths, setting.device)
    qkv = torch.randn(work.tokens, 3, heads, width // heads, device=setting.device, dtype=setting.dtype).unbind(1)

    def run() -> None:
        for _ in range(setting.layers):
            varlen_attention(*qkv, segments.cu_seqlens, segments.max_seqlen, lengths=segments.lengths, backend=backend)

    return run


@torch.no_grad()
def measure_scaling(setting: Setting, system: System, clock: Clock, rounds: int, deadline: Deadline, tiny: bool):
    """Each sweep's points, timed interleaved: ``{"over", "title", "points": [{"ms", "attention_ms", ...}]}``."""
    series = []
    plans = sweeps(tiny)
    for index, (over, title, batches) in enumerate(plans):
        until = deadline.share(len(plans) - index)
        points = [
            {
                "images": len(work.grids),
                "tokens": work.tokens,
                "tokens_per_image": work.lengths[0],
                "all": [],
                "attention": [],
                "backend": None,
            }
            for work in batches
        ]
        for turn in range(-2, rounds):  # two turns to warm up
            if turn >= LEAST_ROUNDS and time.monotonic() > until:
                break
            for work, point in zip(batches, points):
                if turn < 0:
                    with recorded_backend(system):
                        run = system.prepare(work.images(setting.config.patch_size, setting.device, setting.dtype)).run
                        clock(run)
                    point["backend"] = system.backend
                else:
                    run = system.prepare(work.images(setting.config.patch_size, setting.device, setting.dtype)).run
                    point["all"].append(clock(run))
                alone = attention_alone(setting, work, point["backend"])
                spent = clock(alone)
                if turn >= 0:
                    point["attention"].append(spent)
                del run, alone
        for point in points:
            point["ms"] = statistics.median(point.pop("all"))
            point["attention_ms"] = min(statistics.median(point.pop("attention")), point["ms"])
        series.append({"over": over, "title": title, "points": points})
    return series


def show_scaling(series: list[dict], out: Console) -> None:
    for line in series:
        out.print(f"\n[bold]{line['title']}[/bold]")
        table = Table(box=None, pad_edge=False)
        for heading in ("images", "tokens each", "ms", "of it attention", "tokens/ms", "without attention", "backend"):
            table.add_column(heading, justify="right")
        for p in line["points"]:
            rest = p["ms"] - p["attention_ms"]
            table.add_row(
                str(p["images"]),
                str(p["tokens_per_image"]),
                f"{p['ms']:.2f}",
                f"{p['attention_ms']:.2f}",
                f"{p['tokens'] / p['ms']:.0f}",
                f"{p['tokens'] / rest:.0f}" if rest > 0 else "-",
                p["backend"],
            )
        out.print(table)
