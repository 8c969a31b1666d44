"""The packed training step in the models of the real hosts; the checks are in ``packed_step_checks.py``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import packed_step_checks
import pytest
from host_runs import HOSTS, REPOSITORY, environment, execute, needs_host

pytestmark = [pytest.mark.timeout(600), pytest.mark.newest, needs_host]


@pytest.fixture(scope="module", params=HOSTS)
def results(request, tmp_path_factory):
    """What every check said, from one process for each host."""
    folder = tmp_path_factory.mktemp("packed_step")
    command = [sys.executable, str(Path(packed_step_checks.__file__)), str(folder)]
    result = execute(command, {**environment(request.param), "PYTHONPATH": str(REPOSITORY)}, timeout=500)
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", packed_step_checks.CHECKS)
def test_check(results, name):
    assert results[name] is None, results[name]
