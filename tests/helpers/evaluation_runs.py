"""`llava-packing demo`, run once for all tests that need a trained model: of the demo itself, and of evaluation."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import NamedTuple

from host_runs import environment, execute

from llava_packing_tower.tools.demo import pipeline

FINISHED = "LLAVA_PACKING_TEST_DEMO"
"""A folder that `llava-packing demo` left behind: taken instead of training, while one works on these tests."""


class Demo(NamedTuple):
    """Folders of the demo, and what it printed."""

    output: Path
    trained: Path
    untrained: Path
    images: Path
    data: Path
    tower: Path
    printed: str


def make_demo(folder: Path) -> Demo:
    if finished := os.environ.get(FINISHED):
        return _at(Path(finished), "")
    command = [sys.executable, "-m", "llava_packing_tower", "demo", "--output", str(folder)]
    result = execute(command, environment(""), timeout=500)
    assert result.returncode == 0, result.stdout + result.stderr
    return _at(folder, result.stdout)


def _at(folder: Path, printed: str) -> Demo:
    return Demo(
        output=folder,
        trained=folder / "llava_llama_packing_demo",
        untrained=folder / pipeline.UNTRAINED,
        images=folder / "data" / "images",
        data=folder / "data" / "photos.json",
        tower=folder / "models" / "llava_vit_packing_tiny",
        printed=printed,
    )
