"""The shipped configurations, trained as they are (workers, grouping, ZeRO-3), killed and resumed: the small part of
``benchmarks/shipped_configs.py`` that every test run takes. docs/hosts.md has all of it."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import host_runs
import pytest
import torch
import yaml

from llava_packing_tower.tools.bench.models import PRESETS

REPOSITORY = Path(__file__).parents[2]
BENCHMARK = REPOSITORY / "benchmarks" / "shipped_configs.py"
sys.path.append(str(BENCHMARK.parent))
import shipped_configs  # noqa: E402

PATHS = {"model_name_or_path", "data_path", "image_folder", "output_dir", "mm_vision_tower", "pretrain_mm_mlp_adapter"}
STEPS = {"max_steps", "save_steps"}


@pytest.mark.parametrize("name", shipped_configs.chosen(["all"]))
def test_only_paths_and_steps_are_changed(name, tmp_path):
    content = yaml.safe_load((REPOSITORY / "configs" / f"{name}.yaml").read_text())
    args = argparse.Namespace(size="tiny", steps=5, resume=["finetune", "lora"], num_gpus=2)
    made = shipped_configs.changes(name, tmp_path, tmp_path, args)
    assert made.keys() <= PATHS | STEPS and PATHS & content.keys() <= made.keys()
    args.num_gpus = None
    assert shipped_configs.changes(name, tmp_path, tmp_path, args).keys() - made.keys() == {
        "tf32",
        "attn_implementation",
    }
    assert content["dataloader_num_workers"] > 0


def test_groups_and_names():
    for stage in ("pretrain", "finetune"):
        assert {shipped_configs.family(name) for name in shipped_configs.chosen([stage])} == set(PRESETS)
    assert shipped_configs.chosen(["lora"]) == ["llava_lora"] and shipped_configs.chosen(["none"]) == []
    with pytest.raises(SystemExit, match="no shipped configuration 'fintune'"):
        shipped_configs.chosen(["fintune"])


@pytest.mark.long  # tests/hosts/test_configs.py has the parsing and the plan of each of them
@pytest.mark.newest
@pytest.mark.timeout(900)
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the runs here are for machines without a GPU")
@pytest.mark.parametrize(
    ("name", "next_dir"),
    [
        pytest.param(
            "llava_lora",
            "",
            marks=pytest.mark.skipif(importlib.util.find_spec("llava") is None, reason="no LLaVA is installed"),
        ),
        pytest.param("llava_next_finetune_siglip2", host_runs.NEXT, marks=host_runs.NEEDS_NEXT),
    ],
)
def test_trained_killed_and_resumed(name, next_dir, tmp_path):
    command = [sys.executable, str(BENCHMARK), "--num_processes", "2", "--configs", name, "--steps", "4"]
    command += ["--out", str(tmp_path / "cells.json"), "--logs", str(tmp_path / "logs")]
    environment = {**os.environ, "LLAVA_NEXT_DIR": next_dir}
    ended = subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=800)
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-2000:]
    (cell,) = json.loads((tmp_path / "cells.json").read_text()).values()
    assert cell["result"] == "pass" and len(cell["losses"]) == 4 and len(cell["learning rates"]) == 2
    assert cell["repeated step"]["apart"] <= shipped_configs.TOLERANCE
