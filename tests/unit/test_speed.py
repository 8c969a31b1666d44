"""The speed of a training: what a rank counts, what all of them make together, the table, the profile's lines."""

from __future__ import annotations

import csv
import json
import logging
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import warm
from torch import nn

from llava_packing_tower.integrations.llava import profiling, speed, speed_report
from llava_packing_tower.integrations.llava.profiling import Kernels, Profile
from llava_packing_tower.integrations.llava.speed_meter import Meter, MicroStep, Share, Span, trained_parts
from llava_packing_tower.integrations.llava.speed_report import Speed, combine, in_words, over_the_run, write_report
from llava_packing_tower.multimodal.flops import decoder_flops, encoder_flops, head_flops
from llava_packing_tower.utils.device_peaks import datasheet_peak
from llava_packing_tower.utils.say import say

pytestmark = pytest.mark.newest
ROOT = Path(__file__).parents[2]


def share(waits, work, seconds=10.0, **more):
    given = dict(samples=4, visual=30, text=10, patches=30, flops=3e12, memory=1.0)
    return Share(seconds=seconds, waits=tuple(waits), work=tuple(work), **{**given, **more})


# ---------------------------------------------------------------- all ranks


def test_even_ranks_wait_for_nothing():
    found = combine([share([0.5, 0.5], [2, 1]), share([0.5, 0.5], [2, 1], memory=3.0)], 7, 5e12)
    assert (found.step, found.samples, found.visual, found.text, found.memory) == (7, 8, 60, 20, 3.0)
    assert found.data == 1 and found.ranks == 0
    log = found.log(12.0)
    assert log["samples_per_second"] == 0.8 and log["data_wait"] == 0.1 and log["rank_wait"] == 0
    assert log["mfu"] == pytest.approx(6e12 / 10 / (2 * 5e12)) and log["seconds_left"] == 12


def test_a_rank_with_twice_the_work():
    # Two steps of 5 seconds, in which the other rank computes for 2.5 and for 1.
    found = combine([share([0, 0], [4, 4]), share([0, 0], [2, 0.8])], 1, None)
    assert found.ranks == pytest.approx((5 - 2.5) / 2 + (5 - 1) / 2)
    assert "mfu" not in found.log(None) and "seconds_left" not in found.log(None)


def test_ranks_that_are_slow_in_turn_cost_as_much_as_one_that_always_is():
    turns = combine([share([0, 0], [4, 2]), share([0, 0], [2, 4])], 1, None)
    always = combine([share([0, 0], [4, 4]), share([0, 0], [2, 2])], 1, None)
    assert turns.ranks == always.ranks == pytest.approx(2.5)


def test_data_that_one_rank_waits_for_is_waited_for_by_all():
    # 3 of 10 seconds are rank 1's loader; on average a rank waits 1.5 for its own data, and 1.5 for the other rank.
    found = combine([share([0, 0], [1, 1]), share([2, 1], [1, 1])], 1, None)
    assert found.data == 1.5 and found.ranks == pytest.approx(1.5)


def test_windows_in_which_the_loader_was_all():
    found = combine([share([10.0], [0.0])], 1, None)
    assert found.data == 10 and found.ranks == 0
    assert combine([share([11.0], [1.0])], 1, None).ranks == 0  # clocks are read apart


def window(step, seconds=1.0, samples=4, memory=1.0):
    return Speed(step, seconds, samples, 40, 8, 1e12, 1e13, memory, 0.1, 0.2)


def test_the_run_is_measured_once_it_has_settled():
    slow = [window(4, 9.0), window(10, 5.0)]
    found = over_the_run([*slow, window(15, 1.0, 8, 2.0), window(20, 1.0, 6)], first=0)
    assert (found.seconds, found.samples, found.step, found.memory) == (2.0, 14, 20, 2.0)
    assert found.log(None)["data_wait"] == 0.1
    assert (
        over_the_run([window(104, 9.0), window(108, 5.0)], first=100).seconds == 5.0
    )  # a short one: the first is left out
    assert over_the_run([window(3, 9.0)], first=0).seconds == 9.0


