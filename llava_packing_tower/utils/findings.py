"""Findings of the checks of versions and files."""

from __future__ import annotations

from dataclasses import dataclass

ERROR, WARNING = "error", "warning"


@dataclass(frozen=True)
class Finding:
    """Something that is wrong. An ``error`` keeps something from working at all; a ``warning`` costs time or memory.

    command: what the user types to fix it.
    """

    level: str
    topic: str
    text: str
    command: str | None = None

    def __str__(self) -> str:
        return f"{self.text}\n  Fix: {self.command}" if self.command else self.text
