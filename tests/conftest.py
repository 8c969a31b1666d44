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


# The slowest groups of `pytest -n`, in the order in which they begin: a worker that began one last would end alone.
FIRST = ("trainings", "demo", "test_doc_blocks", "test_families_in_llava", "test_dealt_training", "test_distributed")


@pytest.hookimpl(tryfirst=True)  # before markers are chosen by -m, and before pytest-xdist reads the groups
def pytest_collection_modifyitems(items):
    """``newest_long`` is long with the newest transformers. Files that share a training are one group of `pytest -n`.

    After those of FIRST begin the groups that raised a time limit.
    """
    trainings: dict[Path, str] = {}
    raised: set[str] = set()
    for item in items:
        if item.get_closest_marker("newest_long"):
            item.add_marker(pytest.mark.newest)
            if FIVE:
                item.add_marker(pytest.mark.long)
        for fixture in {"trainings", "demo"} & set(item.fixturenames):
            trainings[item.path] = fixture
    for item in items:
        on_gpu = item.path.parent.name == "gpu"
        group = "gpu" if on_gpu else trainings.get(item.path, item.path.stem)
        item.add_marker(pytest.mark.xdist_group(group))
        if item.get_closest_marker("timeout") and not item.get_closest_marker("long"):
            raised.add(group)

    def place(item) -> int:
        group = item.get_closest_marker("xdist_group").args[0]
        return FIRST.index(group) if group in FIRST else len(FIRST) + (group not in raised)

    items.sort(key=place)


def chosen(request: pytest.FixtureRequest, parameter: str) -> set:
    """The values of a parameter in those tests of this file that run: what none of them asks for is not made."""
    calls = [getattr(item, "callspec", None) for item in request.session.items if item.path == request.path]
    return {call.params[parameter] for call in calls if call and parameter in call.params}


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


@pytest.fixture
def small_pictures(monkeypatch):
    """Conversions are verified, and families aligned, on pictures of a quarter of the sides, with patches of 4 pixels
    or more: the comparison is the same, and attention over thousands of patches takes most of its time."""
    from llava_packing_tower.convert import parity, test_images

    snapped, side_of = parity.snapped, test_images.Photographer.snapped
    monkeypatch.setattr(parity, "snapped", lambda size, patch: snapped(size // 4, patch))
    monkeypatch.setattr(test_images.Photographer, "snapped", lambda self, side: side_of(self, side // 4))


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
