"""benchmarks/training_step.py in small: what it counts, and that it runs on a real host."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytestmark = [pytest.mark.newest, pytest.mark.timeout(300)]
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "training_step.py"


@pytest.fixture
def parts(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import training_step_parts

    return training_step_parts


def test_operations_of_a_step(parts):
    """By hand: one layer of width 4 with 2 heads of 2, one of them for keys; one tower layer of width 3."""
    sizes = {"hidden_size": 4, "intermediate_size": 5, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = SimpleNamespace(**sizes, num_key_value_heads=1, vocab_size=7)
    tower = {"hidden_size": 3, "intermediate_size": 6, "num_hidden_layers": 1}
    q, k, v, o, mlp = 2 * 4 * 4, 2 * 4 * 2, 2 * 4 * 2, 2 * 4 * 4, 3 * 2 * 4 * 5
    decoder = (6 + 2) * (q + k + v + o + mlp) + (6 * 6 + 2 * 2) / 2 * 4 * 4  # half of q k and of weights v
    head = 3 * 2 * 4 * 7
    encoder = 9 * (4 * 2 * 3 * 3 + 2 * 2 * 3 * 6) + 9 * 9 * 4 * 3
    assert parts.step_flops(config, tower, [6, 2], [9], 3) == 3 * (decoder + head + encoder)


@pytest.mark.next
@pytest.mark.skipif(not os.environ.get("LLAVA_NEXT_DIR"), reason="LLAVA_NEXT_DIR is not set")
def test_in_small(tmp_path):
    command = [sys.executable, str(SCRIPT), "--json", str(tmp_path / "out.json"), "--tiny", "--quick", "--rounds", "1"]
    done = subprocess.run([*command, "--limit", "200"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["gradients"]["tensors above twice"] == 0 and "on (sdpa)" in report["gradients"]["plans"]["ours"]
    assert set(report["against stock"]) == {"native", "anyres"} and len(report["systems"]) == 6
    for name, row in report["systems"].items():
        assert row["samples/s"] > 0 and 0 < row["MFU"] < 1 and row["tokens"] <= row["padded to"], name
        assert row["plan"] == "the host's" if "stock" in name else "packed decoder: on (sdpa)" in row["plan"]
        assert all(loss > 0 for loss in row["losses"])
