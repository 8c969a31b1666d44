"""What is measured, and what is asked for on one H100."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from ....attention.dispatch import BACKENDS, is_causal
from .models import ADAPTERS, PARTS

STOCK, PACKED, WIDE, LORA = "stock", "packed", "wide", "lora"
"""The models: LLaVA-NeXT with its CLIP, LLaVA-NeXT with a packing tower, four decoder layers of a larger model, and the
second with a LoRA on its decoder."""
BEFORE = {"mm_packing_decoder": False, "mm_packing_full_logits": True, "mm_packing_liger": False}
"""LLaVA's own training step around a packing tower: padded, with all logits, unfused."""
UNPACKED = {"mm_packing_decoder": False, "mm_packing_liger": False}
KEYS = tuple(BEFORE)
VARIANTS: dict[str, dict[str, bool]] = {
    "no_liger": {"mm_packing_liger": False},
    "padded": {"mm_packing_decoder": False},
    "full_logits": {"mm_packing_full_logits": True},
}
"""What can be switched off in a row; besides these, an attention backend can be named."""


@dataclass(frozen=True)
class Target:
    """kind: ``samples/s`` or ``MFU`` (at least), ``GiB`` (at most), ``times`` (at least so many times the samples/s of
    row ``than``). goal: what would be better still."""

    kind: str
    value: float
    than: str | None = None
    goal: float | None = None


@dataclass(frozen=True)
class Size:
    """A micro-batch."""

    samples: int
    checkpointing: bool

    def __str__(self) -> str:
        return f"{self.samples} samples, {'' if self.checkpointing else 'no '}checkpointing"


@dataclass(frozen=True)
class Row:
    """One line of the table.

    sizes: of the micro-batch; of several, the one with the most samples/s is taken. keys: of this package, switched
    away from their defaults; trained: of PARTS or ADAPTERS; attention: backend of the packed decoder (None: the
    fastest here).
    """

    name: str
    title: str
    model: str
    sizes: tuple[Size, ...]
    ratio: str = "native"
    keys: dict[str, bool] = field(default_factory=dict)
    trained: tuple[str, ...] = PARTS
    attention: str | None = None
    targets: tuple[Target, ...] = ()


def _sizes(*counts: int, checkpointing: bool) -> tuple[Size, ...]:
    return tuple(Size(count, checkpointing) for count in counts)


def rows(tiny: bool) -> dict[str, Row]:
    """By name, in the order of their turns: the most telling ones first, for a run that is cut short."""
    few, many = (2, 3) if tiny else (4, 16)
    on, off = dict(checkpointing=True), dict(checkpointing=False)
    if tiny:
        stock = packed = tiles = (*_sizes(2, **off), *_sizes(2, 3, **on))
    else:
        # 10 samples were LLaVA-NeXT's best on 80 GiB, and 24 ours (16 with tiles).
        stock = (*_sizes(8, 10, 12, 16, 20, **on), *_sizes(4, 6, 8, **off))
        packed = (*_sizes(20, 24, 28, 32, **off), *_sizes(64, **on))
        tiles = (*_sizes(12, 16, 20, 24, **off), *_sizes(32, **on))
    plain, recomputed = _sizes(many, **off), _sizes(many, **on)
    short, frozen, adapted = _sizes(few, **on), ("projector", "decoder"), ("projector", ADAPTERS)
    found = [
        Row("stock", "LLaVA-NeXT, CLIP, anyres", STOCK, stock, "anyres"),
        Row(
            "16",
            f"{many} samples, no checkpointing",
            PACKED,
            plain,
            targets=(Target("samples/s", 47), Target("MFU", 0.45, goal=0.50), Target("GiB", 40)),
        ),
        Row(
            "16-ckpt",
            f"{many} samples, checkpointing",
            PACKED,
            recomputed,
            targets=(Target("samples/s", 34), Target("GiB", 8)),
        ),
        Row(
            "4-ckpt",
            f"{few} samples, checkpointing",
            PACKED,
            short,
            targets=(Target("samples/s", 16, goal=22),),
        ),
        Row(
            "native",
            "native resolution, best batch",
            PACKED,
            packed,
            targets=(Target("times", 3.5, "stock", goal=4.0),),
        ),
        Row(
            "anyres",
            "the tiles of stock, best batch",
            PACKED,
            tiles,
            "anyres",
            targets=(Target("times", 2.2, "stock"),),
        ),
        Row(
            "frozen",
            "tower frozen, checkpointing",
            PACKED,
            recomputed,
            trained=frozen,
            targets=(Target("times", 1.0, "frozen-before"),),
        ),
        Row("frozen-before", "tower frozen, padded and unfused", PACKED, recomputed, keys=BEFORE, trained=frozen),
        Row(
            "stage1",
            "projector alone trained, checkpointing",
            PACKED,
            recomputed,
            trained=("projector",),
            targets=(Target("times", 1.0, "stage1-before"),),
        ),
        Row(
            "stage1-before",
            "projector alone, padded and unfused",
            PACKED,
            recomputed,
            keys=BEFORE,
            trained=("projector",),
        ),
        Row(
            "lora",
            "LoRA, tower frozen, checkpointing",
            LORA,
            recomputed,
            trained=adapted,
            targets=(Target("times", 1.0, "lora-before"),),
        ),
        Row("lora-before", "LoRA, tower frozen, padded and unfused", LORA, recomputed, keys=BEFORE, trained=adapted),
        Row(
            "7b",
            "4 decoder layers of 7B's sizes, checkpointing",
            WIDE,
            recomputed,
            targets=(Target("times", 1.4, "7b-before"),),
        ),
        Row("7b-before", "4 layers of 7B, padded and unfused", WIDE, recomputed, keys=UNPACKED),
    ]
    by_name = {row.name: row for row in found}
    for name in ("16+no_liger", "4-ckpt+no_liger"):
        by_name[name] = variant(by_name, name)
    return by_name


