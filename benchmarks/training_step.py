"""A training step beside stock LLaVA-NeXT's: samples per second, MFU and memory, in one process, taking turns.

  LLAVA_NEXT_DIR=... python benchmarks/training_step.py --json training_step.json    # on a GPU, under 400 seconds
  LLAVA_NEXT_DIR=... python benchmarks/training_step.py --json quick.json --quick    # the most telling systems, 120 s
  LLAVA_NEXT_DIR=... python benchmarks/training_step.py --json tiny.json --tiny      # the same on a CPU, in small

Stock is LLaVA-NeXT's own CLIP-L/14-336 with its own anyres (five grids), checkpointing on. Ours is a packing tower of
the same size at native resolution, and once more with the same tiles as stock. Both decoders have the size of
Qwen2-0.5B (151,936 words), all weights are random and trained, in bfloat16. Measured are forward and backward, without
an optimizer step. The photos have the sizes of COCO's (see ``native_vs_anyres.py``) and 60 supervised tokens each.

The systems take turns, round after round: in its turn a system makes one step that is not timed, then two that are.
Given are medians over all timed steps, and the peak of memory without the weights of the other model.

Before that, gradients in bfloat16 are compared with those of the same model in float32, padded and unfused: ours may be
at most twice as far away as those of the host's own path.

MFU: 3 x forward over real tokens, the head at supervised positions only, recomputation not counted, over the rate of
one large matmul measured in this process. (Projector, embeddings and norms are not counted.)
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
import traceback
from pathlib import Path

import native_vs_anyres as photos_of
from training_step_parts import (
    StockMode,
    System,
    build_stock,
    checkpointing,
    compare_gradients,
    matmul_rate,
    set_keys,
    step_flops,
    systems,
    weights,
)
from two_gpu_parts import FULL, TINY, host_classes

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
STARTED = time.monotonic()
GROUPS, TIMED = 3, 2  # batches of a system; timed steps in a turn
# ---------------------------------------------------------------- measuring


class Runner:
    """A system with its batches; :meth:`turn` runs its steps."""

    def __init__(self, system: System, model: object, others: int, photos: list, size: dict, tower: dict) -> None:
        import torch

        self.system, self.model, self.others = system, model, others
        self.times, self.peak, self.losses, self.failure, self.count = [], 0.0, [], None, 0
        self.bounds = (1 if size["tile"] < 100 else 16, (2 * size["tile"] // photos_of.PATCH) ** 2)
        self.prepare()
        mode = self.mode()
        groups = [photos[i * system.samples : (i + 1) * system.samples] for i in range(GROUPS)]
        groups = [group for group in groups if len(group) == system.samples]
        self.batches = [self.make(mode, group, size) for group in groups]
        self.flops, self.tokens, self.padded = [], [], []
        for batch in self.batches:
            with torch.no_grad():
                mask = photos_of.prepared(model, batch)[1]
            lengths = [int(n) for n in mask.sum(1)]
            images = [
                x.numel() // (x.shape[0] if x.dim() == 4 else 1) // (3 * photos_of.PATCH**2) for x in self.tiles(batch)
            ]
            supervised = int((batch.labels[:, 1:] != photos_of.IGNORE).sum())
            self.flops.append(step_flops(model.config, tower, lengths, images, supervised))
            self.tokens.append(sum(lengths))
            self.padded.append(mask.numel())

    @staticmethod
    def tiles(batch: object) -> list:
        return [x for x in batch.given["images"] for _ in range(x.shape[0] if x.dim() == 4 else 1)]

    def mode(self) -> photos_of.Mode:
        if self.system.stock:
            return StockMode(self.system.ratio, None)
        return photos_of.Mode(self.system.ratio, self.bounds if self.system.ratio == "native" else None)

    def make(self, mode: photos_of.Mode, photos: list, size: dict) -> object:
        return photos_of.make_batch(self.model, mode, photos, size, self.model.config.vocab_size)

    def prepare(self) -> None:
        """Put the model into this system's state: the systems of ours share one."""
        checkpointing(self.model, self.system.checkpointing)
        self.model.train()
        self.model.config.tokenizer_padding_side = "right"
        if self.system.stock:
            return
        set_keys(self.model, self.system.keys)
        self.mode().set(self.model)

    def turn(self, cuda: bool) -> None:
        import torch

        self.prepare()
        try:
            for step in range(1 + TIMED):
                batch = self.batches[self.count % len(self.batches)]
                self.model.zero_grad(set_to_none=True)
                if cuda:
                    torch.cuda.synchronize()
                    torch.cuda.reset_peak_memory_stats()
                began = time.perf_counter()
                loss = self.model(**batch.given, labels=batch.labels, use_cache=False).loss
                loss.backward()
                if cuda:
                    torch.cuda.synchronize()
                if step:
                    self.times.append((time.perf_counter() - began, self.flops[self.count % len(self.batches)]))
                    self.losses.append(loss.item())
                    self.count += 1
                if cuda:
                    self.peak = max(self.peak, (torch.cuda.max_memory_allocated() - self.others) / 2**30)
        except torch.cuda.OutOfMemoryError as error:
            self.failure = "out of memory: " + str(error).partition("\n")[0][:120]
        except Exception:
            self.failure = traceback.format_exc()[-1500:]
        self.model.zero_grad(set_to_none=True)
        loss = None
        if cuda:
            torch.cuda.empty_cache()

    def row(self, rate: float) -> dict:
        base = {"samples": self.system.samples, "plan": str(vars(self.model).get("_llava_packing_step", "the host's"))}
        if self.failure or not self.times:
            return {**base, "failure": self.failure}
        seconds = [s for s, _ in self.times]
        return {
            **base,
            "ms": statistics.median(seconds) * 1e3,
            "fastest and slowest ms": (min(seconds) * 1e3, max(seconds) * 1e3),
            "samples/s": self.system.samples / statistics.median(seconds),
            "MFU": statistics.median(flops / s for s, flops in self.times) / rate,
            "peak GiB": self.peak,
            "tokens": statistics.mean(self.tokens),
            "padded to": statistics.mean(self.padded),
            "timed steps": len(seconds),
            "losses": self.losses[:GROUPS],
        }


