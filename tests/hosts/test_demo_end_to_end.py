"""The whole demo with two training steps: too few for right answers, enough for everything else to be true."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_packing_tower.data.sample_photos import PHOTOS
from llava_packing_tower.tools.demo import pipeline, report
from llava_packing_tower.train.history import TOWER_RECORD

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.timeout(600)
def test_demo_trains_reloads_and_fails_for_its_answers_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    output = tmp_path / "out"
    words = ["--max_steps", "2", "--warmup_steps", "0"]
    assert pipeline.run_demo(Path("configs/demo.yaml"), output, words) == 1

    table = json.loads((output / "table.json").read_text())
    passed = {check["name"]: check["passed"] for check in table["checks"]}
    wanted = {"answers": False, "reload": True, "tower trained": True, "engine": True}
    if find_spec("lmms_eval") is not None:
        wanted["lmms-eval"] = False
    assert passed == wanted, table["checks"]
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

    # One bit of one tower tensor of the checkpoint, and the next reload is caught.
    plan = pipeline.make_plan(Path("configs/demo.yaml"), output, words)
    file = plan.path("output_dir") / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("vision_tower.layernorm_pre.bias"))
    tensors[name].view(torch.int16)[3] ^= 1
    save_file(tensors, file, metadata={"format": "pt"})
    trained = json.loads((plan.path("output_dir") / TOWER_RECORD).read_text())["tensors"]
    verdict = report.check_reload(trained, pipeline.ask(plan, plan.path("output_dir"), "damaged")["tower"])
    assert not verdict.passed and "1 of 39" in verdict.detail and "layernorm_pre.bias" in verdict.detail
