"""benchmarks/native_vs_anyres.py in small: it compares what it says, on a real host."""

import importlib.util
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from llava_packing_tower.data.smart_resize import SmartResize

pytestmark = pytest.mark.newest
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "native_vs_anyres.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("native_vs_anyres", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    # A NamedTuple with annotations as text looks its module up.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_the_budget_is_met_by_the_smallest_bound_that_does(script):
    sizes = [(640, 480), (333, 500), (640, 304)]

    def mean(least):
        grids = [SmartResize(14, (1, 1), least, 2304).grid(*size) for size in sizes]
        return statistics.mean(rows * (columns + 1) for rows, columns in grids)

    for tokens in (1500, 2000, 2250):
        least = script.fewest_patches(sizes, 2304, tokens)
        assert mean(least) >= tokens > mean(least - 1)


@pytest.mark.long
def test_a_run_in_small(tmp_path):
    pytest.importorskip("llavaction" if not os.environ.get("LLAVA_NEXT_DIR") else "PIL", reason="needs a host")
    command = [sys.executable, str(SCRIPT), "--tiny", "--rounds", "1", "--json", str(tmp_path / "found.json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stdout + result.stderr
    report = json.loads((tmp_path / "found.json").read_text())
    anyres, same, own = report["modes"].values()
    # Tiles of 4 x 4 patches: the whole photo and one to four more. Padding is encoded, and then cut away.
    assert 16 * 3 <= anyres["patches per sample"] <= 16 * 5
    assert anyres["visual tokens per sample"] < anyres["patches per sample"]
    tokens = same["visual tokens per sample"]
    assert tokens == pytest.approx(anyres["visual tokens per sample"], rel=0.02)
    # At native resolution what is encoded is what the decoder gets, beside a newline for each of 4 to 10 rows.
    assert 4 <= tokens - same["patches per sample"] <= 10
    assert own["patches per sample"] < same["patches per sample"] < anyres["patches per sample"]
    for rates in report["samples/s of each round"].values():
        assert all(len(each) == 1 and each[0] > 0 for each in rates.values())
    assert list(report["samples/s of each round"]) == ["features", "first token", "training"]
    assert "native, same tokens" in result.stdout