def show(report: dict) -> None:
    from rich.table import Table

    from llava_packing_tower.tools.bench.report import console

    out, table = console(), Table("system", box=None, pad_edge=False)
    for column in ("ms", "samples/s", "MFU", "peak GiB", "tokens", "padded to"):
        table.add_column(column, justify="right")
    for name, row in report["systems"].items():
        if "ms" not in row:
            table.add_row(name, row["failure"].strip().splitlines()[-1][:60])
            continue
        numbers = (f"{row['ms']:.0f}", f"{row['samples/s']:.1f}", f"{row['MFU']:.3f}", f"{row['peak GiB']:.1f}")
        table.add_row(name, *numbers, f"{row['tokens']:.0f}", f"{row['padded to']:.0f}")
    out.print(table)
    for name, value in report["against stock"].items():
        out.print(f"{name}: {value:.2f} x stock at its best batch")


def against_stock(rows: dict) -> dict:
    """Samples per second of the best batch, native and with stock's tiles, over stock's best."""

    def best(words: str) -> float:
        return max(
            (row["samples/s"] for name, row in rows.items() if name.startswith(words) and "ms" in row), default=0
        )

    base = best("stock")
    return {ratio: best(f"ours, {ratio},") / base for ratio in ("native", "anyres")} if base else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="where the report goes; written after every turn")
    parser.add_argument("--tiny", action="store_true", help="small, on the CPU")
    parser.add_argument("--rounds", type=int, default=5, help="at most (default 5)")
    parser.add_argument("--limit", type=float, default=330, help="seconds after which no turn is begun (default 330)")
    parser.add_argument("--quick", action="store_true", help="fewer systems, 3 rounds, 95 seconds")
    parser.add_argument("--only", help="systems whose names contain this")
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.limit = min(args.rounds, 3), min(args.limit, 95)

    import torch

    import builder_patch  # noqa: F401
    from llava_packing_tower.tools.bench.report import environment, write_json

    device, size = "cpu" if args.tiny else "cuda", dict(photos_of.TINY if args.tiny else photos_of.FULL)
    dimensions = TINY if args.tiny else FULL
    rate = matmul_rate(device)
    models = {True: build_stock(size, dimensions, device), False: photos_of.build(size, args.tiny, device)[1]}
    # Noise of the table's sizes, once for each system's batches.
    most = 8 if args.tiny else 96
    photos = [
        photo for batch in photos_of.photo_batches({**size, "batch": most // photos_of.BATCHES + 1}) for photo in batch
    ]
    chosen = [system for system in systems(args.tiny, args.quick) if not args.only or args.only in system.name]
    runners: dict[str, Runner] = {}
    report = {
        **environment(torch.device(device), sys.argv),
        "host": host_classes()[0],
        "decoder attention": models[True].config._attn_implementation,
        "matmul TFLOP/s": rate / 1e12,
        "rounds": 0,
    }

    try:
        report["gradients"] = compare_gradients(models[False], photos[:3], size, device)
    except Exception:
        report["gradients"] = {"failure": traceback.format_exc()[-1500:]}
    print(f"[{time.monotonic() - STARTED:4.0f} s] gradients: {report['gradients']}", flush=True)

    def write() -> None:
        report["systems"] = {name: runner.last for name, runner in runners.items()}
        report["against stock"] = against_stock(report["systems"])
        report["seconds"] = time.monotonic() - STARTED
        write_json(report, args.json)

    for number in range(args.rounds):
        for system in chosen:
            if time.monotonic() - STARTED > args.limit:
                break
            if system.name not in runners:
                model, other = models[system.stock], models[not system.stock]
                runners[system.name] = Runner(system, model, weights(other), photos, size, dimensions["tower"])
            runner = runners[system.name]
            if runner.failure is None:
                runner.turn(device == "cuda")
                runner.last = runner.row(rate)
                speed = runner.last.get("samples/s", runner.failure)
                print(f"[{time.monotonic() - STARTED:4.0f} s] {system.name}: {speed}", flush=True)
                write()
        report["rounds"] = number + 1
    write()
    show(report)


if __name__ == "__main__":
    main()