def test_the_line():
    log = {
        "samples_per_second": 38.24,
        "visual_tokens_per_second": 54321.0,
        "text_tokens_per_second": 3900.0,
        "mfu": 0.4149,
        "peak_memory_gib": 36.52,
        "data_wait": 0.024,
        "rank_wait": 0.051,
    }
    assert in_words(log) == (
        "38.2 samples/s  54k visual + 3900 text tokens/s  MFU 0.41  36.5 GiB  waits: data 2%, ranks 5%"
    )
    assert "MFU" not in in_words({name: value for name, value in log.items() if name != "mfu"})
    assert in_words({"loss": 1.0}) == ""


def test_the_table_and_the_figure(tmp_path, monkeypatch):
    history = [{"loss": 3.0, "step": 1}]  # from before the speed was logged
    history += [{"loss": 2.0, "step": step, **window(step).log(5.0)} for step in (2, 5)]
    history += [{"train_runtime": 3.0, "step": 5}]
    write_report(tmp_path, history, "MFU is over 10 TFLOP/s")
    with (tmp_path / "speed.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["2", "5"] and rows[0]["samples_per_second"] == "4.0"
    assert list(rows[0]) == ["step", "loss", *speed_report.COLUMNS]
    if (tmp_path / "speed.png").exists():
        assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    other = tmp_path / "other"
    write_report(other, history, "")
    assert [file.name for file in other.iterdir()] == ["speed.csv"]
    write_report(tmp_path / "none", history[:1], "")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    "name, teraflops",
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H200", 989.4),
        ("NVIDIA A100-SXM4-80GB", 311.9),
        ("NVIDIA L40S", 362.1),
        ("NVIDIA L4", 121.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA H20", 148.0),
        ("NVIDIA A10G", 70.0),
        ("Some other device", None),
    ],
)
def test_peaks_of_the_datasheets(name, teraflops):
    assert datasheet_peak(name) == (teraflops and pytest.approx(teraflops * 1e12))


def trainer_with(**args):
    given = dict(device=torch.device("cpu"), bf16=True, fp16=False, mm_packing_peak_tflops=None)
    return SimpleNamespace(args=SimpleNamespace(**{**given, **args}))


def test_the_peak_can_be_given(monkeypatch):
    assert speed.peak_of(trainer_with()) == (None, "no GPU")
    assert speed.peak_of(trainer_with(mm_packing_peak_tflops=2.5)) == (2.5e12, "mm_packing_peak_tflops")
    monkeypatch.setenv("LLAVA_PACKING_PEAK_TFLOPS", "400")
    assert speed.peak_of(trainer_with()) == (4e14, "LLAVA_PACKING_PEAK_TFLOPS")
    assert speed.peak_of(trainer_with(mm_packing_peak_tflops=2.5))[0] == 2.5e12
    for wrong in ("fast", "0", "-3", "nan"):
        monkeypatch.setenv("LLAVA_PACKING_PEAK_TFLOPS", wrong)
        with pytest.raises(ValueError, match=f"LLAVA_PACKING_PEAK_TFLOPS must be .* above 0, got '{wrong}'"):
            speed.peak_of(trainer_with())


