"""`llava-packing bench --training-step`: its rows and targets, the search for the best batch, and a run in small."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from llava_packing_tower.cli.main import main
from llava_packing_tower.integrations.llava import install
from llava_packing_tower.multimodal import packed_decoder
from llava_packing_tower.tools.bench.training import models, trials
from llava_packing_tower.tools.bench.training.photos import photo_sizes
from llava_packing_tower.tools.bench.training.rows import BEFORE, Row, Size, choose, rows, verdicts

pytestmark = [pytest.mark.newest, pytest.mark.timeout(900)]
NEXT = pytest.mark.skipif(not os.environ.get("LLAVA_NEXT_DIR"), reason="LLAVA_NEXT_DIR is not set")


# ---------------------------------------------------------------- rows and targets


def test_rows_bring_what_they_are_compared_with():
    assert [row.name for row in choose("7b,native", tiny=False)] == ["stock", "native", "7b", "7b-before"]
    assert [row.name for row in choose(None, tiny=False)] == list(rows(tiny=False))
    by_name = rows(tiny=False)
    assert by_name["frozen-before"].keys == BEFORE and "tower" not in by_name["frozen"].trained
    # What 16 and 4 samples mean is the same with and without liger.
    assert by_name["16+no_liger"].sizes == by_name["16"].sizes == (Size(16, False),)
    assert by_name["16"].targets and not by_name["16+no_liger"].targets


def test_variants_of_a_row():
    (row,) = choose("4-ckpt+padded+flash_attention_3", tiny=False)
    assert row.keys == {"mm_packing_decoder": False} and row.attention == "flash_attention_3"
    assert row.sizes == (Size(4, True),) and row.title.endswith("padded, flash_attention_3")


@pytest.mark.parametrize(
    "text, message",
    [
        ("17", "unknown row '17'"),
        ("16+fast", "'fast' is none of no_liger"),
        ("16+cudnn", "'cudnn' is none of"),  # it has no causal attention of segments
        ("stock+no_liger", "stock LLaVA-NeXT has no variants"),
        (",", "names no row"),
    ],
)
def test_unknown_rows(text, message):
    with pytest.raises(ValueError, match=message.replace("+", r"\+")):
        choose(text, tiny=False)


def test_targets_are_held_against_what_was_measured():
    found = {
        "16": {"samples/s": 47.5, "MFU": 0.44, "peak GiB": 40.5},
        "stock": {"samples/s": 14.0},
        "native": {"samples/s": 49.0},
        "anyres": {"failure": "out of memory"},
    }
    lines = {str(verdict) for verdict in verdicts(choose("16,native,anyres", tiny=False), found)}
    assert lines == {
        "16: at least 47 samples/s: 47.5, met",
        "16: at least 0.45 of peak (goal 0.5): 0.44, NOT MET",
        "16: at most 40 GiB: 40.5, NOT MET",
        "native: at least 3.5 x stock (goal 4): 3.5, met",
        "anyres: at least 2.2 x stock: not measured",
    }


def test_the_photos_have_the_sizes_of_coco():
    sizes = photo_sizes(1)
    assert len(sizes) == 159 and sizes.count((640, 480)) == 33 and max(map(max, sizes)) == 640
    assert sizes.count((480, 640)) == 12 and sum(width > height for width, height in sizes) == 119


# ---------------------------------------------------------------- the search


def contest(monkeypatch, seconds):
    """A contest whose trials take so long a sample, by size (None: out of memory)."""
    turns = []

    def turn(trial):
        turns.append((trial.size.samples, trial.size.checkpointing))
        spent = seconds[turns[-1]]
        if spent is None:
            trial.failure, trial.out_of_memory = "out of memory", True
        else:
            trial.seconds.append(spent * trial.size.samples)

    monkeypatch.setattr(trials.Trial, "turn", turn)
    sizes = tuple(Size(samples, checkpointing) for samples, checkpointing in seconds)
    return trials.Contest(None, Row("x", "x", "packed", sizes)), turns


def test_the_best_size_is_found_and_keeps_its_turns(monkeypatch):
    seconds = {(8, False): 0.05, (16, False): 0.04, (24, False): None, (32, False): 0.01, (16, True): 0.06}
    found, turns = contest(monkeypatch, seconds)
    for _ in range(3):
        found.turn(lambda: False)
    # Nothing larger than what did not fit is tried, but another kind of step is.
    assert turns == [(8, False), (16, False), (24, False), (16, True), (16, False), (16, False)]
    assert found.best.size == Size(16, False) and found.best.rate == pytest.approx(25) and not found.failed


def test_a_size_that_does_not_fit_any_more_leaves_its_turns_to_the_next_best(monkeypatch):
    seconds = {(8, False): 0.05, (16, False): 0.04, (24, False): 0.03}
    found, turns = contest(monkeypatch, seconds)
    found.turn(lambda: False)
    seconds[24, False] = None
    found.turn(lambda: False)
    found.turn(lambda: False)
    assert turns[3:] == [(24, False), (16, False), (16, False)] and found.best.size == Size(16, False)


def test_a_size_with_no_memory_to_spare_is_not_gone_on_with(monkeypatch):
    """24 samples fit, and are the fastest; but what fits into the last tenth fits in one turn and not in the next."""
    seconds = {(16, False): 0.04, (24, False): 0.03, (32, False): 0.02}
    found, turns = contest(monkeypatch, seconds)
    found.trials[1].tight = True
    found.turn(lambda: False)
    found.turn(lambda: False)
    assert turns == [(16, False), (24, False), (16, False)] and found.best.size == Size(16, False)


def test_with_a_lora_its_adapters_and_the_projector_train_alone():
    pytest.importorskip("peft")
    install.apply()
    model = models.build_lora(models.TINY, torch.device("cpu"))
    models.train_parts(model, rows(tiny=True)["lora"].trained)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name or "mm_projector" in name or "image_newline" in name for name in trained)
    layers = models.TINY["decoder"]["num_hidden_layers"]
    assert sum("lora_" in name for name in trained) == layers * 7 * 2
    assert not any("vision_tower" in name for name, _ in model.named_parameters() if "lora_" in name)


def test_the_search_ends_where_larger_is_slower_and_with_the_time(monkeypatch):
    seconds = {(8, True): 0.05, (10, True): 0.06, (12, True): 0.01, (4, False): 0.04, (6, False): 0.03}
    found, turns = contest(monkeypatch, seconds)
    found.turn(lambda: len(turns) > 2)
    assert turns == [(8, True), (10, True), (4, False)] and found.best.size == Size(4, False)


def test_a_failure_that_is_no_lack_of_memory(caplog):
    def model(name):
        raise RuntimeError("no such kernel")

    trial = trials.Trial(
        SimpleNamespace(model=model, device=torch.device("cpu")), Row("x", "x", "packed", ()), Size(2, 0)
    )
    trial.turn()
    assert "no such kernel" in trial.failure and not trial.out_of_memory and trial.rate is None
    assert trial.record(1e12)["failure"] == trial.failure


def test_one_backend_alone():
    def chosen():
        return packed_decoder.causal_backend("cpu", torch.float32, 8)

    assert chosen() == "sdpa"
    with packed_decoder.only_backend("eager"):
        assert chosen() == "eager"
        with packed_decoder.only_backend("torch_varlen"), pytest.raises(ValueError, match="needs a CUDA GPU"):
            chosen()
    assert chosen() == "sdpa"


# ---------------------------------------------------------------- the command


@pytest.mark.parametrize(
    "arguments, message",
    [([], "set LLAVA_DIR"), (["--scaling"], "--training-step excludes")],
)
def test_what_the_command_refuses(arguments, message, monkeypatch, capsys):
    for name in ("LLAVA_DIR", "LLAVA_NEXT_DIR"):
        monkeypatch.delenv(name, raising=False)
    assert main(["bench", "--training-step", "--device", "cpu", *arguments]) == 2
    assert message in capsys.readouterr().err


def bench(tmp_path, *arguments):
    file = tmp_path / "step.json"
    command = [sys.executable, "-m", "llava_packing_tower", "bench", "--training-step", "--device", "cpu"]
    done = subprocess.run([*command, "--json", str(file), *arguments], capture_output=True, text=True, timeout=250)
    return done, json.loads(file.read_text())


@pytest.mark.next
@NEXT
def test_in_small(tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "step.png"
    done, content = bench(tmp_path, "--check", "--repeat", "2", "--plot", str(picture))
    assert done.returncode == 0, done.stdout + done.stderr
    assert content["gradients"]["tensors above twice"] == 0 and "on (sdpa)" in content["gradients"]["plans"]["packed"]
    assert picture.read_bytes().startswith(b"\x89PNG") and content["targets"] == []
    found = content["rows"]
    assert list(found) == list(rows(tiny=True)) and content["rounds"] == 2
    for name, row in found.items():
        assert row["samples/s"] > 0 and 0 < row["MFU"] < 1 and row["tokens"] <= row["padded to"], name
        assert len(row["ms of each step"]) == 4 and all(loss > 0 for loss in row["losses"])
        plan = row["plan"]
        if name == "stock":
            assert plan == "LLaVA's own"
        else:
            assert ("packed decoder: on (sdpa)" in plan) != name.endswith("-before"), (name, plan)
    # The same samples: the paths differ, the loss does not.
    for name in ("frozen", "stage1", "lora", "7b"):
        assert found[name]["losses"] == pytest.approx(found[f"{name}-before"]["losses"], rel=1e-5)
        assert found[name]["tokens"] == found[f"{name}-before"]["tokens"] < found[name]["padded to"]
    if found["anyres"]["samples"] == found["stock"]["samples"]:  # which size is best is a matter of the machine
        assert found["anyres"]["tokens"] == found["stock"]["tokens"]
    assert set(found["stock"]["tried"]) >= {"2 samples, checkpointing", "2 samples, no checkpointing"}


@pytest.mark.next
@NEXT
def test_a_run_that_is_cut_short_keeps_what_it_has(tmp_path):
    done, content = bench(tmp_path, "--rows", "16+torch_varlen,stock", "--limit", "0")
    assert done.returncode == 0 and "(--limit) was reached" in done.stdout and content["rows"] == {}
    done, content = bench(tmp_path, "--rows", "16+torch_varlen,16+eager")
    assert done.returncode == 1  # one cannot run here, the other did
    assert "needs a CUDA GPU" in content["rows"]["16+torch_varlen"]["failure"]
    assert "on (eager)" in content["rows"]["16+eager"]["plan"] and content["rows"]["16+eager"]["samples/s"] > 0
