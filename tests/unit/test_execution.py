"""The one decision for how a forward runs, and the switches that it reads."""

import logging
import re
from dataclasses import FrozenInstanceError
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llava_packing_tower.attention import dispatch
from llava_packing_tower.models.layers import BlockConfig
from llava_packing_tower.models.runtime import cuda_graphs, execution
from llava_packing_tower.models.runtime.execution import ExecutionPlan, make_plan
from llava_packing_tower.models.runtime.module_state import Snapshot
from llava_packing_tower.utils import environment

ROOT = Path(__file__).parents[2]
CONFIG = BlockConfig(32, 48, 2, "gelu")
WEIGHT = torch.nn.Parameter(torch.zeros(2, 2, dtype=torch.bfloat16), requires_grad=False)


@pytest.fixture
def gpu(monkeypatch):
    """A GPU as far as the decision goes: states that say so, a backend for them, kernels that run."""
    module = SimpleNamespace(VARLEN=True, unsupported_reason=lambda *_: None, attend=None)
    monkeypatch.setitem(dispatch.BACKENDS, "gpu_varlen", "gpu_varlen")
    monkeypatch.setitem(dispatch._LOADED, "gpu_varlen", module)
    monkeypatch.setattr(execution, "kernels_work", lambda device: True)
    monkeypatch.setattr(cuda_graphs.torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(execution, "resolve_backend", lambda name, *_, **__: "gpu_varlen" if name == "auto" else name)
    monkeypatch.setattr(execution, "is_autocast", lambda device: False)
    execution._log.cache_clear()

    def plan(tokens=100, dtype=torch.bfloat16, weights=(WEIGHT,), hooked=False, foreign=None, grad=False, **options):
        states = SimpleNamespace(device=torch.device("cuda", 0), dtype=dtype, shape=(tokens, 32))
        config = options.pop("config", CONFIG)
        return make_plan(config, states, (tokens,), Snapshot(list(weights), hooked, foreign, 1), grad, **options)

    return plan


def test_the_default_in_half_precision_on_a_gpu(gpu):
    assert gpu() == ExecutionPlan("fused", True, "gpu_varlen")
    with pytest.raises(FrozenInstanceError):
        gpu().path = "eager"


FLOAT = torch.nn.Parameter(torch.zeros(1))


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"fused": False}, "requested"),
        ({"foreign": "layers.0.mlp.fc1 is a peft.Linear"}, "layers.0.mlp.fc1 is a peft.Linear"),
        ({"fused": True, "foreign": "a hook"}, "a hook"),
        ({"weights": ()}, "the modules have no parameters"),
        ({"attention": "sdpa"}, "sdpa runs segment by segment"),
        ({"config": BlockConfig(32, 48, 2, "quick_gelu")}, "no kernel for quick_gelu"),
        ({"weights": (FLOAT,)}, "weights in torch.float32, states in torch.bfloat16"),
        ({"weights": (FLOAT,), "dtype": torch.float32}, "in torch.float32"),
    ],
)
def test_what_makes_blocks_eager(gpu, options, reason):
    plan = gpu(**options)
    assert (plan.path, plan.graph, plan.reason) == ("eager", False, reason)


def test_kernels_that_do_not_run(gpu, monkeypatch):
    monkeypatch.setattr(execution, "kernels_work", lambda device: False)
    assert gpu().reason == "Triton kernels do not run here"


def test_autocast_is_fused_with_weights_in_single_precision(gpu, monkeypatch):
    monkeypatch.setattr(execution, "is_autocast", lambda device: True)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda kind: torch.bfloat16)
    assert gpu(weights=(FLOAT,), dtype=torch.float32).path == "fused"


@pytest.mark.parametrize("options", [{"grad": True}, {"hooked": True}, {"tokens": cuda_graphs.MAX_TOKENS + 1}])
def test_what_is_fused_without_a_graph(gpu, options):
    assert gpu(**options) == ExecutionPlan("fused", False, "gpu_varlen")


def test_a_plan_is_logged_once(gpu, caplog):
    with caplog.at_level(logging.INFO, logger=execution.__name__):
        for _ in range(3):
            gpu()
            gpu(fused=False)
    assert [record.message for record in caplog.records] == [
        "encoder blocks: fused, CUDA graphs, attention by gpu_varlen",
        "encoder blocks: eager (requested), no CUDA graphs, attention by gpu_varlen",
    ]


# ---------------------------------------------------------------- the environment


def test_switches(gpu, monkeypatch, caplog):
    monkeypatch.setenv("LLAVA_PACKING_CUDA_GRAPHS", "0")
    assert gpu() == ExecutionPlan("fused", False, "gpu_varlen")
    monkeypatch.setenv("LLAVA_PACKING_FUSED", "0")
    assert gpu().reason == "requested" and gpu(fused=True).path == "fused"
    monkeypatch.setenv("LLAVA_PACKING_FUSED", "1")
    monkeypatch.setenv("LLAVA_PACKING_COMPILE", "0")  # the new name counts
    assert gpu().path == "fused"
    assert [record for record in caplog.records if record.levelname == "WARNING"] == []


@pytest.mark.parametrize("name", [environment.FUSED, environment.GRAPHS])
def test_a_bad_switch_is_named(gpu, monkeypatch, name):
    monkeypatch.setenv(name, "off")
    with pytest.raises(ValueError, match=f"{name} must be 0 or 1, got 'off'"):
        gpu()


@pytest.mark.parametrize(
    "new, old, value",
    [
        (environment.FUSED, "LLAVA_PACKING_COMPILE", "0"),
        (environment.DISABLE_PATCHES, "LLAVA_PACKING_DISABLE_MENDS", "fwd_kw"),
    ],
)
def test_an_old_name_is_read_with_a_warning(monkeypatch, caplog, new, old, value):
    environment._warn.cache_clear()
    monkeypatch.setenv(old, value)
    assert [environment.read(new) for _ in range(2)] == [value, value]
    assert [record.message for record in caplog.records] == [f"{old} is the old name of {new}: please use the new name"]
    monkeypatch.setenv(new, "1")
    assert environment.read(new) == "1"


def test_every_variable_is_in_the_table_and_in_the_docs():
    text = "".join(p.read_text(encoding="utf-8") for p in (ROOT / "llava_packing_tower").rglob("*.py"))
    named = set(re.findall(r'"(LLAVA_(?:(?:PACKING|NEXT)_[A-Z_]+|DIR))"', text))
    old = {name for variable in environment.VARIABLES.values() for name in variable.old}
    assert named == environment.VARIABLES.keys() | old
    docs = (ROOT / "docs" / "environment.md").read_text(encoding="utf-8")
    for variable in environment.VARIABLES.values():
        names = ", ".join(f"`{name}`" for name in variable.old) or "-"
        assert f"| `{variable.name}` | {variable.values} | {variable.meaning} | {names} |" in docs