def test_the_datasheet_is_of_half_precision(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    on_gpu = torch.device("cuda")
    peak, source = speed.peak_of(trainer_with(device=on_gpu))
    assert peak == pytest.approx(989.4e12) and "datasheet of NVIDIA H100" in source
    assert speed.peak_of(trainer_with(device=on_gpu, bf16=False)) == (None, "float32 training")


# ---------------------------------------------------------------- one rank

TOWER = SimpleNamespace(hidden_size=8, intermediate_size=20, num_hidden_layers=5)
DECODER = dict(hidden_size=12, intermediate_size=28, num_hidden_layers=2, num_attention_heads=3, vocab_size=31)


def meter(trained=("tower", "projector", "decoder")):
    found = object.__new__(Meter)
    found.trainer = SimpleNamespace(model=nn.Linear(1, 1).train())
    found.config, found.known, found.cuda = SimpleNamespace(**DECODER), True, False
    found.tower = SimpleNamespace(config=TOWER, feature_layers=(4,))
    found.tower.encoders = lambda: {"vision_tower.": found.tower}
    found.trained = {f"{part}_trained": part in trained for part in ("tower", "projector", "decoder")}
    found.micro_steps, found.current = [], None
    found.wait = found.paused = 0.0
    found.began, found.step, found.apart = time.perf_counter(), 0, False
    return found


def a_step(one, grids, lengths, words, supervised):
    one.begin_forward()
    one.count_patches(grids)
    longest = max(lengths)
    places = torch.arange(longest)
    tokens = places < torch.tensor(lengths)[:, None]
    labels = torch.where(places < torch.tensor(supervised)[:, None] + 1, 5, -100)
    one.count_tokens(torch.arange(max(words)) < torch.tensor(words)[:, None], tokens, labels)
    one.end_forward()


def test_what_a_rank_counts():
    one = meter()
    a_step(one, [(1, 2, 3), (2, 1, 4)], [9, 4], [3, 4], [2, 0])
    a_step(one, [(1, 5, 1)], [7], [10], [6])  # cut: of its words some are gone
    found = one.take(1, lock_step=False, by_micro_step=True)
    assert (found.samples, found.patches, found.text) == (3, 6 + 8 + 5, 3 + 4 + 10)
    assert found.visual == 6 + 0 + 0
    encoder = encoder_flops(TOWER, (6, 8), 4) + encoder_flops(TOWER, (5,), 4)
    decoder, head = decoder_flops(one.config, (9, 4, 7)), head_flops(one.config, 2 + 0 + 6)
    assert found.flops == pytest.approx(3 * (encoder + decoder + head).forward)
    assert len(found.waits) == len(found.work) == 2
    assert one.take(2, False, True).samples == 0  # a new window


def test_frozen_parts_cost_less():
    one = meter(trained=("projector",))
    a_step(one, [(1, 2, 3)], [9], [3], [2])
    encoder, decoder = encoder_flops(TOWER, (6,), 4), decoder_flops(one.config, (9,))
    head = head_flops(one.config, 2)
    expected = encoder.forward + 2 * (decoder + head).linear + 3 * decoder.attention
    assert one.take(1, False, False).flops == pytest.approx(expected)


def test_micro_steps_of_an_optimizer_step_are_one_where_the_ranks_meet_at_its_end():
    def run(by_micro_step, lock_step=False):
        one = meter()
        for step in (0, 0, 1, 1):
            one.step, one.wait = step, 0.5
            a_step(one, [(1, 2, 2)], [5 + step], [3], [2])
        return one.take(2, lock_step, by_micro_step)

    assert run(True).waits == (0.5,) * 4 and run(False).waits == (1.0,) * 2
    counted = run(False, lock_step=True)
    # Where forward passes meet other ranks, operations stand for a rank's own time.
    assert sum(counted.work) == counted.flops and counted.work[1] > counted.work[0]


def test_counting_reads_nothing_from_the_device(monkeypatch):
    one = meter()

    def forbidden(self, *args):
        raise AssertionError("this would wait for the device")

    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "cpu", "numpy", "nonzero"):
            patch.setattr(torch.Tensor, name, forbidden)
        lengths, mask = torch.tensor([[5], [3]]), torch.arange(6)
        one.begin_forward()
        one.count_patches([(1, 2, 3)])
        one.count_tokens(mask < 2 - 0 * lengths, mask < lengths, torch.full((2, 6), -100))
        one.end_forward()
    assert one.take(1, False, False).samples == 2


def test_what_is_no_training_step_is_not_counted():
    one = meter()
    one.trainer.model.eval()
    a_step(one, [(1, 2, 3)], [9], [3], [2])
    one.trainer.model.train()
    with torch.no_grad():
        a_step(one, [(1, 2, 3)], [9], [3], [2])
    assert one.micro_steps == []
    one.count_patches([(1, 2, 3)])  # outside of a forward pass of the model
    assert one.current is None


def test_the_forward_pass_is_timed():
    span = Span(cuda=False)
    time.sleep(0.02)
    span.end()
    assert 0.02 <= span.seconds < 5
    one = meter()
    one.micro_steps = [MicroStep(0, 0.25, span)]
    found = one.take(1, False, False)
    assert found.work == (span.seconds,) and found.waits == (0.25,) and found.samples == 0


