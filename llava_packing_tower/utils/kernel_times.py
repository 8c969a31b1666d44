"""The time of a profile by kinds of kernels."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

# The first rule that finds its pattern in a kernel's name counts: attention kernels are built on matmul libraries.
COLLECTIVES, OTHER = "collectives", "norms and elementwise"
KINDS: tuple[tuple[str, str], ...] = (
    (COLLECTIVES, r"nccl|c10d::|gloo:|all_?reduce|all_?gather|reduce_?scatter"),
    ("attention", r"flash|fmha|attention|attn|sdpa|fort_native"),
    ("matmuls", r"gemm|nvjet|cutlass|xmma|wgmma|cublas|splitk|matmul|\bmm\b|addmm|aten::bmm"),
    ("copies", r"memcpy|memset|(?<!_to_)copy_|catarray|direct_copy|aten::(copy|cat|clone|contiguous|fill)"),
    (OTHER, r""),
)


def kind_of(kernel: str) -> str:
    """The kind of a kernel (or of a CPU operator) by its name."""
    return next(kind for kind, pattern in KINDS if re.search(pattern, kernel, re.IGNORECASE))


def busy_time(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of (start, end) spans."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def is_range(event: Any) -> bool:
    """Whether an event of a profile is not a kernel but a named range of kernels (compiled regions are reported so)."""
    return getattr(event, "is_user_annotation", False) or event.name.startswith(
        ("Torch-Compiled", "## Call", "Profiler")
    )
