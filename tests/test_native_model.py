"""Native resolution in the models of the real hosts; the checks themselves are in ``native_checks.py``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import native_checks
import pytest

REPOSITORY = Path(__file__).parent.parent
NEXT = os.environ.get("LLAVA_NEXT_DIR")
HOSTS = [
    pytest.param("", id="llava_v1"),
    pytest.param(
        NEXT,
        id="llava_next",
        marks=[pytest.mark.next, pytest.mark.skipif(not NEXT, reason="LLAVA_NEXT_DIR is not set")],
    ),
]


@pytest.fixture(scope="module", params=HOSTS)
def results(request, tmp_path_factory):
    """What every check said, from one process for each host."""
    folder = tmp_path_factory.mktemp("native")
    environment = {**os.environ, "LLAVA_NEXT_DIR": request.param, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, str(Path(native_checks.__file__)), str(folder)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=REPOSITORY, timeout=280)
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", native_checks.CHECKS)
def test_check(results, name):
    assert results[name] is None, results[name]
