"""The checks of one module, as tests of a pytest in a process of its own: a process can import one LLaVA only.

``host_runs.run_checks`` starts it; HOST_CHECKS names the module, which has CHECKS (functions by name) and
``make(folder)``, what each of them is given.
"""

import importlib
import os

import pytest
import torch

import builder_patch  # noqa: F401

MODULE = importlib.import_module(os.environ["HOST_CHECKS"])


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    return MODULE.make(tmp_path_factory.mktemp("host"))


@pytest.mark.parametrize("name", MODULE.CHECKS)
def test_check(name, subject):
    torch.manual_seed(0)
    MODULE.CHECKS[name](subject)
