import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # else each of them takes all cores
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // int(workers))))
    sys.argv[0] = "pytest"  # a worker's is "-c", which is an option of lmms-eval

import pytest
import torch
import transformers
from launch_files import files  # noqa: F401  (a fixture)
from safetensors.torch import load_file

FIVE = int(transformers.__version__.split(".")[0]) >= 5
only_four = pytest.mark.skipif(FIVE, reason="transformers 4")
only_five = pytest.mark.skipif(not FIVE, reason="needs transformers 5")
GOLDEN = Path(__file__).parent / "golden"
ATOL = 2e-5  # float32 noise between correct implementations is below 1e-5; the smallest structural mistake is 4.7e-5


def unusable(backend: str, dtype: torch.dtype, head_dim: int, needs_grad: bool = False) -> str | None:
    """Why an attention backend cannot be used on this GPU (a build may lack a dtype), or None."""
    from llava_packing_tower.attention.dispatch import resolve_backend

    try:
        resolve_backend(backend, "cuda", dtype, head_dim, needs_grad=needs_grad)
    except (ImportError, ValueError) as error:
        return str(error)


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items):
    """For `pytest -n`: files that share a training are one group, and the long ones begin.

    Long are the files with a training, and those that raised their time limit.
    """
    trainings: dict[Path, str] = {}
    long: set[str] = set()
    for item in items:
        for fixture in {"trainings", "demo"} & set(item.fixturenames):
            trainings[item.path] = fixture
    for item in items:
        on_gpu = item.path.parent.name == "gpu"
        group = "gpu" if on_gpu else trainings.get(item.path, item.path.stem)
        item.add_marker(pytest.mark.xdist_group(group))
        if item.path in trainings or item.get_closest_marker("timeout"):
            long.add(group)
    items.sort(key=lambda item: item.get_closest_marker("xdist_group").args[0] not in long)


def pytest_terminal_summary(terminalreporter):
    """How many tests each reason has kept from running: a host that is absent must not go unnoticed."""
    reasons: dict[str, int] = {}
    for report in terminalreporter.stats.get("skipped", []):
        reason = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
        reason = reason.removeprefix("Skipped: ")
        reasons[reason] = reasons.get(reason, 0) + 1
    if reasons:
        terminalreporter.section("tests that were skipped, by reason")
    for reason, count in sorted(reasons.items(), key=lambda pair: -pair[1]):
        terminalreporter.line(f"{count:>4}  {reason}")


@pytest.fixture(scope="session")
def golden():
    return GOLDEN


@pytest.fixture
def golden_case(golden):
    """``golden_case("llava_vit", "mixed")`` -> tensors of one reference case."""
    return lambda folder, case: load_file(golden / folder / f"case_{case}.safetensors")


@pytest.fixture(scope="session")
def trainings(tmp_path_factory):
    """Trainings of a real host, each run once for all tests."""
    from host_runs import Trainings

    return Trainings(tmp_path_factory.mktemp)


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """The demo's model, untrained and trained, with its photos."""
    from evaluation_runs import make_demo

    return make_demo(tmp_path_factory.mktemp("demo"))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    yield
    # transformers 4.40 does not put the default dtype back where loading raises.
    torch.set_default_dtype(torch.float32)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, atol: float = ATOL) -> None:
    """Absolute comparison, no relative slack; shapes must agree."""
    assert actual.shape == expected.shape, (tuple(actual.shape), tuple(expected.shape))
    worst = (actual.float() - expected.float()).abs().max().item()
    assert worst <= atol, f"largest difference {worst:.3e} > {atol:.1e}"