def variant(known: dict[str, Row], name: str) -> Row:
    """The row ``NAME+VARIANT+...``, without targets. Raises ``ValueError`` for an unknown row or variant."""
    base, *changes = name.split("+")
    if base not in known:
        raise ValueError(f"unknown row {base!r}; choose from {', '.join(known)}")
    row = known[base]
    backends = [backend for backend in BACKENDS if is_causal(backend)]
    for change in changes:
        if row.model == STOCK:
            raise ValueError(f"row {name!r}: stock LLaVA-NeXT has no variants")
        if change in VARIANTS:
            row = replace(row, keys={**row.keys, **VARIANTS[change]})
        elif change in backends:
            row = replace(row, attention=change)
        else:
            raise ValueError(f"row {name!r}: {change!r} is none of {', '.join([*VARIANTS, *backends])}")
    return replace(row, name=name, title=f"{row.title}, {', '.join(changes)}", targets=()) if changes else row


def choose(text: str | None, tiny: bool) -> list[Row]:
    """The rows of ``--rows``, all if None; with each its comparison. Raises ``ValueError`` for unknown names."""
    known = rows(tiny)
    if text is None:
        return list(known.values())
    chosen = {}
    for name in filter(None, (part.strip() for part in text.split(","))):
        row = known[name] if name in known else variant(known, name)
        chosen[name] = row
        for target in row.targets:
            if target.than:
                chosen.setdefault(target.than, known[target.than])
    if not chosen:
        raise ValueError("--rows names no row")
    return [chosen[name] for name in known if name in chosen] + [r for n, r in chosen.items() if n not in known]


@dataclass(frozen=True)
class Verdict:
    """A target beside what was measured: None where that is missing."""

    row: str
    target: Target
    measured: float | None

    @property
    def met(self) -> bool | None:
        if self.measured is None:
            return None
        if self.target.kind == "GiB":
            return self.measured <= self.target.value
        return self.measured >= self.target.value

    def __str__(self) -> str:
        target = self.target
        asked = {
            "samples/s": f"at least {target.value:g} samples/s",
            "MFU": f"at least {target.value:.2f} of peak",
            "GiB": f"at most {target.value:g} GiB",
            "times": f"at least {target.value:.1f} x {target.than}",
        }[target.kind]
        asked += f" (goal {target.goal:g})" if target.goal else ""
        outcome = {True: "met", False: "NOT MET", None: "not measured"}[self.met]
        return f"{self.row}: {asked}: {'' if self.measured is None else f'{self.measured:.3g}, '}{outcome}"


def verdicts(chosen: list[Row], found: dict[str, dict]) -> list[Verdict]:
    """found: the measured numbers of each row (``samples/s``, ``MFU``, ``peak GiB``), by its name."""
    verdicts = []
    for row in chosen:
        own = found.get(row.name, {})
        for target in row.targets:
            if target.kind == "times":
                own_rate, base = own.get("samples/s"), found.get(target.than, {}).get("samples/s")
                measured = own_rate / base if own_rate and base else None
            else:
                measured = own.get({"GiB": "peak GiB"}.get(target.kind, target.kind))
            verdicts.append(Verdict(row.name, target, measured))
    return verdicts
