"""Groups of lmms-eval's tasks, checked against the registry of the installed version."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence
from pathlib import Path

from .tasks import FOLDER, OWN_TASKS

GROUPS: dict[str, tuple[str, ...]] = {
    "image": (
        "ai2d",
        "chartqa",
        "docvqa_val",
        "infovqa_val",
        "textvqa_val",
        "ocrbench",
        "mme",
        "mmstar",
        "realworldqa",
        "scienceqa_img",
        "pope",
    ),
    "video": (
        "videomme",
        "mvbench",
        "perceptiontest_val_mc",
        "nextqa_mc_test",
        "temporalbench_long_qa",
        "video_mmmu",
        "longvideobench_val_v",
        "mlvu_dev",
    ),
    "smoke": OWN_TASKS,
}


def expand(names: str | Sequence[str]) -> list[str]:
    """Task names of a comma-separated list in which names of GROUPS stand for their tasks; each once, in order.

    Raises ``ValueError`` for an empty list.
    """
    words = names.split(",") if isinstance(names, str) else names
    tasks = [task for word in map(str.strip, words) if word for task in GROUPS.get(word, (word,))]
    if not tasks:
        raise ValueError(f"no task is given; groups: {', '.join(GROUPS)}")
    return list(dict.fromkeys(tasks))


def registered(include_path: str | None = None) -> set[str]:
    """Every task, group and tag that the installed lmms-eval knows, and those of this package (takes some seconds).

    Raises ``ValueError`` for a folder of tasks that lmms-eval cannot read.
    """
    from lmms_eval.tasks import TaskManager
    from loguru import logger

    logger.disable("lmms_eval")  # a line for each file that is no task of its own
    try:
        manager = TaskManager("ERROR", include_path=[str(FOLDER), *([include_path] if include_path else [])])
    except Exception as error:  # whatever the files of the user's tasks let it raise
        if include_path is None:
            raise
        said = " ".join(str(error).split())
        raise ValueError(f"--include_path {include_path}: lmms-eval cannot read these tasks: {said}") from error
    return set(manager.all_tasks)


def check_known(tasks: Sequence[str], known: Collection[str]) -> None:
    """Raises ``ValueError`` with the tasks that are not known, and for each the names that look most like it."""
    lines = []
    for task in tasks:
        if task not in known:
            near = difflib.get_close_matches(task, known, n=3, cutoff=0.5)
            lines.append(f"  {task}" + (f" (did you mean {', '.join(near)}?)" if near else ""))
    if lines:
        raise ValueError("the installed lmms-eval has no such task:\n" + "\n".join(lines))


def include_path(task: str, given: str | Path | None) -> str | None:
    """Where lmms-eval has to look for a task beside its own ones."""
    return str(FOLDER) if task in OWN_TASKS else given and str(given)
