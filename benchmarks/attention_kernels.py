"""Attention alone: milliseconds of forward and backward per call, for each backend that can run here (but `eager` on a
GPU, which is slow and never chosen).

  python benchmarks/attention_kernels.py --json kernels.json      # on a GPU
  python benchmarks/attention_kernels.py                          # on a CPU, tiny, which only shows that it runs

This is what the rule of `auto` (llava_packing_tower/attention) is made from. Segments are written COUNTxLENGTH, or
raggedN*SCALE: the sizes of the bench's N ragged images in patches of 14, their sides times SCALE. Calls are made ten at
a time, one after the other, so that the host's part shows only where it is longer than the kernels; medians of rounds.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from llava_packing_tower.attention.dispatch import BACKENDS, attend, resolve_backend
from llava_packing_tower.data.segments import make_segments
from llava_packing_tower.tools.bench.report import environment, write_json
from llava_packing_tower.tools.bench.timing import Clock
from llava_packing_tower.tools.bench.workloads import ragged_grids

FULL = (
    "128x128,64x256,ragged64*0.35,ragged64*0.45,ragged64*0.55,ragged32*0.7,ragged8,ragged16,32x576,1x576,1x1024,16x1024,"
    "ragged64,1x4096,8x4096"
)
FULL_HEADS = "16x64,16x72,8x128"
TINY, TINY_HEADS = "2x20,ragged3*0.1", "2x8"
CALLS, ROUNDS, PATCH = 10, 5, 14


def lengths_of(text: str) -> tuple[int, ...]:
    """Tokens of each segment. Raises ``ValueError`` for another form."""
    try:
        if text.startswith("ragged"):
            count, _, scale = text.removeprefix("ragged").partition("*")
            return tuple(h * w for h, w in ragged_grids(int(count), PATCH, float(scale or 1)))
        count, length = map(int, text.split("x"))
    except ValueError as error:
        raise ValueError(f"segments {text!r}: give COUNTxLENGTH, raggedN or raggedN*SCALE ({error})") from error
    return (length,) * count


def per_call(clock: Clock, run: Callable[[], object]) -> float:
    """Milliseconds; what the first call builds is not counted."""

    def turn() -> None:
        for _ in range(CALLS):
            run()

    run()
    return statistics.median(clock(turn) for _ in range(ROUNDS)) / CALLS


def measure(lengths: tuple[int, ...], heads: int, head_dim: int, device: torch.device, dtype: torch.dtype) -> dict:
    """Backend to its times; a backend is left out where it cannot run, and has no backward where it lacks one."""
    segments = make_segments(lengths, device)
    generator = torch.Generator(device).manual_seed(0)
    packed = torch.randn(sum(lengths), 4, heads, head_dim, generator=generator, device=device).to(dtype)
    grad_out = packed[:, 3].contiguous()
    clock, found = Clock(device), {}
    for name in BACKENDS:
        if name == "eager" and device.type == "cuda":
            continue
        times = {}
        for grad in (False, True):
            try:
                resolve_backend(name, device, dtype, head_dim, lengths=lengths, needs_grad=grad)
            except (ImportError, ValueError):
                continue
            q, k, v = (x.detach().requires_grad_(grad) for x in packed[:, :3].unbind(1))
            forward = lambda: attend(q, k, v, segments, backend=name, resolved=True)  # noqa: B023, E731
            if grad:
                out = forward()
                run = lambda: torch.autograd.grad(out, (q, k, v), grad_out, retain_graph=True)  # noqa: B023, E731
                times["backward_ms"] = per_call(clock, run)
                del out
            else:
                with torch.no_grad():
                    times["forward_ms"] = per_call(clock, forward)
        if times:
            found[name] = {key: round(ms, 4) for key, ms in times.items()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--segments", help=f"with commas ({FULL})")
    parser.add_argument("--heads", help=f"COUNTxWIDTH with commas ({FULL_HEADS})")
    parser.add_argument("--json", type=Path, help="where the report goes")
    args = parser.parse_args()
    cuda = torch.cuda.is_available()
    device, dtype = torch.device("cuda" if cuda else "cpu"), torch.bfloat16 if cuda else torch.float32
    segments, heads = (FULL, FULL_HEADS) if cuda else (TINY, TINY_HEADS)
    texts = (args.segments or segments).split(",")
    shapes = [tuple(map(int, text.split("x"))) for text in (args.heads or heads).split(",")]
    about, rows = environment(device, sys.argv), []
    for (heads, head_dim), text in itertools.product(shapes, texts):
        lengths = lengths_of(text)
        row = {"segments": text, "heads": heads, "head_dim": head_dim, "tokens": sum(lengths), "count": len(lengths)}
        row |= {"mean": sum(lengths) // len(lengths), "ms": measure(lengths, heads, head_dim, device, dtype)}
        row["auto"] = [
            resolve_backend("auto", device, dtype, head_dim, lengths=lengths, needs_grad=grad) for grad in (False, True)
        ]
        rows.append(row)
        times = ", ".join(f"{n} {' + '.join(f'{ms:.3f}' for ms in t.values())}" for n, t in row["ms"].items())
        print(
            f"{text:14} {heads:3} x {head_dim:<3} {row['tokens']:7} tokens, mean {row['mean']:5}: {times}", flush=True
        )
        if args.json:  # after each row: a run that is cut short keeps what it has
            write_json({**about, "rows": rows}, args.json)


if __name__ == "__main__":
    main()
