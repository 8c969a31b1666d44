"""Sizes of samples before they are read, in the real hosts; the checks are in ``sample_sizes_checks.py``."""

from __future__ import annotations

import pytest
import sample_sizes_checks
from host_runs import HOSTS, needs_host, run_checks

pytestmark = [pytest.mark.timeout(900), pytest.mark.newest, needs_host]


@pytest.fixture(scope="module", params=HOSTS)
def results(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample_sizes")
    return run_checks("sample_sizes_checks", request.param, folder, timeout=800)


@pytest.mark.parametrize("name", sample_sizes_checks.CHECKS)
def test_check(results, name):
    assert results[name] is None, results[name]
