"""Combinations of versions that cannot work, told from the installed metadata and files: nothing is imported.

The launcher refuses them before it starts anything; `llava-packing doctor` lists them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path

from . import ERROR, Finding

OLDEST_TRANSFORMERS = "4.40"
NEWEST_RUN = "5.23"
"""The newest transformers with which the host matrix (docs/hosts.md) was run."""


@dataclass(frozen=True)
class Run:
    """What is going to run, as far as versions care. ``hidden_size``: of the decoder, None if it is not known."""

    zero_stage: int | None = None
    on_cpu: bool = False
    processes: int | None = 1
    attention: str | None = None
    deepspeed: Mapping[str, object] | None = None
    hidden_size: int | None = None


def installed(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _at_least(distribution: str, least: str) -> bool:
    from packaging.version import Version

    here = installed(distribution)
    return here is not None and Version(here) >= Version(least)


def unmet(distribution: str, extras: Iterable[str] = ("",)) -> list[tuple[str, str]]:
    """(requirement, what is installed) for each requirement of a distribution that an installed package breaks.

    A package that is not installed at all is left out: what LLaVA needs of it shows when LLaVA is imported.
    """
    from packaging.requirements import Requirement

    broken = []
    for line in requires(distribution) or ():
        requirement = Requirement(line)
        wanted = requirement.marker is None or any(requirement.marker.evaluate({"extra": e}) for e in extras)
        here = installed(requirement.name)
        if wanted and here is not None and not requirement.specifier.contains(here, prereleases=True):
            broken.append((f"{requirement.name}{requirement.specifier}", here))
    return list(dict.fromkeys(broken))


def _transformers(run: Run) -> list[Finding]:
    here = installed("transformers")
    if here is None:
        return [Finding(ERROR, "transformers", "transformers is not installed", "pip install transformers==4.40.2")]
    if not _at_least("transformers", OLDEST_TRANSFORMERS):
        text = f"transformers {here} is too old: {OLDEST_TRANSFORMERS} or newer is needed"
        return [Finding(ERROR, "transformers", text, "pip install transformers==4.40.2")]
    # Beside its own requirements those of its Trainer, which it states as extras.
    extras = ["", "torch"] + (["deepspeed"] if run.zero_stage is not None else [])
    return [
        Finding(
            ERROR,
            "transformers",
            f"transformers {here} needs {need}, and {found} is installed",
            f"pip install '{need}'",
        )
        for need, found in unmet("transformers", extras)
        if not need.startswith("torch")  # a local build's version says little; importing it says more
    ]


def _accelerate_and_deepspeed_on_cpu(run: Run) -> list[Finding]:
    if run.zero_stage is None or not run.on_cpu or run.processes == 1 or not _at_least("accelerate", "1.13"):
        return []
    text = (
        f"accelerate {installed('accelerate')} cannot run DeepSpeed in several processes on the CPU: from 1.13 on it "
        "finds no backend there and counts one process"
    )
    return [Finding(ERROR, "accelerate", text, "pip install 'accelerate<1.13'")]


def _automatic_bucket_sizes(run: Run) -> list[Finding]:
    """transformers before 4.42 fills `"stage3_prefetch_bucket_size": "auto"` with 0.9 * hidden_size ** 2, a float."""
    asked = (run.deepspeed or {}).get("zero_optimization", {}).get("stage3_prefetch_bucket_size")
    if run.zero_stage != 3 or asked != "auto" or not run.hidden_size or run.hidden_size % 10 == 0:
        return []
    deepspeed, integration = _folder("deepspeed"), _folder("transformers")
    if deepspeed is None or integration is None or (deepspeed / "pydantic_v1.py").is_file():
        return []  # up to 0.14 DeepSpeed rounds it
    source = (integration / "integrations" / "deepspeed.py").read_text(encoding="utf-8")
    if "int(0.9 * hidden_size * hidden_size)" in source or "0.9 * hidden_size * hidden_size" not in source:
        return []
    size = 0.9 * run.hidden_size**2
    text = (
        f"transformers {installed('transformers')} turns stage3_prefetch_bucket_size: auto into {size:.1f}, and "
        f"DeepSpeed {installed('deepspeed')} takes whole numbers only. Give {int(size)}, or use an older DeepSpeed"
    )
    return [Finding(ERROR, "deepspeed", text, "pip install --no-build-isolation deepspeed==0.14.4")]


def _decoder_attention(run: Run) -> list[Finding]:
    spec = find_spec("flash_attn")
    there = spec is not None and spec.origin is not None  # (flash-attn-4 alone makes a namespace of that name)
    if run.attention != "flash_attention_2" or there or find_spec("kernels"):
        return []
    text = (
        "attn_implementation flash_attention_2 needs the flash-attn package, which is not installed (LLaVA-NeXT asks "
        "for it unless it is told otherwise); `--attn_implementation sdpa` runs without"
    )
    return [Finding(ERROR, "flash-attn", text, "pip install flash-attn --no-build-isolation")]


def _folder(package: str) -> Path | None:
    spec = find_spec(package)
    return Path(next(iter(spec.submodule_search_locations))) if spec and spec.submodule_search_locations else None


CHECKS: tuple[Callable[[Run], list[Finding]], ...] = (
    _transformers,
    _accelerate_and_deepspeed_on_cpu,
    _automatic_bucket_sizes,
    _decoder_attention,
)


def impossible(run: Run) -> list[Finding]:
    """Why this run cannot work with what is installed; empty if nothing speaks against it."""
    return [finding for check in CHECKS for finding in check(run)]
