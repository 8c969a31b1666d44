"""The demo's model before and after its training, for the tests of evaluation: trained once for all of them."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import NamedTuple

import yaml
from host_runs import REPOSITORY, environment, execute

from llava_packing_tower.tools.demo import pipeline
from llava_packing_tower.tools.demo.dataset import write_dataset

FINISHED = "LLAVA_PACKING_TEST_DEMO"
"""A folder that `llava-packing demo` left behind: taken instead of training, while one works on these tests."""


class Demo(NamedTuple):
    """Folders of the demo."""

    trained: Path
    untrained: Path
    images: Path
    data: Path
    tower: Path


def make_demo(folder: Path) -> Demo:
    """The demo's photos, models and training, in one process without DeepSpeed: a minute instead of three."""
    if finished := os.environ.get(FINISHED):
        return _at(Path(finished))
    values = yaml.safe_load((REPOSITORY / "configs" / "demo.yaml").read_text())
    config = folder / "demo.yaml"
    config.write_text(yaml.safe_dump({key: value for key, value in values.items() if key != "deepspeed"}))
    plan = pipeline.make_plan(config, folder, [])
    pipeline.install.apply()
    write_dataset(plan.path("data_path"), plan.path("image_folder"))
    pipeline.make_models(plan)
    command = [sys.executable, "-m", "llava_packing_tower", "train", str(config), "--num_processes", "1"]
    command += [*plan.overrides, "--per_device_train_batch_size", "16"]
    zero_steps = ["--max_steps", "-1", "--num_train_epochs", "0", "--output_dir", str(folder / pipeline.UNTRAINED)]
    for words in (zero_steps, []):
        result = execute([*command, *words], environment(""), timeout=400)
        assert result.returncode == 0, result.stdout + result.stderr
    return _at(folder)


def _at(folder: Path) -> Demo:
    return Demo(
        folder / "llava_llama_packing_demo",
        folder / pipeline.UNTRAINED,
        folder / "data" / "images",
        folder / "data" / "photos.json",
        folder / "models" / "llava_vit_packing_tiny",
    )
