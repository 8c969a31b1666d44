"""The packed training step in the models of the real hosts; the checks are in ``packed_step_checks.py``."""

from __future__ import annotations

import packed_step_checks
import pytest
from host_runs import HOSTS, needs_host, run_checks

pytestmark = [pytest.mark.timeout(900), pytest.mark.newest, needs_host]


@pytest.fixture(scope="module", params=HOSTS)
def results(request, tmp_path_factory):
    """What every check said, from one process for each host."""
    folder = tmp_path_factory.mktemp("packed_step")
    return run_checks("packed_step_checks", request.param, folder, timeout=500)


@pytest.mark.parametrize("name", packed_step_checks.CHECKS)
def test_check(results, name):
    assert results[name] is None, results[name]
