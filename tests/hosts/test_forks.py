"""LLaVA's forks, as packages with their layouts and signatures: what of the hook attaches, and what is left alone."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import warm
from fork_layouts import LAYOUTS, TINYLLAVA, VILA, write, write_files

from llava_packing_tower.integrations.llava import registry
from llava_packing_tower.train.launcher import make_plan
from llava_packing_tower.utils.errors import UsageError

pytestmark = pytest.mark.newest
REPOSITORY = Path(__file__).parents[2]
OFF = "no: "


def run(clone: Path, folder: Path) -> dict:
    """The report of benchmarks/fork_checks.py, in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    environment.pop("LLAVA_NEXT_DIR", None)
    folder.mkdir()
    checks = str(REPOSITORY / "benchmarks" / "fork_checks.py")
    result = warm.execute([sys.executable, checks, str(folder), str(clone)], environment)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return {**json.loads(result.stdout.splitlines()[-1]), "stderr": result.stderr}


IN_EVERY_RUN = ("onevision", "bunny", "geochat")  # the others have less that is their own


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in IN_EVERY_RUN else [pytest.mark.long]) for n in LAYOUTS]
)
def test_all_of_the_hook_attaches(name, tmp_path):
    write(LAYOUTS[name], tmp_path / "clone")
    report = run(tmp_path / "clone", tmp_path / "work")
    tail = report.pop("stderr")[-3000:]
    for part in ("builder", "native resolution", "text-only batches", "training step", "reload"):
        assert report[part] == "yes", (part, report, tail)
    assert report["packed decoder"] == "yes" or report["packed decoder"].startswith(OFF), (report, tail)
    assert report["stubs"] == [], report
    assert isinstance(report["training"], dict), (report, tail)
    assert report["training"].get("step", "yes") == "yes", (report, tail)


LEFT_ALONE = """
import logging, sys, types
logging.basicConfig(stream=sys.stdout, format="%(message)s")
sys.path.insert(0, {clone!r})
import builder_patch
import llava
from llava.model.multimodal_encoder import builder
from llava.model import llava_arch
import llava.model.builder, llava.train.train
import importlib; importlib.reload(llava)
config = types.SimpleNamespace(resume_path=None)
assert builder.build_vision_tower("google/siglip", config).name == "google/siglip"
assert builder.build_vision_tower(None, config) is None
assert llava_arch.build_vision_tower is builder.build_vision_tower
for module in (builder, llava_arch, llava.model.builder, llava.train.train):
    for value in vars(module).values():
        assert not hasattr(value, "_llava_packing_original") and not hasattr(value, "_llava_packing_steps"), value
"""


def test_a_host_with_other_signatures_is_left_alone_and_named_once(tmp_path):
    write_files(VILA, tmp_path)
    environment = {name: value for name, value in os.environ.items() if name not in ("LLAVA_DIR", "LLAVA_NEXT_DIR")}
    environment["PYTHONPATH"] = str(REPOSITORY)
    result = warm.execute([sys.executable, "-c", LEFT_ALONE.format(clone=str(tmp_path))], environment)
    assert result.returncode == 0, result.stderr
    (said,) = [line for line in result.stdout.splitlines() if "left as it is" in line]
    assert "build_vision_tower(model_name_or_path, config) takes no vision_tower_cfg" in said
    assert "Packing towers, native resolution, the packed training step" in said


REGISTRY = """
import logging, sys
logging.basicConfig(stream=sys.stdout, format="%(message)s")
sys.path.insert(0, {clone!r})
import builder_patch
import tinyllava.model
from tinyllava.model import vision_tower
import importlib; importlib.reload(tinyllava)
assert vision_tower.VISION_TOWER_FACTORY.keys() == {{"clip"}}
assert vision_tower.VisionTowerFactory("openai/clip:x")("own").config == "own"
for module in (tinyllava.model, tinyllava.model.modeling_tinyllava, vision_tower):
    for value in vars(module).values():
        assert not hasattr(value, "_llava_packing_original") and not hasattr(value, "_llava_packing_steps"), value
"""


def test_a_registry_of_towers_is_left_alone_and_named_once(tmp_path, monkeypatch):
    """TinyLLaVA: said when it is imported, and when its clone is named."""
    write_files(TINYLLAVA, tmp_path)
    environment = {name: value for name, value in os.environ.items() if name not in ("LLAVA_DIR", "LLAVA_NEXT_DIR")}
    environment["PYTHONPATH"] = str(REPOSITORY)
    result = warm.execute([sys.executable, "-c", REGISTRY.format(clone=str(tmp_path))], environment)
    assert result.returncode == 0, result.stderr
    (said,) = [line for line in result.stdout.splitlines() if "left as it is" in line]
    assert "by a registry (register_vision_tower)" in said and "Packing towers, native resolution" in said
    monkeypatch.delenv("LLAVA_NEXT_DIR", raising=False)
    monkeypatch.setenv("LLAVA_DIR", str(tmp_path))
    with pytest.raises(ValueError, match=r"LLAVA_DIR=.*tinyllava in .* is left as it is: TinyLLaVA makes its towers"):
        registry.find_host()
    assert str(tmp_path) not in sys.path


def test_a_clone_of_it_is_refused_with_the_reason(tmp_path, monkeypatch):
    write_files(VILA, tmp_path)
    monkeypatch.delenv("LLAVA_NEXT_DIR", raising=False)
    monkeypatch.setenv("LLAVA_DIR", str(tmp_path))
    with pytest.raises(ValueError, match=r"LLAVA_DIR=.*takes no vision_tower_cfg(.|\n)*Known are:"):
        registry.find_host()
    assert str(tmp_path) not in sys.path


def test_a_host_with_a_training_of_its_own_is_not_launched(tmp_path, monkeypatch):
    write(LAYOUTS["geochat"], tmp_path / "clone")
    monkeypatch.delenv("LLAVA_NEXT_DIR", raising=False)
    monkeypatch.setenv("LLAVA_DIR", str(tmp_path / "clone"))
    try:
        with pytest.raises(UsageError, match=r"GeoChat .* is not trained by this command"):
            make_plan(tmp_path / "config.yaml")
    finally:
        registry.take_off_path()


def test_a_package_that_only_has_the_name_is_not_mentioned(tmp_path):
    (tmp_path / "llava").mkdir()
    assert registry.recognise("llava", tmp_path / "llava") == (None, None)


def test_the_clone_may_be_named_by_either_variable(tmp_path, monkeypatch):
    clones = [tmp_path / "a", tmp_path / "b"]
    for clone in clones:
        write(LAYOUTS["onevision"], clone / "llava_next")
    for name in ("LLAVA_DIR", "LLAVA_NEXT_DIR"):
        monkeypatch.delenv(name, raising=False)
    for name, folder in (("LLAVA_DIR", clones[0]), ("LLAVA_NEXT_DIR", clones[0] / "llava_next")):
        with monkeypatch.context() as patch:
            patch.setenv(name, str(folder))
            patch.delitem(sys.modules, "llava", raising=False)
            found = registry.find_host()
            assert found.host.name == "onevision" and found.root == clones[0] / "llava_next" / "llava"
            registry.take_off_path()
    monkeypatch.setenv("LLAVA_DIR", str(clones[0]))
    monkeypatch.setenv("LLAVA_NEXT_DIR", str(clones[1]))
    with pytest.raises(ValueError, match=r"LLAVA_DIR is .*/a, but LLAVA_NEXT_DIR is .*/b: set one of them"):
        registry.find_host()
