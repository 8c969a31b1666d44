"""Targets of the packed encoders on an H100: share of the matmul rate, and speedup over other implementations."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from .timing import Measured, Result

ORIGINAL, ONE_BY_ONE, PADDED = "original tower", "transformers, image by image", "transformers, padded + mask"
PACKED = "transformers, packed"
FA3 = "flash_attention_3"


@dataclass(frozen=True)
class Target:
    """kind: mfu (at least), ms (at most), faster (at least so many times than ``than``) or memory (at most this share
    of ``than``). backend: None for any backend, a name for that one only, with "not " in front for all others."""

    family: str
    label: str
    kind: str
    value: float
    than: str | None = None
    backend: str | None = None


TARGETS: tuple[Target, ...] = (
    Target("llava_vit", "uni32", "mfu", 0.62),
    Target("llava_vit", "uni32", "faster", 2.0, ORIGINAL),
    Target("llava_vit", "ragged64", "mfu", 0.58, backend=f"not {FA3}"),
    Target("llava_vit", "ragged64", "faster", 1.8, ORIGINAL, backend=f"not {FA3}"),
    Target("llava_vit", "ragged64", "mfu", 0.68, backend=FA3),
    Target("llava_vit", "ragged64", "faster", 2.1, ORIGINAL, backend=FA3),
    Target("llava_vit", "ragged64", "memory", 0.5, ORIGINAL),
    Target("llava_vit", "uni1", "ms", 2.4),
    Target("llava_vit", "uni1", "faster", 5.0, ORIGINAL),
    Target("llava_vit", "train:uni16", "mfu", 0.56),
    Target("llava_vit", "train:uni16", "faster", 1.7, ORIGINAL),
    Target("llava_vit", "train:uni16", "memory", 0.85, ORIGINAL),
    Target("llava_vit", "train:ragged8", "mfu", 0.52),
    Target("llava_vit", "train:ragged8", "faster", 1.6, ORIGINAL),
    Target("siglip2", "ragged32", "faster", 5.0, PADDED),
    Target("siglip2", "ragged32", "faster", 3.0, ONE_BY_ONE),
    Target("dinov3", "ragged32", "faster", 5.0, ONE_BY_ONE),
    Target("aimv2", "ragged32", "faster", 5.0, ONE_BY_ONE),
    Target("qwen3_vl", "ragged32", "faster", 1.3, PACKED),
    Target("qwen3_vl", "train:ragged32", "faster", 1.3, PACKED),
    Target("qwen3_vl", "ragged32", "faster", 4.0, ONE_BY_ONE),
    Target("radio", "ragged32", "faster", 1.3, PACKED),
    Target("radio", "train:ragged32", "faster", 1.3, PACKED),
    Target("radio", "ragged32", "faster", 4.0, ONE_BY_ONE),
)


@dataclass(frozen=True)
class Verdict:
    """A target beside what was measured; ``measured`` is None where the other system could not run.

    draws: the values of which that is the median, if the sizes of the images were drawn more than once; of ``drawn``
    draws in all, those in which both systems ran.
    """

    target: Target
    system: str
    measured: float | None
    draws: tuple[float, ...] = ()
    drawn: int = 0

    @property
    def met(self) -> bool | None:
        if self.measured is None:
            return None
        if self.target.kind in ("mfu", "faster"):
            return self.measured >= self.target.value
        return self.measured <= self.target.value

    def __str__(self) -> str:
        kind, value, than = self.target.kind, self.target.value, self.target.than
        asked = {
            "mfu": f"at least {value:.2f} of peak",
            "ms": f"at most {value:.1f} ms",
            "faster": f"at least {value:.1f} x {than}",
            "memory": f"at most {value:.2f} of the memory of {than}",
        }[kind]
        outcome = {True: "met", False: "NOT MET", None: "not measured"}[self.met]
        got = "" if self.measured is None else f"{self.measured:.2f}, "
        if self.draws:
            several = f"{len(self.draws)} draws" + f" (of {self.drawn})" * (len(self.draws) < self.drawn)
            got += f"median of {several}, {min(self.draws):.2f} to {max(self.draws):.2f}, "
        return f"{self.target.label}, {self.system}: {asked}: {got}{outcome}"


def _applies(target: Target, measured: Measured) -> bool:
    if target.backend is None:
        return True
    name = target.backend.removeprefix("not ")
    return (measured.backend == name) != target.backend.startswith("not ")


def ratio(result: Result, packed: Measured, other: str, memory: bool = False) -> float | None:
    """The speedup over the other system, or the share of its memory; None if not measured."""
    peer = next((s for s in result.systems if s.name == other), None)
    if peer is None or packed.median is None:
        return None
    if memory:
        return packed.allocated / peer.allocated if packed.allocated and peer.allocated else None
    return peer.median / packed.median if peer.median else None


def _value(target: Target, result: Result, packed: Measured) -> float | None:
    if target.kind == "mfu":
        return result.mfu(packed)
    if target.kind == "ms":
        return packed.median
    return ratio(result, packed, target.than, memory=target.kind == "memory")


def verdicts(result: Result) -> list[Verdict]:
    """All targets for this workload, for each packed encoder."""
    return [
        Verdict(target, packed.name, _value(target, result, packed))
        for target in TARGETS
        if (target.family, target.label) == (result.family, result.work.label)
        for packed in result.systems
        if packed.packed and _applies(target, packed)
    ]


def over_draws(results: Sequence[Result]) -> list[Verdict]:
    """Ratios to other systems of a workload whose sizes were drawn more than once (``ragged32,ragged32#2,...``).

    How much padding costs depends on the draw; the median of the ratios is held to the target.
    """
    found = []
    for target in (t for t in TARGETS if t.kind == "faster"):
        drawn: dict[str, list[float]] = {}
        draws = {
            result.work.grids: result  # a draw that was asked for twice counts once
            for result in results
            if (target.family, target.label) == (result.family, result.work.label.partition("#")[0])
        }
        for result in draws.values():
            for packed in (s for s in result.systems if s.packed and _applies(target, s)):
                if (value := _value(target, result, packed)) is not None:
                    drawn.setdefault(packed.name, []).append(value)
        found += [
            Verdict(target, name, statistics.median(values), tuple(values), len(draws))
            for name, values in drawn.items()
            if len(values) > 1
        ]
    return found
