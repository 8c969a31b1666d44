"""`llava-packing export`: exports say what the LLaVA that they come from says, in every mode, family and decoder."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from export_host_checks import CAN_LOAD, CASES, NEXT_CASES
from host_runs import HOSTS, environment, execute

pytestmark = [
    pytest.mark.newest,
    pytest.mark.skipif(find_spec("llava") is None, reason="no LLaVA is installed"),
]
HELPERS = Path(__file__).parents[1] / "helpers"


@pytest.mark.timeout(600)
@pytest.mark.parametrize("next_dir", HOSTS)
def test_logits_and_answers_are_those_of_llava(tmp_path, next_dir):
    """Float32, 1e-5; one image, several, none, a video; each alone and all in one batch, token by token."""
    env = {**environment(next_dir), "PYTHONPATH": f"{HELPERS.parents[1]}"}
    result = execute([sys.executable, str(HELPERS / "export_host_checks.py"), str(tmp_path)], env)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-5000:]
    cases = len(CASES) + (len(NEXT_CASES) if next_dir else 0)
    assert len(list(tmp_path.glob("case_*/model.safetensors"))) == cases
    assert result.stdout.count("compared") == (cases if CAN_LOAD else 0)
