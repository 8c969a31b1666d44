"""Where the time of a packed encoder goes: kernels by kind, per layer, and the gaps between kernels."""

from __future__ import annotations

import statistics
from collections import Counter

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from ...multimodal.flops import encoder_flops
from ...utils.kernel_times import COLLECTIVES, KINDS, OTHER, busy_time, is_range, kind_of
from .systems import Setting, System
from .timing import WARM_UPS, Clock, PeakMatmul, compiled_so_far, prepared, turn_of
from .workloads import Workload, reordered

PROFILED = 5


def kernels(run, device: torch.device, times: int = PROFILED) -> tuple[Counter, float]:
    """Milliseconds per call by kernel name, and the milliseconds in which any kernel ran."""
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda) as profiler:
        for _ in range(times):
            run()
        if cuda:
            torch.cuda.synchronize(device)
    names: Counter = Counter()
    if not cuda:  # operators by the time that they spend themselves
        for event in profiler.key_averages():
            names[event.key] += event.self_cpu_time_total / 1e3 / times
        return names, sum(names.values())
    spans = []
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA and not is_range(event):
            spans.append((event.time_range.start, event.time_range.end))
            names[event.name] += event.time_range.elapsed_us() / 1e3 / times
    return names, busy_time(spans) / 1e3 / times


def measure_breakdown(setting: Setting, work: Workload, system: System, clock: Clock, rounds: int) -> dict:
    """Milliseconds of one call by kind, the gaps between kernels, and what the peak matmul rate would need.

    Gaps are the time of an unprofiled call (median) less the time in which kernels run.
    """
    images = work.images(setting.config.patch_size, setting.device, setting.dtype)
    with torch.set_grad_enabled(work.train):
        for turn in range(WARM_UPS[1]):
            graphs = compiled_so_far()
            clock(prepared(setting, work, system, system.prepare(reordered(images, -1 - turn))))
            if turn + 1 >= WARM_UPS[0] and compiled_so_far() == graphs:
                break
        run = prepared(setting, work, system, system.prepare(images))
        peak, peak_ms, ms = PeakMatmul(setting.device), [], []
        for _ in range(max(rounds, 1)):
            ms += turn_of(clock, run)
            peak_ms.append(clock(peak.run))
        names, busy = kernels(run, setting.device)
    by_kind = {kind: 0.0 for kind, _ in KINDS if kind != COLLECTIVES}
    for name, spent in names.items():
        kind = kind_of(name)
        by_kind[kind if kind in by_kind else OTHER] += spent
    factor = 3 if work.train else 1
    grids = [(1, *grid) for grid in work.grids]
    operations = encoder_flops(setting.config, work.lengths, setting.layers, grids)
    attention, linear = operations.attention * factor, operations.linear * factor
    rate = peak.flops_per_second(statistics.median(peak_ms))
    total = statistics.median(ms)
    return {
        "family": setting.family,
        "work": work.label,
        "tokens": work.tokens,
        "layers": setting.layers,
        "ms": total,
        "ms_by_kind": {**by_kind, "gaps": max(0.0, total - busy)},
        "peak_matmul_flops_per_second": rate,
        "ms_at_peak": {"matmuls": linear / rate * 1e3, "attention": attention / rate * 1e3},
        "kernels": [{"name": name, "kind": kind_of(name), "ms": spent} for name, spent in names.most_common(20)],
    }


def show_breakdown(found: dict, out: Console) -> None:
    """Per layer and as a share of the whole; at peak: what the useful operations would take at the peak matmul rate."""
    out.print(
        f"\n[bold]{found['family']}, {found['work']}[/bold]: {found['tokens']} tokens, {found['ms']:.2f} ms, "
        f"{found['layers']} layers (what is outside of the layers is spread over them)"
    )
    table = Table("kind", box=None, pad_edge=False)
    for heading in ("ms per layer", "share", "at peak ms", "of peak"):
        table.add_column(heading, justify="right")
    for kind, spent in found["ms_by_kind"].items():
        ideal = found["ms_at_peak"].get(kind)
        table.add_row(
            kind,
            f"{spent / found['layers']:.4f}",
            f"{spent / found['ms']:.1%}",
            "-" if ideal is None else f"{ideal / found['layers']:.4f}",
            "-" if ideal is None or not spent else f"{ideal / spent:.2f}",
        )
    out.print(table)
    for kernel in found["kernels"][:8]:
        out.print(
            f"  {kernel['ms'] / found['layers']:.4f} ms  {kernel['kind']:<22} {kernel['name'][:100]}", markup=False
        )
