"""Native resolution in the models of the real hosts; the checks themselves are in ``native_checks.py``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import native_checks
import pytest
from host_runs import HOSTS, REPOSITORY, environment, execute

# One process per host does all of them: minutes, where others work on the machine too.
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module", params=HOSTS)
def results(request, tmp_path_factory):
    """What every check said, from one process for each host."""
    folder = tmp_path_factory.mktemp("native")
    command = [sys.executable, str(Path(native_checks.__file__)), str(folder)]
    result = execute(command, {**environment(request.param), "PYTHONPATH": str(REPOSITORY)}, timeout=800)
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", native_checks.CHECKS)
def test_check(results, name):
    assert results[name] is None, results[name]
