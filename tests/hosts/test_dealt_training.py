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
import transformers
from conftest import FIVE
from packaging.version import Version
from safetensors.torch import load_file

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("llava") is None, reason="no LLaVA is installed"),
    pytest.mark.newest,
    pytest.mark.skipif(bool(host_runs.NEXT), reason="the worker builds the models of LLaVA 1.x"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="the runs here are for machines without a GPU"),
    pytest.mark.timeout(900),
]
TAKES_ITEMS = Version(transformers.__version__) >= Version("4.46")
SAMPLES, BATCH, BUDGET = 50, 3, 230  # of dealing_worker.py
DDP = ("host", "dealt", "tokens undealt", "tokens", "budget", "large budget", "refused", "truncated host", "truncated")
DDP += ("missing host", "missing", "saved", "resumed", "own")
ZERO = ("host", "dealt", "budget", "large budget")
RUNS = {
    2: [*(f"ddp:{run}" for run in DDP), *(f"{engine}:{run}" for engine in ("zero2", "zero3") for run in ZERO)],
    4: [f"{engine}:{run}" for engine in ("ddp", "zero2", "zero3") for run in ("own", "host", "dealt", "budget")],
}
RUNS[2] += ["zero2:saved", "zero2:resumed"]
RUNS[4] = ["ddp:full logits", *RUNS[4]]  # transformers 4.40 is not rid of ZeRO-3 in its process
# Averages over the tokens of a step: transformers' own, on one rank and on two, and ours.
RUNS[1] = ["ddp:items host"]
ITEMS = ["ddp:items host", "ddp:items", "ddp:items budget", "ddp:items tokens", "ddp:fitting tokens"]
FSDP = ["fsdp:host", "fsdp:dealt", "fsdp:budget"]  # apart: its compat patches are applied where it is asked for
# Left: in LLaVA's order. Right: what must have the same gradients.
EQUAL = [
    *((2, "ddp:own", f"ddp:{run}") for run in ("host", "dealt")),
    pytest.param(4, "ddp:own", "ddp:full logits", marks=pytest.mark.long),
    *((2, f"{engine}:host", f"{engine}:{run}") for engine in ("ddp", "zero2", "zero3") for run in ZERO[1:]),
    (2, "ddp:tokens undealt", "ddp:tokens"),
    (2, "ddp:truncated host", "ddp:truncated"),
    (2, "ddp:missing host", "ddp:missing"),
    *(
        pytest.param(4, f"{engine}:own", f"{engine}:{run}", marks=pytest.mark.long)
        for engine in ("ddp", "zero2", "zero3")
        for run in ("host", "dealt", "budget")
    ),
]


FEW = ("ddp:host", "ddp:dealt", "ddp:budget", "ddp:refused", "zero3:host", "zero3:budget")
"""With the newest transformers, where tests that need others are long."""


def of_few(ranks: int, *runs: str):
    marks = [] if ranks > 2 or set(runs) <= set(FEW) else pytest.mark.newest_long
    return pytest.param(ranks, *runs, marks=marks)


EQUAL = [of_few(*each) if type(each) is tuple else each for each in EQUAL]


