"""One call of `llava-packing bench`: the options, the systems, the results."""

from __future__ import annotations

import argparse
import logging
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ...attention.dispatch import backend_module
from ...utils.files import is_stream
from . import report
from .availability import Unavailable
from .baselines import PEERS
from .breakdown import measure_breakdown, show_breakdown
from .models import PRESETS
from .scaling import measure_scaling, show_scaling
from .systems import Setting, System, Weights, packed_system, random_weights
from .targets import Verdict, over_draws
from .timing import Clock, Deadline, Measured, Result, first_line, measure, release
from .workloads import TINY, Workload, parse_workload, useful_flops

logger = logging.getLogger(__name__)


@dataclass
class Session:
    """tasks: each family with its forward, or its training workloads; peers: name to option (a path, or None)."""

    device: torch.device
    tiny: bool
    tasks: list[tuple[Setting, bool, list[Workload]]]
    peers: dict[str, str | None]
    backends: list[str]
    rounds: int
    deadline: Deadline
    environment: dict
    json_file: Path | None = None
    out: report.Console = field(default_factory=report.console)
    results: list[Result] = field(default_factory=list)
    series: list[dict] = field(default_factory=list)
    parts: list[dict] = field(default_factory=list)
    draws: list[Verdict] = field(default_factory=list)

    @classmethod
    def from_arguments(cls, args: argparse.Namespace, device: torch.device, argv: list[str]) -> Session:
        """Raises ``ValueError`` for names and workloads that do not exist."""
        tiny = (args.size or ("full" if device.type == "cuda" else "tiny")) == "tiny"
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        tasks = []
        for name in args.family.split(","):
            if name not in PRESETS:
                raise ValueError(f"unknown family {name!r}; choose from {', '.join(PRESETS)}")
            preset = PRESETS[name]
            setting = Setting(name, preset, preset.config(tiny), device, dtype)
            cell = getattr(setting.config, "spatial_merge_size", 1)
            texts = args.work.split(",") if args.work else preset.train if args.train else preset.forward
            works = [
                parse_workload(text, setting.config.patch_size, TINY if tiny else 1.0, args.seed, args.train, cell)
                for text in texts
            ]
            for train in (False, True):
                if chosen := [work for work in works if work.train is train]:
                    tasks.append((setting, train, chosen))
        peers = dict(part.partition("=")[::2] for part in args.peers.split(",") if part)
        if unknown := set(peers) - set(PEERS):
            raise ValueError(f"unknown peers {', '.join(sorted(unknown))}; choose from {', '.join(PEERS)}")
        backends = args.backend.split(",")
        for backend in backends:
            if backend != "auto":
                backend_module(backend)
        rounds = args.repeat or (20 if device.type == "cuda" else 3)
        environment = report.environment(device, argv)
        return cls(device, tiny, tasks, peers, backends, rounds, Deadline(args.limit), environment, args.json)

    @property
    def judged(self) -> bool:
        """Whether the targets are printed: they are about the real sizes on a GPU."""
        return self.device.type == "cuda" and not self.tiny

    def _headline(self) -> None:
        e, v = self.environment, self.environment["versions"]
        sizes = "tiny models and images: the times mean nothing" if self.tiny else "full sizes"
        self.out.print(f"{e['device']}, torch {v['torch']}, transformers {v['transformers']}, {e['date']}, {sizes}")

    # ---------------------------------------------------------------- building

    def _build(self, setting: Setting, train: bool) -> tuple[list[System], list[Measured]]:
        """The systems, and a line for each that cannot run here. The packed encoder takes the first weights."""
        systems: list[System] = []
        missing: list[Measured] = []
        weights: Weights | None = None
        for name, option in self.peers.items():
            try:
                built, offered = PEERS[name](setting, train, option or None)
            except Unavailable as error:
                missing.append(Measured(name, False, note=f"not available: {error}"))
                continue
            except Exception as error:  # another version of a peer must not take the rest of the run down
                logger.warning("%s could not be built", name, exc_info=True)
                missing.append(Measured(name, False, note=f"failed: {first_line(error)}"))
                continue
            systems += built
            if weights is None:
                weights = offered
            elif offered is not None:
                for system in built:
                    system.same_weights = False
        weights = weights or random_weights(setting)
        packed = []
        for backend in self.backends:
            try:
                self._check_backend(setting, backend, train)
            except (ImportError, ValueError) as error:
                missing.append(Measured(f"packed ({backend})", True, note=f"not available: {error}"))
                continue
            packed.append(packed_system(setting, weights, backend, train))
        return packed + systems, missing

    @staticmethod
    def _check_backend(setting: Setting, backend: str, train: bool) -> None:
        from ...attention.dispatch import resolve_backend

        head_dim = setting.config.hidden_size // setting.config.num_attention_heads
        resolve_backend(backend, setting.device, setting.dtype, head_dim, lengths=(64,), needs_grad=train)

    # ---------------------------------------------------------------- the three views

    def compare(self) -> None:
        """All systems on all workloads."""
        self._headline()
        clock = Clock(self.device)
        to_do = sum(len(works) for _, _, works in self.tasks)
        for setting, train, works in self.tasks:
            systems, missing = self._build(setting, train)
            for work in works:
                if self.deadline.left <= 0:
                    flops = useful_flops(setting.config, work.lengths, setting.layers, work.train, work.grids)
                    result = Result(setting.family, setting.title, work, flops, [])
                    result.note = "not run: the time limit (--limit) was reached"
                else:
                    result = measure(setting, work, systems, clock, self.rounds, self.deadline.share(to_do))
                    result.systems += missing
                to_do -= 1
                self.results.append(result)
                report.show(result, self.out, self.judged)
                self._keep()
            del systems
            release(self.device)
        if self.judged and (found := over_draws(self.results)):
            self.draws = found
            self.out.print("\n[bold]median over draws of the sizes[/bold]")
            report.show_verdicts(found, self.out)

    def scale(self) -> None:
        """Cost over batch size and image size, for the first backend of the packed encoder."""
        self._headline()
        setting, _, _ = self.tasks[0]
        system = packed_system(setting, random_weights(setting), self.backends[0], train=False)
        self.series = measure_scaling(setting, system, Clock(self.device), self.rounds, self.deadline, self.tiny)
        show_scaling(self.series, self.out)

    def break_down(self) -> None:
        """Time by kind of kernel on each workload, for each backend of the packed encoder."""
        self._headline()
        for setting, train, works in self.tasks:
            weights = random_weights(setting)
            for backend in self.backends:
                system = packed_system(setting, weights, backend, train)
                for work in works:
                    if self.deadline.left <= 0:
                        self.out.print(f"{setting.family}, {work.label}: not run, the time limit was reached")
                        continue
                    found = measure_breakdown(setting, work, system, Clock(self.device), self.rounds)
                    self.parts.append({"system": system.name, **found})
                    show_breakdown(self.parts[-1], self.out)

    # ---------------------------------------------------------------- files

    def _keep(self) -> None:
        """Write what was measured so far: a run that is ended from outside has not been for nothing."""
        if self.json_file is not None and not is_stream(self.json_file):
            self._write_json(self.json_file)

    def _write_json(self, file: Path) -> None:
        content = {
            **self.environment,
            "tiny": self.tiny,
            "results": [report.record(result, self.judged) for result in self.results],
            "over_draws": [report.verdict_record(verdict) for verdict in self.draws],
            "scaling": self.series,
            "breakdown": self.parts,
        }
        report.write_json(content, file)

    def write(self, plot_file: Path | None) -> None:
        """The JSON as a whole, and the figure."""
        caption = f"{self.environment['device']}, torch {self.environment['versions']['torch']}"
        if self.json_file:
            self._write_json(self.json_file)
            self.out.print(f"written: {self.json_file}")
        if plot_file:
            if self.series:
                report.plot_scaling(self.series, plot_file, caption)
            else:
                report.plot(self.results, plot_file, caption)
            self.out.print(f"written: {plot_file}")
