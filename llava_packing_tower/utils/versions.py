"""Combinations of versions that cannot work, found in the installed metadata and files: nothing is imported.

The launcher refuses them before it starts anything; `llava-packing doctor` lists them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .findings import ERROR, Finding

OLDEST_TRANSFORMERS = "4.40"
NEWEST_RUN = "5.24"
"""The newest transformers with which the host matrix (docs/hosts.md) was run."""
WORKING: tuple[tuple[str | None, dict[str, str]], ...] = (
    (
        "4.45",
        {
            "accelerate": "accelerate>=0.34,<1",
            "datasets": "datasets>=2.16,<4",
            "deepspeed": "deepspeed==0.14.4",
            "peft": "peft>=0.13,<0.14",
        },
    ),
    (
        "5",
        {
            "accelerate": "accelerate>=1.1,<1.13",
            "datasets": "datasets>=2.16,<5",
            "deepspeed": "deepspeed>=0.19.8",
            "peft": "peft>=0.13",
        },
    ),
    (
        None,
        {
            "accelerate": "accelerate>=1.1,<1.13",
            "datasets": "datasets>=4",
            "deepspeed": "deepspeed>=0.19.8",
            "peft": "peft>=0.18",
        },
    ),
)
"""For transformers below a version (None: any): what to install beside it."""


@dataclass(frozen=True)
class Run:
    """What is going to run, as far as versions care. ``hidden_size``: of the decoder, None if it is not known."""

    zero_stage: int | None = None
    on_cpu: bool = False
    processes: int | None = 1
    attention: str | None = None
    deepspeed: Mapping[str, Any] | None = None
    hidden_size: int | None = None


def installed(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def install_command(distribution: str) -> str:
    """The command that installs a distribution in a version that works beside the installed transformers."""
    bounds = next(wanted for below, wanted in WORKING if below is None or not _at_least("transformers", below))
    wanted = bounds.get(distribution, distribution)
    wanted = f"'{wanted}'" if any(sign in wanted for sign in "<>") else wanted
    if distribution != "deepspeed":
        return f"pip install {wanted}"
    # A source distribution whose build imports torch.
    return f"pip install setuptools wheel packaging ninja && pip install --no-build-isolation {wanted}"


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
    return [Finding(ERROR, "accelerate", text, install_command("accelerate"))]


def bucket_sizes_are_fractions() -> bool:
    """Whether `"stage3_prefetch_bucket_size": "auto"` becomes 0.9 * hidden_size ** 2, a float that DeepSpeed refuses.

    transformers rounds it from 4.45 on; DeepSpeed did up to 0.14.
    """
    return _at_least("deepspeed", "0.15") and not _at_least("transformers", "4.45")


def _automatic_bucket_sizes(run: Run) -> list[Finding]:
    asked = dict(run.deepspeed or {}).get("zero_optimization", {}).get("stage3_prefetch_bucket_size")
    if run.zero_stage != 3 or asked != "auto" or not run.hidden_size or run.hidden_size % 10 == 0:
        return []
    if not bucket_sizes_are_fractions():
        return []
    size = 0.9 * run.hidden_size**2
    text = (
        f"transformers {installed('transformers')} turns stage3_prefetch_bucket_size: auto into {size:.1f}, but "
        f"DeepSpeed {installed('deepspeed')} accepts whole numbers only. Write {int(size)}, or use an older DeepSpeed"
    )
    return [Finding(ERROR, "deepspeed", text, install_command("deepspeed"))]


# peft from the first version to below the second imports a name that transformers from the third to below the fourth
# does not have; transformers imports peft wherever it is installed.
PEFT = (("0.14", None, None, "4.43", "EncoderDecoderCache"), ("0.14", "0.18", "5", None, "HybridCache"))


def _peft(run: Run) -> list[Finding]:
    def within(distribution: str, first: str | None, below: str | None) -> bool:
        return (first is None or _at_least(distribution, first)) and not (below and _at_least(distribution, below))

    here = installed("peft")
    for first, below, since, until, name in PEFT:
        if here is not None and within("peft", first, below) and within("transformers", since, until):
            text = (
                f"peft {here} imports {name}, which transformers {installed('transformers')} does not have: no LLaVA "
            )
            text += "can be imported, with or without LoRA"
            return [Finding(ERROR, "peft", text, install_command("peft"))]
    return []


def _accelerate(run: Run) -> list[Finding]:
    if installed("accelerate") is not None:
        return []
    return [Finding(ERROR, "accelerate", "accelerate is not installed: no training", install_command("accelerate"))]


def _decoder_attention(run: Run) -> list[Finding]:
    spec = find_spec("flash_attn")
    there = spec is not None and spec.origin is not None  # (flash-attn-4 alone makes a namespace of that name)
    if run.attention != "flash_attention_2" or there or find_spec("kernels"):
        return []
    text = (
        "attn_implementation flash_attention_2 needs the flash-attn package, which is not installed (it is "
        "LLaVA-NeXT's default); `--attn_implementation sdpa` does not need it"
    )
    return [Finding(ERROR, "flash-attn", text, "pip install flash-attn --no-build-isolation")]


def filelock() -> list[Finding]:
    """lmms-eval imports ``filelock._api``, which filelock has up to 4.2."""
    spec = find_spec("lmms_eval")
    if spec is None or not _at_least("filelock", "4.3"):
        return []
    evaluator = Path(next(iter(spec.submodule_search_locations or ()))) / "evaluator.py"
    if "filelock._api" not in evaluator.read_text(encoding="utf-8"):
        return []
    text = f"lmms-eval imports filelock._api, which filelock {installed('filelock')} does not have: no evaluation"
    return [Finding(ERROR, "filelock", text, "pip install 'filelock<4.3'")]


CHECKS: tuple[Callable[[Run], list[Finding]], ...] = (
    _transformers,
    _accelerate,
    _accelerate_and_deepspeed_on_cpu,
    _peft,
    _automatic_bucket_sizes,
    _decoder_attention,
)


def impossible(run: Run) -> list[Finding]:
    """Why this run cannot work with what is installed; empty if nothing speaks against it."""
    return [finding for check in CHECKS for finding in check(run)]
