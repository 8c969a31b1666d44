"""The whole demo, as `make demo` runs it: what it says is true, and its checks fail where they should."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_packing_tower.data.sample_photos import PHOTOS
from llava_packing_tower.tools.demo import pipeline, report
from llava_packing_tower.train.history import TOWER_RECORD


@pytest.mark.timeout(900)
def test_demo_trains_reloads_and_answers(demo, tmp_path):
    output = demo.output
    table = json.loads((output / "table.json").read_text())
    passed = {check["name"]: check["passed"] for check in table["checks"]}
    wanted = {"answers", "reload", "tower trained", "engine", *(["lmms-eval"] if find_spec("lmms_eval") else [])}
    assert passed == dict.fromkeys(wanted, True), table["checks"]
    assert len(table["photos"]) == len(PHOTOS)
    assert all(photo["patches"] == photo["grid"][0] * photo["grid"][1] > 0 for photo in table["photos"])
    # At native resolution every patch is a token, and photos of other shapes have other grids.
    assert all(photo["tokens"] == photo["patches"] for photo in table["photos"])
    assert len({tuple(photo["grid"]) for photo in table["photos"]}) >= 5
    assert sorted(path.stem for path in (output / "patches").glob("*.png")) == sorted(
        Path(photo.name).stem for photo in PHOTOS
    )
    for name in ("loss.png", "table.md", "logs/training.log"):
        assert (output / name).stat().st_size > 0

    # The untrained model fails the check that the trained one passes.
    rows = [
        report.Row(p["photo"], 1, 1, tuple(p["grid"]), 1, p["expected"], p["before"], p["before"])
        for p in table["photos"]
    ]
    assert not report.check_answers(rows).passed

    # One bit of one tower tensor of the checkpoint, and the next reload is caught.
    plan = pipeline.make_plan(Path("configs/demo.yaml"), tmp_path, [])
    (tmp_path / "logs").mkdir()
    for folder in ("data", "models", demo.trained.name):
        shutil.copytree(output / folder, tmp_path / folder)
    file = plan.path("output_dir") / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("vision_tower.layernorm_pre.bias"))
    tensors[name].view(torch.int16)[3] ^= 1
    save_file(tensors, file, metadata={"format": "pt"})
    trained = json.loads((plan.path("output_dir") / TOWER_RECORD).read_text())["tensors"]
    verdict = report.check_reload(trained, pipeline.ask(plan, plan.path("output_dir"), "damaged")["tower"])
    assert not verdict.passed and "1 of 39" in verdict.detail and "layernorm_pre.bias" in verdict.detail
