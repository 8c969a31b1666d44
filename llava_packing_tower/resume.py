"""Which checkpoint a run goes on from: the last one that is complete, told by a mark that is written last of all.

The hosts go on from the folder ``checkpoint-N`` with the highest number, whole or not. A run that was killed while it
saved leaves one that is not: the launcher moves it out of the way before the host looks. No torch here.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

MARK = "packing_complete.json"
STATE = "trainer_state.json"
ASIDE = "incomplete-"
_NAME = re.compile(r"checkpoint-(\d+)")


def checkpoints(output_dir: str | os.PathLike) -> list[Path]:
    """The folders ``checkpoint-N``, complete or not, by their step."""
    folder = Path(output_dir).expanduser()
    found = [f for f in folder.iterdir() if _NAME.fullmatch(f.name) and f.is_dir()] if folder.is_dir() else []
    return sorted(found, key=lambda f: int(_NAME.fullmatch(f.name)[1]))


def mark_complete(checkpoint: Path) -> None:
    """Write the mark, by rename: the sizes of all files that are there. Every rank must have written its own."""
    sizes = {str(f.relative_to(checkpoint)): f.stat().st_size for f in checkpoint.rglob("*") if f.is_file()}
    sizes = {name: size for name, size in sorted(sizes.items()) if not name.startswith(MARK)}
    aside = checkpoint / f"{MARK}.{os.getpid()}"
    aside.write_text(json.dumps(sizes, indent=1), encoding="utf-8")
    aside.replace(checkpoint / MARK)


def defect(checkpoint: Path) -> str | None:
    """Why a run cannot go on from a checkpoint; None if it can."""
    if not (checkpoint / STATE).is_file():
        return f"it has no {STATE}"
    mark = checkpoint / MARK
    if not mark.is_file():
        return "the save did not end, or the plugin did not run it"
    try:
        sizes = json.loads(mark.read_text(encoding="utf-8"))
    except ValueError:
        return f"its {MARK} is damaged"
    for name, size in sizes.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes of {size}"
    return None


def last_complete(output_dir: str | os.PathLike) -> Path | None:
    return next((c for c in reversed(checkpoints(output_dir)) if defect(c) is None), None)


def set_aside(output_dir: str | os.PathLike) -> list[str]:
    """Rename each checkpoint that is not complete, so that the host does not see it; nothing is deleted.

    Returns a line for each. Several machines may do it at once in a folder that they share.
    """
    lines = []
    for checkpoint in checkpoints(output_dir):
        reason = defect(checkpoint)
        if reason is None:
            continue
        target, number = checkpoint.with_name(ASIDE + checkpoint.name), 2
        while target.exists():
            target, number = checkpoint.with_name(f"{ASIDE}{checkpoint.name}.{number}"), number + 1
        try:
            checkpoint.rename(target)
        except FileNotFoundError:  # another machine was quicker
            continue
        lines.append(
            f"{checkpoint.name} is not complete ({reason}): now {target.name}. To use it nevertheless, rename it back "
            f"and put a file {MARK} with {{}} into it"
        )
    return lines
