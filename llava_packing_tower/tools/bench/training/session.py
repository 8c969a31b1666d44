"""One call of `llava-packing bench --training-step`."""

from __future__ import annotations

import argparse
import copy
import functools
import math
import os
import statistics
import time
from pathlib import Path

import torch

from ....integrations.llava import install
from ....utils.files import is_stream
from .. import report as general
from ..timing import Clock, Deadline, PeakMatmul
from . import report
from .models import FULL, TINY, build_lora, build_packed, build_stock, host_classes, set_checkpointing
from .photos import make_batch
from .rows import BEFORE, LORA, PACKED, STOCK, WIDE, Row, choose, verdicts
from .trials import Bench, Contest, set_keys

ROUNDS = {True: 1, False: 4}
ALLOCATOR = "PYTORCH_CUDA_ALLOC_CONF"
"""Rows of many sizes share a process: memory that one leaves in pieces must not be what another lacks."""


def run(args: argparse.Namespace, device: torch.device, argv: list[str], began: float) -> int:
    """Measure the rows of ``--rows`` and write what was found after each turn.

    began: of ``time.monotonic``, when the command was started: ``--limit`` counts from there. Returns the exit status:
    1 if a row failed otherwise than by a lack of memory. Raises ``ValueError`` for rows that do not exist.
    """
    tiny = (args.size or ("full" if device.type == "cuda" else "tiny")) == "tiny"
    chosen = choose(args.rows, tiny)
    memory = math.inf
    if device.type == "cuda":
        os.environ.setdefault(ALLOCATOR, "expandable_segments:True")  # read when the first tensor is made
        total = torch.cuda.get_device_properties(device).total_memory
        memory = min(total, (args.memory or math.inf) * 2**30)
        torch.cuda.set_per_process_memory_fraction(memory / total)
    session = Session(chosen, device, tiny, Deadline(args.limit - (time.monotonic() - began)), args)
    session.bench.memory = memory
    session.content = {
        **general.environment(device, argv),
        "tiny": tiny,
        "memory limit GiB": args.memory,
        ALLOCATOR: os.environ.get(ALLOCATOR),
    }
    session.seconds["until the command runs"] = time.monotonic() - began
    session.run()
    return int(any(contest.failed for contest in session.contests))