def test_adapters_do_not_train_the_decoder():
    class Llava(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleDict({"q": nn.Linear(2, 2), "lora_A": nn.Linear(2, 2)})
            self.tower, self.mm_projector = nn.Linear(2, 2), nn.Linear(2, 2)

        def get_model(self):
            return self

        def get_vision_tower(self):
            return self.tower

    model = Llava()
    assert all(trained_parts(model).values())
    model.layers["q"].requires_grad_(False)
    model.tower.requires_grad_(False)
    assert trained_parts(model) == {"tower_trained": False, "projector_trained": True, "decoder_trained": False}


def test_a_slow_loader_is_noticed():
    def batches():
        for number in range(3):
            time.sleep(0.02)
            yield number

    one = meter()
    found = speed.TimedBatches(batches(), one)
    assert list(found) == [0, 1, 2] and 0.06 <= one.wait < 5
    assert found.gi_running is False  # all else is that of the iterator


def test_a_wait_inside_of_another_counts_once():
    """Where samples are dealt, a loader of their sizes is waited for inside of that of the batches."""

    def sizes():
        for number in range(3):
            time.sleep(0.02)
            yield number

    one = meter()
    outer = speed.TimedBatches(iter(speed.TimedBatches(sizes(), one)), one)
    began = time.perf_counter()
    assert list(outer) == [0, 1, 2]
    assert 0.06 <= one.wait <= time.perf_counter() - began


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """What two processes logged, by case."""
    meet = tmp_path_factory.mktemp("ranks") / "meet"
    command = [sys.executable, str(ROOT / "tests" / "helpers" / "speed_worker.py"), str(meet)]
    done = warm.execute(command, {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.newest_long  # the meter knows nothing of transformers
@pytest.mark.parametrize(
    "case, data, ranks",
    [
        # Rank 1 takes 0.2 + 0.04 s a step: of that a rank on average waits 0.1 for its data, and 0.1 for rank 1.
        ("loader", 0.1 / 0.24, 0.1 / 0.24),
        # Rank 1 takes 0.2 s, rank 0 0.04.
        ("forward", 0.0, 0.08 / 0.2),
        ("even", 0.5, 0.0),
    ],
)
def test_two_ranks(two_ranks, case, data, ranks):
    found = two_ranks[case]
    assert found["data_wait"] == pytest.approx(data, abs=1e-4)
    assert found["rank_wait"] == pytest.approx(ranks, abs=1e-4)
    tokens = [found[f"{kind}_tokens_per_second"] / found["samples_per_second"] for kind in ("visual", "text")]
    assert tokens == [pytest.approx(4, rel=1e-2), pytest.approx(3, rel=1e-2)]


# ---------------------------------------------------------------- the profile


def test_the_parts_of_a_profiled_step():
    kinds = {"collectives": 0.3, "attention": 0.1, "matmuls": 0.4, "copies": 0.0, "norms and elementwise": 0.1}
    # A second: 0.6 computing, 0.1 more of collectives that nothing hides, 0.3 idle, of which 0.2 for data.
    found = profiling.shares(Kernels(kinds, 0.7, 0.6), 1.0, data=0.2, ranks=0.04)
    expected = {"data": 0.2, "host launches": 0.1, "the slowest rank": 0.04, "collectives": 0.06, "kernels": 0.6}
    assert found == pytest.approx(expected)
    lines = profiling.describe(Kernels(kinds, 0.7, 0.6), 1.0, 0.2, 0.04, cuda=True)
    assert lines[0] == (
        "profile: a step takes 1000 ms: data 20%, host launches 10%, the slowest rank 4%, collectives 6%, kernels 60%"
    )
    assert "GPU kernels: matmuls 67%, attention 17%, other (norms, elementwise) 17%" in lines[1]
    assert "bound by kernels, mostly matmuls" in lines[2]


def test_nothing_is_launched_on_a_cpu():
    kinds = {"collectives": 0.1, "attention": 0.1, "matmuls": 0.3, "copies": 0.0, "norms and elementwise": 0.1}
    for busy, bound in (
        (0.6, "operators, mostly matmuls (the processor is busy)"),
        (0.3, "Python (larger"),
    ):
        lines = profiling.describe(Kernels(kinds, busy, busy), 1.0, 0.1, 0.0, cuda=False)
        assert f"bound by {bound}" in lines[2] and f"Python {0.9 - busy:.0%}" in lines[0], lines
        assert f"operators {busy:.0%}" in lines[0] and "launches" not in " ".join(lines)


@pytest.mark.parametrize(
    "busy, computing, data, ranks, bound",
    [
        (0.3, 0.3, 0.6, 0.0, "data"),
        (0.3, 0.3, 0.1, 0.0, "host launches"),
        (0.9, 0.3, 0.0, 0.5, "the slowest rank"),
        (0.9, 0.3, 0.0, 0.1, "collectives"),
    ],
)
def test_what_bounds_a_step(busy, computing, data, ranks, bound):
    kinds = dict.fromkeys(("collectives", "attention", "matmuls", "copies", "norms and elementwise"), 0.1)
    assert f"bound by {bound} (" in profiling.describe(Kernels(kinds, busy, computing), 1.0, data, ranks, True)[2]


@pytest.mark.parametrize(
    "steps, asked, expected", [(40, 3, (5, 8, 11)), (4, 1, (2, 3, 4)), (7, 5, (1, 4, 7)), (3, 9, (1, 2, 3))]
)
def test_the_steps_that_are_profiled(steps, asked, expected):
    profile = Profile(trainer_with(), SimpleNamespace(windows=[]), asked)
    for first in (0, 100):
        state = SimpleNamespace(global_step=first, max_steps=first + steps, is_world_process_zero=False)
        profile.on_train_begin(None, state, None)
        assert (profile.settled - first, profile.measured - first, profile.end - first) == expected
        asked_for_logs = []
        for step in range(first + 1, first + steps + 1):
            state.global_step, control = step, SimpleNamespace(should_log=False)
            profile.on_step_end(None, state, control)
            if control.should_log:
                asked_for_logs.append(step - first)
        assert asked_for_logs == list(expected)


def test_logs_among_profiled_steps_have_no_speed(monkeypatch):
    """Every third step is logged: the steps that are profiled, which another rank waits for, are in no window."""
    log = object.__new__(speed.SpeedLog)
    args = SimpleNamespace(fsdp="", output_dir="")
    log.trainer = SimpleNamespace(accelerator=SimpleNamespace(state=SimpleNamespace()), args=args)
    log.meter, log.peak, log.windows, log.disturbed, log.first, log.began = meter(), None, [], False, 0, 0.0
    log.meter.start = log.meter.stop = lambda: None
    log.basis, log.meter.began, now = "none", 0.0, [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(speed, "gather", lambda share: now.__setitem__(0, now[0] + 100 * log.disturbed) or [share])
    profile = Profile(trainer_with(), log, 3)
    state = SimpleNamespace(global_step=0, max_steps=20, is_world_process_zero=False)
    profile.on_train_begin(None, state, None)
    log.on_train_begin(args, state, None)
    while state.global_step < state.max_steps:
        for callback in (profile, log):
            callback.on_step_begin(args, state, None)
        now[0] += 1
        a_step(log.meter, [], [5, 7], [4, 4], [2, 3])
        state.global_step += 1
        control = SimpleNamespace(should_log=state.global_step % 3 == 0)
        for callback in (profile, log):
            callback.on_step_end(args, state, control)
    assert [window.step for window in log.windows] == [3, 5, 6, 8, 12, 15, 18]
    log.on_train_end(args, state, None)
    assert [window.step for window in log.windows[7:]] == [20]  # those since the last log
    assert {window.samples / window.seconds for window in log.windows} == {2.0}
    log.on_train_begin(args, state, None)
    assert log.windows == [] and log.due is None  # of a second train()


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("level", [logging.INFO, logging.WARNING])
def test_what_is_said_is_read_once(monkeypatch, capsys, caplog, rank, level):
    """On every rank that logs, else on stderr of the first."""
    monkeypatch.setenv("RANK", str(rank))
    with caplog.at_level(level, "of_a_test"):
        say(logging.getLogger("of_a_test"), "dealing: %s", "50 % of a step")
    logged = level == logging.INFO
    assert caplog.messages == ["dealing: 50 % of a step"] * logged
    assert capsys.readouterr().err == "dealing: 50 % of a step\n" * (not logged and rank == 0)


def test_profiles_that_cannot_be(caplog):
    with pytest.raises(ValueError, match="at least 1 step, got 0"):
        Profile(trainer_with(), None, 0)
    profile = Profile(trainer_with(), SimpleNamespace(windows=[]), 3)
    for is_first in (False, True):  # one of the ranks says so
        assert caplog.text == ""
        profile.on_train_begin(None, SimpleNamespace(global_step=8, max_steps=10, is_world_process_zero=is_first), None)
    assert "2 steps are too few" in caplog.text and profile.steps == 0
    control = SimpleNamespace(should_log=False)
    profile.on_step_end(None, SimpleNamespace(global_step=9), control)
    assert not control.should_log
