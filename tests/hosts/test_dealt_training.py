"""Dealt samples in the host's own training loop: losses and gradients are those of its own order, under any engine."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections import Counter
from pathlib import Path

import host_runs
import pytest
import torch

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("llava") is None, reason="no LLaVA is installed"),
    pytest.mark.newest,
    pytest.mark.skipif(bool(host_runs.NEXT), reason="the worker builds the models of LLaVA 1.x"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="the runs here are for machines without a GPU"),
    pytest.mark.timeout(400),
]
SAMPLES, BATCH, ACCUMULATION, LIMIT, BUDGET = 50, 3, 2, 150, 230  # of dealing_worker.py
DDP = ("host", "dealt", "tokens undealt", "tokens", "budget", "large budget", "refused", "truncated host", "truncated")
DEEPSPEED = ("host", "dealt", "budget", "large budget")
ENGINES = {"ddp": (2, DDP), "zero2": (2, DEEPSPEED), "zero3": (2, DEEPSPEED), "zero3 of 4": (4, ("host", "dealt"))}
# Left: in LLaVA's order. Right: what must have the same gradients.
EQUAL = [
    *((engine, "host", run) for engine, (_, runs) in ENGINES.items() for run in runs if run in DEEPSPEED[1:]),
    ("ddp", "tokens undealt", "tokens"),
    ("ddp", "truncated host", "truncated"),
]


class Runs:
    """What the workers of each engine report, started when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.kept = folder, {}

    def __call__(self, engine: str) -> dict[str, dict]:
        if engine not in self.kept:
            ranks, names = ENGINES[engine]
            script = Path(__file__).parents[1] / "helpers" / "dealing_worker.py"
            command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks)]
            command += ["--master_addr", "127.0.0.1", "--master_port", str(host_runs.free_port())]
            command += [str(script), str(self.folder / engine), engine.partition(" ")[0], *names]
            (self.folder / engine).mkdir()
            extra = {"LOCAL_SIZE": str(ranks), "GLOO_SOCKET_IFNAME": "lo"}
            extra["PYTHONPATH"] = f"{host_runs.REPOSITORY}:{script.parent}"
            done = host_runs.execute(command, {**host_runs.environment(""), **extra}, timeout=340)
            assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
            lines = [json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("RESULT ")]
            self.kept[engine] = {line["run"]: line for line in lines}
            assert list(self.kept[engine]) == list(names)
        return self.kept[engine]

    def gradients(self, engine: str, run: str) -> list[dict[str, torch.Tensor]]:
        return torch.load(self.folder / engine / f"{engine.partition(' ')[0]} {run}.pt", weights_only=True)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("dealing"))


def counted(run):
    """Supervised tokens of the micro-batches of each optimizer step, in the host's order."""
    ranks = [iter(rank["supervised"]) for rank in run["ranks"]]
    return [[next(rank, 1) for rank in ranks for _ in range(ACCUMULATION)] for _ in range(run["steps"])]


@pytest.mark.parametrize(("engine", "host", "dealt"), EQUAL)
def test_losses_and_gradients_are_those_of_the_hosts_order(runs, engine, host, dealt):
    """Of every optimizer step of two epochs, with accumulated steps that reach into the second one."""
    found = runs(engine)
    assert found[dealt]["steps"] == found[host]["steps"] >= 8 * 2 // ENGINES[engine][0]
    losses = [found[run]["losses"] for run in (host, dealt)]
    empty = [step for step, counts in enumerate(counted(found[host])) if 0 in counts]
    for step, (expected, loss) in enumerate(zip(*losses, strict=True)):
        if step in empty:  # the host's loss of that micro-batch is NaN, and transformers logs something in its place
            assert loss == pytest.approx(sum(losses[1]) / len(losses[1]), rel=0.1)
        else:
            assert loss == pytest.approx(expected, rel=1e-5, abs=1.1e-4)  # logs are rounded
    reads = [[rank["read"] for rank in found[run]["ranks"]] for run in (host, dealt)]
    assert reads[0] != reads[1]
    ours, theirs = runs.gradients(engine, dealt), runs.gradients(engine, host)
    assert len(ours) == len(theirs)
    for step, (own, expected) in enumerate(zip(ours, theirs)):
        assert own.keys() == expected.keys()
        for name, gradient in expected.items():
            worst = (own[name] - gradient).abs().max().item()
            assert worst <= 1e-5 * gradient.abs().max().item(), (step, name, worst)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_same_samples_in_every_epoch(runs, engine):
    """Those of the host's order, of which each rank's last batch is filled up with the first ones."""
    found = runs(engine)
    for run in ("host", "dealt"):
        ranks = found[run]["ranks"]
        first = Counter(index for rank in ranks for index in rank["read"][: rank["ends"][0]])
        assert set(first) == set(range(SAMPLES))
        if run == "host":
            expected = first
        assert first == expected
    assert max(expected.values()) == 2 and sum(expected.values()) < SAMPLES + BATCH * ENGINES[engine][0]


@pytest.mark.parametrize(("engine", "run"), [("ddp", "budget"), ("zero2", "budget"), ("zero3", "budget")])
def test_no_micro_batch_is_above_the_budget(runs, engine, run):
    found = runs(engine)
    tokens = [rank["tokens"] for rank in found[run]["ranks"]]
    assert max(map(max, tokens)) <= BUDGET < max(max(rank["tokens"]) for rank in found["host"]["ranks"])
    assert len({len(rank) for rank in tokens}) == 1  # ranks make the same number of micro-batches


def test_a_large_budget_takes_one_micro_batch_in_each_optimizer_step(runs):
    found = runs("ddp")
    for rank in found["large budget"]["ranks"]:
        assert len(rank["tokens"]) <= found["host"]["steps"] + 2 * 2  # and parts of steps at the ends of epochs


def test_ranks_have_similar_costs(runs):
    """In tokens here: the tiny encoder costs little beside the tiny decoder."""

    def waiting(run):
        ranks = [rank["tokens"] for rank in runs("ddp")[run]["ranks"]]
        return sum(map(max, zip(*ranks))) / (sum(map(sum, ranks)) / len(ranks)) - 1

    assert waiting("dealt") < 0.6 * waiting("host")


def test_samples_above_the_budget_are_named_before_training(runs):
    error = runs("ddp")["refused"]["error"]
    assert re.match(r"[67] of 50 samples have more tokens than mm_packing_batch_tokens 120: sample 3 \(150\), ", error)
    assert error.endswith(" more. Raise it, or set mm_packing_over_budget: truncate")


def test_truncation_is_the_models_own(runs):
    tokens = [count for rank in runs("ddp")["truncated"]["ranks"] for count in rank["tokens"]]
    assert max(tokens) <= 120