class Runs:
    """What the workers report, started when it is first asked for, with 2 or with 4 processes."""

    def __init__(self, folder: Path, few: bool) -> None:
        self.folder, self.few, self.kept = folder, few, {}

    def __call__(self, ranks: int, words: list[str] | None = None) -> dict[str, dict]:
        words = words or (list(FEW) if self.few and ranks == 2 else RUNS[ranks])
        if (key := f"{ranks} {words}") not in self.kept:
            self.kept[key] = {}  # a failure is not tried again
            script = Path(__file__).parents[1] / "helpers" / "dealing_worker.py"
            command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks)]
            command += ["--master_addr", "127.0.0.1", "--master_port", str(host_runs.free_port())]
            folder = self.folder / str(ranks)
            folder.mkdir(exist_ok=True)
            extra = {"LOCAL_SIZE": str(ranks), "GLOO_SOCKET_IFNAME": "lo"}
            extra["PYTHONPATH"] = f"{host_runs.REPOSITORY}:{script.parent}"
            environment = {**host_runs.environment(""), **extra}
            done = host_runs.execute([*command, str(script), str(folder), *words], environment, timeout=840)
            assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
            lines = map(json.loads, (folder / "results.jsonl").read_text().splitlines())
            self.kept[key] = {line["run"]: line for line in lines if line["run"] in words}
            assert list(self.kept[key]) == words
        return self.kept[key]

    def tensors(self, ranks: int, word: str) -> list[dict[str, torch.Tensor]]:
        """The gradients of each optimizer step; under FSDP the weights at the end."""
        return torch.load(self.folder / str(ranks) / f"{word.replace(':', ' ')}.pt", weights_only=True)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, request):
    long = any(item.get_closest_marker("long") for item in request.session.items if item.path == request.path)
    return Runs(tmp_path_factory.mktemp("dealing"), few=FIVE and not long)


@pytest.mark.parametrize(("ranks", "host", "dealt"), EQUAL)
def test_losses_and_gradients_are_those_of_the_hosts_order(runs, ranks, host, dealt):
    """Of every optimizer step of two epochs, with accumulated steps that reach into the second one."""
    found = runs(ranks)
    assert found[dealt]["steps"] == found[host]["steps"] >= 16 // ranks
    losses = [found[run]["losses"] for run in (host, dealt)]
    empty = {step for rank in found[host]["ranks"] for step, count in rank["supervised"] if count == 0}
    as_given = dealt.endswith(":host")
    for step, (expected, loss) in enumerate(zip(*losses, strict=True)):
        # There the host's loss of a micro-batch is NaN, and transformers logs something in its place.
        if step in empty and not as_given:
            assert loss == pytest.approx(sum(losses[1]) / len(losses[1]), rel=0.1)
        else:
            assert loss == pytest.approx(expected, rel=1e-5, abs=1.1e-4)  # logs are rounded
    reads = [[rank["read"] for rank in found[run]["ranks"]] for run in (host, dealt)]
    assert (reads[0] == reads[1]) == as_given
    close(runs.tensors(ranks, dealt), runs.tensors(ranks, host))


def close(ours, theirs):
    """The gradients of every optimizer step."""
    assert len(ours) == len(theirs)
    for step, (own, expected) in enumerate(zip(ours, theirs)):
        assert own.keys() == expected.keys()
        for name, gradient in expected.items():
            worst = (own[name] - gradient).abs().max().item()
            assert worst <= 1e-5 * gradient.abs().max().item(), (step, name, worst)


@pytest.mark.long
@pytest.mark.skipif(not TAKES_ITEMS, reason="transformers gives the model no num_items_in_batch")
@pytest.mark.parametrize("run", ITEMS)
def test_averages_over_the_tokens_of_a_step_are_those_of_one_process(runs, run):
    """A step's gradients are those of all its tokens, on whichever rank they are."""
    found, alone = runs(2, ITEMS)[run], runs(1)["ddp:items host"]
    assert found["steps"] == alone["steps"] == 6
    whole, halves = (sorted(index for rank in each["ranks"] for index in rank["read"]) for each in (alone, found))
    assert whole == halves
    assert found["losses"] == pytest.approx(alone["losses"], rel=1e-5, abs=1.1e-4)
    close(runs.tensors(2, run), runs.tensors(1, "ddp:items host"))


