"""benchmarks/attention_kernels.py in small: what it measures, and what it says no to."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "attention_kernels.py"


def run(*words):
    return subprocess.run([sys.executable, str(SCRIPT), *words], capture_output=True, text=True, timeout=300)


@pytest.mark.long
def test_each_backend_that_can_run_is_measured(tmp_path):
    result = run("--segments", "3x5,ragged2*0.1", "--heads", "2x8", "--json", str(tmp_path / "kernels.json"))
    assert result.returncode == 0, result.stderr
    equal, ragged = json.loads((tmp_path / "kernels.json").read_text())["rows"]
    assert (equal["tokens"], equal["count"], equal["mean"]) == (15, 3, 5) and ragged["count"] == 2
    for row in (equal, ragged):
        assert row["auto"] == ["sdpa", "sdpa"]
        assert {"sdpa", "eager"} <= row["ms"].keys()
        for times in row["ms"].values():
            assert times.keys() == {"forward_ms", "backward_ms"} and min(times.values()) > 0


def test_segments_of_another_form():
    result = run("--segments", "3by5")
    assert result.returncode and "COUNTxLENGTH, raggedN or raggedN*SCALE" in result.stderr
