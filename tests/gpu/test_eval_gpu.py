"""`llava-packing eval` on a GPU, through lmms-eval's own command line: ``python -m pytest tests/gpu/test_eval_gpu.py``.

``LLAVA_PACKING_EVAL_CHECKPOINT``: a checkpoint of benchmarks/eval_checkpoint.py, taken instead of making a small one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parent.parent.parent
MADE = "LLAVA_PACKING_EVAL_CHECKPOINT"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.skipif(find_spec("lmms_eval") is None, reason="lmms-eval is not installed"),
    pytest.mark.timeout(900),
]


def run(*words: str) -> str:
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    command = [sys.executable, *words]
    result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert result.returncode == 0, result.stdout
    return result.stdout


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    if made := os.environ.get(MADE):
        return Path(made)
    folder = tmp_path_factory.mktemp("made") / "llava_llama_packing"
    run(str(REPOSITORY / "benchmarks" / "eval_checkpoint.py"), str(folder), "--tiny", "--steps", "250")
    return folder


def test_the_smoke_task_is_answered_on_the_gpu(checkpoint, tmp_path):
    words = ["--tasks", "smoke", "--num_gpus", "1", "--batch_size", "8", "--output_path", str(tmp_path)]
    out = run("-m", "llava_packing_tower", "eval", str(checkpoint), *words)
    log = (tmp_path / "smoke" / "log.txt").read_text()
    assert "rank 0 of 1 on cuda:0" in log and "HEVCViTPackingVisionTower in torch.bfloat16" in log, log
    results = json.loads(next((tmp_path / "smoke").rglob("*_results.json")).read_text())
    assert results["n-samples"]["smoke"]["effective"] == 16
    # A model that does not see the photos says the same word to all sixteen, or is right once by chance.
    assert results["results"]["smoke"]["exact_match,none"] >= 0.25, out
    assert (tmp_path / "results.md").is_file() and (tmp_path / "results.png").is_file()
