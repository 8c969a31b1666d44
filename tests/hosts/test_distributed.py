"""Two processes, one of which never has an image: nothing hangs, under any engine, and all engines learn the same."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import host_runs
import pytest
import torch
from conftest import chosen
from safetensors.torch import load_file

from llava_packing_tower.checkpoint.hashing import tensor_digest

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
pytestmark = [
    # Looked for, not imported: in this process it may have to be another one (LLAVA_NEXT_DIR).
    pytest.mark.skipif(importlib.util.find_spec("llava") is None, reason="no LLaVA is installed"),
    pytest.mark.newest,
    pytest.mark.skipif(bool(host_runs.NEXT), reason="the worker builds the models of LLaVA 1.x"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="the runs here are for machines without a GPU"),
    pytest.mark.timeout(900),
]
# The decoder is packed in all but "ddp+padded", which is LLaVA's own step.
ENGINES = (
    "ddp",
    "ddp+padded",
    "zero2",
    "zero3",
    "fsdp",
    "zero2+fused",
    "zero3+fused",
    "fsdp+fused",
    "zero3+passes",
    "fsdp+passes",
)
FEW = ("ddp", "zero3+fused", "fsdp", "zero3+passes")  # with the newest transformers


def engines(names) -> pytest.MarkDecorator:
    marked = [pytest.param(name, marks=[] if name in FEW else pytest.mark.newest_long) for name in names]
    return pytest.mark.parametrize("engine", marked)


IDLE = (".encoder.layers.2.", ".layernorm_post.", ".head.")  # above the selected layer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="module")
def results(folder, request):
    """What the worker reports of each engine. A rank that waits for ever fails this by the time limit."""
    script = Path(__file__).parents[1] / "helpers" / "distributed_worker.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_addr", "127.0.0.1"]
    command += ["--master_port", str(host_runs.free_port()), str(script), str(folder)]
    command += [name for name in ENGINES if name in {"ddp", *chosen(request, "engine")}]
    extra = {"LOCAL_SIZE": "2", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(host_runs.REPOSITORY)}
    done = host_runs.execute(command, {**host_runs.environment(""), **extra}, timeout=840)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    lines = (folder / "results.jsonl").read_text().splitlines()  # (on stdout the two ranks write into each other)
    return {entry["engine"]: entry for entry in map(json.loads, lines)}


@engines(ENGINES)
def test_a_rank_without_images_takes_part(results, folder, engine):
    result = results[engine]
    on_disk = {k: tensor_digest(v) for k, v in load_file(folder / "llava_tiny" / "model.safetensors").items()}
    assert result["start"] == on_disk  # under ZeRO-3 loaded by parts
    assert result["partitioned"] == (sum("vision_tower" in name for name in on_disk) if "zero3" in engine else 0)
    assert len(result["losses"]) == 40 and result["ranks differ in"] == []
    if "fsdp" not in engine:  # there a rank holds gradients for its own share only
        assert result["without gradient"] == []
    # Everything was trained but the weights above the selected layer: image_newline and the tower's first layers too.
    assert set(result["unchanged"]) == {name for name in on_disk if any(word in name for word in IDLE)}


@engines(ENGINES[1:])
def test_engines_learn_the_same(results, folder, engine):
    """In float32, 20 steps of two accumulated batches, against DDP."""
    expected, found = (torch.load(folder / f"{name}.pt", weights_only=True) for name in ("ddp", engine))
    start = load_file(folder / "llava_tiny" / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        moved = (tensor - start[name]).abs().max().item()
        assert (found[name] - tensor).abs().max().item() <= 1e-3 * moved + 1e-6, name
    assert results[engine]["losses"] == pytest.approx(results["ddp"]["losses"], abs=1e-4)


@engines(name for name in ENGINES if "passes" in name)
def test_every_rank_makes_as_many_passes_as_the_one_that_needs_most(results, engine):
    """Rank 1, whose samples are text alone, has one blank image for each of them."""
    first, second = results[engine]["passes"]
    assert len(first) == len(second) > 1.5 * len(results[engine]["losses"])
    assert sum(first) > sum(second)  # images of many patches, and blanks