class Session:
    """contests: the rows, in the order of their turns; seconds: where the time of the run went."""

    def __init__(
        self, chosen: list[Row], device: torch.device, tiny: bool, deadline: Deadline, args: argparse.Namespace
    ) -> None:
        began = time.monotonic()
        install.apply()
        self.host = host_classes()[0]
        self.seconds = {"import LLaVA": time.monotonic() - began}
        self.device, self.tiny, self.deadline, self.args = device, tiny, deadline, args
        size = TINY if tiny else FULL
        build = {
            STOCK: functools.partial(build_stock, size, device),
            PACKED: functools.partial(build_packed, size, device),
            WIDE: functools.partial(build_packed, size, device, "wide"),
            LORA: functools.partial(build_lora, size, device),
        }
        self.bench = Bench(size, device, tiny, build)
        self.contests = [Contest(self.bench, row) for row in chosen]
        self.matmul, self.clock, self.peak_ms = PeakMatmul(device), Clock(device), []
        self.content: dict = {}
        self.rounds, self.began = 0, time.monotonic()
        self.out = general.console()

    @property
    def peak(self) -> float | None:
        """Operations per second of the matmul: the median over the run."""
        return self.matmul.flops_per_second(statistics.median(self.peak_ms)) if self.peak_ms else None

    def run(self) -> None:
        self._measure_peak()
        if self.args.check:
            self.content["gradients"] = check_gradients(self.bench)
            self._tell(f"gradients: {self.content['gradients']}")
        for _ in range(self.args.repeat or ROUNDS[self.tiny]):
            for contest in self.contests:
                if self.deadline.left <= 0:
                    break
                contest.turn(lambda: self.deadline.left <= 0)
                self._tell(f"{contest.row.name}: {report.in_short(contest.record(self.peak))}")
                self._write()
            if self.deadline.left <= 0:
                self._tell("the time limit (--limit) was reached")
                break
            self.rounds += 1
            self._measure_peak()
        self._write(is_done=True)
        report.show(self.content, verdicts([c.row for c in self.contests], self.content["rows"]), self.out)
        if self.args.json:
            self.out.print(f"written: {self.args.json}")
        if self.args.plot:
            report.plot(self.content, self.args.plot)
            self.out.print(f"written: {self.args.plot}")

    def _measure_peak(self) -> None:
        if not self.peak_ms:
            self.clock(self.matmul.run)
        self.peak_ms.append(self.clock(self.matmul.run))

    def _tell(self, line: str) -> None:
        self.out.print(f"[{time.monotonic() - self.began:4.0f} s] {line}", markup=False, highlight=False)

    def _write(self, is_done: bool = False) -> None:
        rows = {c.row.name: c.record(self.peak) for c in self.contests if c.searched}
        judged = [c.row for c in self.contests] if self.device.type == "cuda" and not self.tiny else []
        self.content |= {
            "host": self.host,
            "matmul TFLOP/s": self.peak / 1e12 if self.peak else None,
            "rounds": self.rounds,
            "rows": rows,
            "targets": [
                {"row": v.row, "target": str(v), "asked": v.target.value, "measured": v.measured, "met": v.met}
                for v in verdicts(judged, rows)
            ],
            "seconds": {**self.seconds, **self.bench.seconds, "in all": time.monotonic() - self.began},
        }
        if self.args.json and (is_done or not is_stream(Path(self.args.json))):
            general.write_json(self.content, Path(self.args.json))


def check_gradients(bench: Bench, samples: int = 3) -> dict:
    """How far gradients are from float32, in parts of their norm: ours, and those of LLaVA's own path.

    "tensors above twice": those where ours are more than twice as far away.
    """
    model, mode = bench.model(PACKED), bench.mode("native")
    batch = make_batch(model, mode, bench.photos[:samples], bench.size["words"])
    model.config.tokenizer_padding_side = "right"
    exact = copy.deepcopy(model).float()
    exact.config._attn_implementation = "sdpa"
    wide = {**batch.given, "images": [image.float() for image in batch.given["images"]]}
    found, losses, plans = {}, {}, {}
    for name, each, keys in (("float32", exact, BEFORE), ("host", model, BEFORE), ("packed", model, {})):
        set_keys(each, keys)
        set_checkpointing(each, False)
        each.train().zero_grad(set_to_none=True)
        loss = each(**(wide if each is exact else batch.given), labels=batch.labels, use_cache=False).loss
        loss.backward()
        losses[name], plans[name] = loss.item(), str(vars(each).get("_llava_packing_step"))
        found[name] = {key: p.grad.float() for key, p in each.named_parameters() if p.grad is not None}
        each.zero_grad(set_to_none=True)
    if not found["packed"].keys() == found["host"].keys() == found["float32"].keys():
        raise RuntimeError("the packed step and LLaVA's own give gradients to other parameters")

    def away(name: str, key: str) -> float:
        exactly = found["float32"][key]
        return (torch.norm(found[name][key] - exactly) / torch.norm(exactly)).item()

    errors = {key: (away("packed", key), away("host", key)) for key, g in found["float32"].items() if g.norm() > 0}
    worst = max(errors, key=lambda key: errors[key][0] / max(errors[key][1], 1e-5))
    return {
        "losses": losses,
        "plans": plans,
        "median error": {n: statistics.median(e[i] for e in errors.values()) for i, n in enumerate(("packed", "host"))},
        "largest ratio": {"tensor": worst, "packed": errors[worst][0], "host": errors[worst][1]},
        "tensors": len(errors),
        "tensors above twice": sum(a > 2 * max(b, 1e-5) for a, b in errors.values()),
    }
