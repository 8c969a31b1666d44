"""The environment variables that this package reads: all of them, in one table (``docs/environment.md`` shows it)."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
from dataclasses import dataclass

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Variable:
    """name; values: what may be set; meaning: what it does, and what holds without it; old: earlier names, which are
    read where the new one is not set."""

    name: str
    values: str
    meaning: str
    old: tuple[str, ...] = ()


FUSED = "LLAVA_PACKING_FUSED"
GRAPHS = "LLAVA_PACKING_CUDA_GRAPHS"
ATTENTION = "LLAVA_PACKING_ATTENTION"
DISABLE_PATCHES = "LLAVA_PACKING_DISABLE_PATCHES"
ENCODER_TOKENS = "LLAVA_PACKING_ENCODER_TOKENS"
TRAINER = "LLAVA_PACKING_TRAINER"
LLAVA_DIR = "LLAVA_DIR"
NEXT_DIR = "LLAVA_NEXT_DIR"
PEAK_TFLOPS = "LLAVA_PACKING_PEAK_TFLOPS"

VARIABLES = {
    variable.name: variable
    for variable in (
        Variable(
            FUSED,
            "0 or 1",
            "0: encoder blocks run eager. Otherwise they are fused in half precision on a GPU.",
            ("LLAVA_PACKING_COMPILE",),
        ),
        Variable(
            GRAPHS,
            "0 or 1",
            "0: no CUDA graphs. Otherwise small batches replay them, in training if they are checkpointed.",
        ),
        Variable(
            ATTENTION, "a backend", "The attention backend of towers that name none in their arguments. Default: auto."
        ),
        Variable(
            ENCODER_TOKENS,
            "a number",
            "The most patches of one encoder pass where mm_packing_encoder_tokens is not set. Default: no limit.",
        ),
        Variable(
            DISABLE_PATCHES,
            "names, joined by commas",
            "Compatibility patches that are not applied. Default: none.",
            ("LLAVA_PACKING_DISABLE_MENDS",),
        ),
        Variable(
            PEAK_TFLOPS,
            "a number",
            "What the MFU of a training's log is measured against, in TFLOP/s of one device. Default: the datasheet's "
            "figure for the GPU.",
        ),
        Variable(LLAVA_DIR, "a folder", "The clone of a LLaVA to use. Default: the installed llava."),
        Variable(NEXT_DIR, "a folder", "The same; the name from when LLaVA-NeXT was the only one."),
        Variable(
            "LLAVA_PACKING_RUN_LOCK", "a file", "Set by `train` for its processes: the lock of the output folder."
        ),
        Variable(TRAINER, "sft or dpo", "Set by `train` for its processes: which trainer of the host."),
        Variable("LLAVA_PACKING_LAUNCHER", "a process", "Set by `train` for its processes: the launcher."),
    )
}


@functools.cache
def _warn(old: str, new: str) -> None:
    logger.warning("%s is the old name of %s: please use the new name", old, new)


def read(name: str) -> str | None:
    """The value of a variable of :data:`VARIABLES`, or that of an old name of it, with a warning; None if there is none
    or it is empty."""
    if value := os.environ.get(name):
        return value
    for old in VARIABLES[name].old:
        if value := os.environ.get(old):
            _warn(old, name)
            return value
    return None


def clone() -> str | None:
    """The clone that ``LLAVA_DIR`` or ``LLAVA_NEXT_DIR`` names."""
    return read(LLAVA_DIR) or read(NEXT_DIR)


def number(name: str) -> float | None:
    """A variable that is a number above 0, whole where patches are counted; None if it is not set.

    Raises ``ValueError`` for another value.
    """
    if (text := read(name)) is None:
        return None
    is_whole = name == ENCODER_TOKENS
    value: float = math.nan
    with contextlib.suppress(ValueError):  # it is none
        if text.isdecimal() or not is_whole:
            value = int(text) if is_whole else float(text)
    if not 0 < value < math.inf:
        what = "a whole number of patches, at least 1" if is_whole else "a number above 0"
        raise ValueError(f"{name} must be {what}, got {text!r:.80}")
    return value


def switch(name: str) -> bool | None:
    """A variable that is 0 or 1, or None if it is not set. Raises ``ValueError`` for another value."""
    value = read(name)
    if value not in (None, "0", "1"):
        raise ValueError(f"{name} must be 0 or 1, got {value!r}")
    return None if value is None else value == "1"
