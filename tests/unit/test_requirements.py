"""requirements/*.txt: what is installed into one environment names one version of each package."""

import re
from collections import defaultdict
from pathlib import Path

import pytest

REQUIREMENTS = Path(__file__).parents[2] / "requirements"
# As the Makefile has them. (next.txt has the packages of LLaVA-NeXT, which needs an older fsspec.)
ENVIRONMENTS = {
    ".venv": ("torch", "base", "deepspeed", "host", "demo", "eval", "dev", "docs"),
    ".venv-new": ("torch", "newest", "demo", "dev", "newest_host"),
}


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_lists_of_one_environment_agree(environment):
    versions = defaultdict(dict)
    for name in ENVIRONMENTS[environment]:
        text = (REQUIREMENTS / f"{name}.txt").read_text(encoding="utf-8")
        for package, version in re.findall(r"^([\w.\-]+)==([^\s;]+)", text, re.M):
            versions[package.lower().replace("_", "-")][f"{name}.txt"] = version
    assert len(versions) > 30
    assert {package: found for package, found in versions.items() if len(set(found.values())) > 1} == {}
