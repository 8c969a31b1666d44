"""Native resolution in the models of the real hosts; the checks themselves are in ``native_checks.py``."""

from __future__ import annotations

import native_checks
import pytest
from host_runs import HOSTS, run_checks

# One process per host does all of them: minutes, where others work on the machine too.
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module", params=HOSTS)
def results(request, tmp_path_factory):
    """What every check said, from one process for each host."""
    folder = tmp_path_factory.mktemp("native")
    return run_checks("native_checks", request.param, folder, timeout=800)


@pytest.mark.parametrize("name", native_checks.CHECKS)
def test_check(results, name):
    assert results[name] is None, results[name]