@pytest.mark.long
@pytest.mark.parametrize("dealt", ["fsdp:dealt", "fsdp:budget"])
def test_fsdp_learns_the_same(runs, dealt):
    found = runs(2, FSDP)
    assert found[dealt]["steps"] == found["fsdp:host"]["steps"]
    (own,), (expected,) = runs.tensors(2, dealt), runs.tensors(2, "fsdp:host")
    start = load_file(runs.folder / "2" / "llava_tiny" / "model.safetensors")
    moving = 0
    for name, tensor in expected.items():
        moved = (tensor - start[name.replace("_fsdp_wrapped_module.", "")]).abs().max().item()
        moving += moved > 0
        assert (own[name] - tensor).abs().max().item() <= 1e-3 * moved + 1e-6, name
    assert moving > 50


@pytest.mark.parametrize(
    ("ranks", "engine"),
    [
        (2, "ddp"),
        pytest.param(2, "zero3", marks=pytest.mark.newest_long),
        pytest.param(4, "zero3", marks=pytest.mark.long),
    ],
)
def test_the_same_samples_in_every_epoch(runs, ranks, engine):
    """Those of the host's order, of which each rank's last batch is filled up with the first ones."""
    found = runs(ranks)
    for run in ("host", "dealt"):
        shares = found[f"{engine}:{run}"]["ranks"]
        first = Counter(index for rank in shares for index in rank["read"][: rank["ends"][0]])
        assert set(first) == set(range(SAMPLES))
        if run == "host":
            expected = first
        assert first == expected
    assert max(expected.values()) == 2 and sum(expected.values()) < SAMPLES + BATCH * ranks


@pytest.mark.newest_long
@pytest.mark.parametrize("engine", ["ddp", "zero2"])
def test_a_resumed_run_is_the_uninterrupted_one(runs, engine):
    """Bit for bit, in the middle of the second epoch, with workers and a budget."""
    found = runs(2)
    whole, rest = runs.tensors(2, f"{engine}:saved"), runs.tensors(2, f"{engine}:resumed")
    assert len(whole) == 8 and len(rest) == 3
    for step, (own, expected) in enumerate(zip(rest, whole[5:])):
        assert all(torch.equal(own[name], expected[name]) for name in expected), step
    assert found[f"{engine}:resumed"]["losses"][5:] == found[f"{engine}:saved"]["losses"][5:]


@pytest.mark.parametrize("engine", ["ddp", pytest.param("zero2", marks=pytest.mark.newest_long), "zero3"])
def test_no_micro_batch_is_above_the_budget(runs, engine):
    found = runs(2)
    tokens = [rank["tokens"] for rank in found[f"{engine}:budget"]["ranks"]]
    assert max(map(max, tokens)) <= BUDGET < max(max(rank["tokens"]) for rank in found[f"{engine}:host"]["ranks"])
    assert len({len(rank) for rank in tokens}) == 1  # ranks make the same number of micro-batches


@pytest.mark.newest_long
def test_a_large_budget_takes_one_micro_batch_in_each_optimizer_step(runs):
    found = runs(2)
    for rank in found["ddp:large budget"]["ranks"]:
        assert len(rank["tokens"]) <= found["ddp:host"]["steps"] + 2 * 2  # and parts of steps at the ends of epochs


def test_ranks_have_similar_costs(runs):
    """In tokens here: the tiny encoder costs little beside the tiny decoder."""

    def waiting(run):
        ranks = [rank["tokens"] for rank in runs(2)[run]["ranks"]]
        return sum(map(max, zip(*ranks))) / (sum(map(sum, ranks)) / len(ranks)) - 1

    assert waiting("ddp:dealt") < 0.6 * waiting("ddp:host")


def test_samples_above_the_budget_are_named_before_training(runs):
    error = runs(2)["ddp:refused"]["error"]
    assert re.match(r"[67] of 50 samples have more tokens than mm_packing_batch_tokens 120: sample 3 \(150\), ", error)
    assert error.endswith(" more. Raise it, or set mm_packing_over_budget: truncate")


@pytest.mark.newest_long
def test_truncation_is_the_models_own(runs):
    tokens = [count for rank in runs(2)["ddp:truncated"]["ranks"] for count in rank["tokens"]]
    assert max(tokens) <= 120
