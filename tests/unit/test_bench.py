"""`llava-packing bench` on the CPU: what is counted, how it is timed, what is reached."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from llava_packing_tower.tools.bench import targets, timing
from llava_packing_tower.tools.bench.models import PRESETS
from llava_packing_tower.tools.bench.systems import Setting, Step, System, lowest_cosine
from llava_packing_tower.tools.bench.timing import Clock, Deadline, Measured, Result
from llava_packing_tower.tools.bench.workloads import (
    TINY,
    Workload,
    parse_workload,
    ragged_grids,
    reordered,
    useful_flops,
)
from llava_packing_tower.utils.kernel_times import busy_time, kind_of

CPU = torch.device("cpu")


# ---------------------------------------------------------------- workloads and useful work


def test_workload_names():
    work = parse_workload("uni32", 14)
    assert work.grids == ((32, 32),) * 32 and work.tokens == 32 * 1024 and not work.train and not work.ragged
    assert parse_workload("uni2@224", 16).grids == ((14, 14),) * 2
    assert parse_workload("train:uni16", 14).train and parse_workload("uni16", 14, train=True).label == "train:uni16"
    assert len(parse_workload("ragged8", 14).grids) == 8
    assert parse_workload("uni1", 14, TINY).grids == ((8, 8),)
    drawn = parse_workload("train:ragged8#3", 14, seed=2)
    assert drawn.label == "train:ragged8#3" and drawn.grids == ragged_grids(8, 14, seed=3)
    assert parse_workload("ragged8", 14, seed=2).grids == ragged_grids(8, 14, seed=2) != drawn.grids
    for wrong in ("uni", "uni0", "ragged", "ragged8@2", "ragged8#", "uni8#2", "both3", "", "uni4,uni5"):
        with pytest.raises(ValueError, match="uniN, uniN@SIDE, raggedN or raggedN#SEED"):
            parse_workload(wrong, 14)


def test_ragged_sizes_have_the_stated_distribution():
    patch, grids = 14, ragged_grids(4000, 14, seed=3)
    areas = torch.tensor([h * w * patch**2 for h, w in grids]).double()
    aspects = torch.tensor([math.log(h / w) for h, w in grids]).double()
    low, high = math.log(224**2), math.log(0.7 * 1120**2)
    assert abs(areas.log().mean() - (low + high) / 2) < 0.05
    assert areas.min() > 0.85 * 224**2 and areas.max() < 1.1 * 0.7 * 1120**2
    assert abs(areas.log().std() - (high - low) / math.sqrt(12)) < 0.05
    assert aspects.abs().max() < 0.85 and abs(aspects.std() - 1.4 / math.sqrt(12)) < 0.03
    assert abs(aspects.mean()) < 0.03
    assert ragged_grids(5, 14, seed=1) == ragged_grids(64, 14, seed=1)[:5] != ragged_grids(5, 14, seed=2)


def test_images_fit_the_grids_and_change_their_order():
    work = Workload("ragged", ((2, 3), (4, 1), (1, 1), (5, 2)))
    images = work.images(14, CPU, torch.float32)
    assert [tuple(x.shape) for x in images] == [(3, 14 * h, 14 * w) for h, w in work.grids]
    orders = [[x.shape for x in reordered(images, turn)] for turn in range(8)]
    assert len({tuple(order) for order in orders}) > 3
    assert all(sorted(order) == sorted(x.shape for x in images) for order in orders)
    batch = Workload("uni", ((2, 3),) * 4).images(14, CPU, torch.float32)
    assert batch.shape == (4, 3, 28, 42) and reordered(batch, 5) is batch


def test_useful_flops_by_hand():
    config = PRESETS["llava_vit"].config(tiny=False)
    lengths, width = (1024, 77), 1024
    expected = sum(24 * s * width**2 + 4 * s * s * width for s in lengths)
    assert useful_flops(config, lengths, 23) == 23 * expected
    assert useful_flops(config, lengths, 23, train=True) == 3 * 23 * expected
    aimv2 = PRESETS["aimv2"].config(tiny=False)  # three matrices of 1024 x 2816 in place of two of 1024 x 4096
    assert useful_flops(aimv2, (10,), 1) == 10 * 2 * (4 * width**2 + 3 * width * 2816) + 4 * 100 * width


def test_layers_that_the_task_needs():
    assert PRESETS["llava_vit"].layers(PRESETS["llava_vit"].config(tiny=False)) == 23
    assert PRESETS["siglip2"].layers(PRESETS["siglip2"].config(tiny=False)) == 27


# ---------------------------------------------------------------- timing


def setting(family="llava_vit"):
    preset = PRESETS[family]
    return Setting(family, preset, preset.config(tiny=True), CPU, torch.float32)


class Scripted(Clock):
    """A clock that notes who ran and says how long it took."""

    def __init__(self, ms):
        super().__init__(CPU)
        self.ms, self.log = ms, []

    def __call__(self, run):
        name = run() or "peak"
        self.log.append(name)
        return self.ms[name][sum(n == name for n in self.log) % len(self.ms[name])]


def scripted_system(name, packed=False, fails=False):
    def run():
        if fails:
            raise RuntimeError("no kernel for this")
        return name

    return System(name, nn.Linear(1, 1), lambda images: Step(run, ((1, 1),), list), packed=packed)


@pytest.fixture
def small_peak(monkeypatch):
    monkeypatch.setattr(timing.PeakMatmul, "run", lambda self: None)


def test_systems_take_turns_and_medians_count(small_peak):
    clock = Scripted({"packed": [1.0, 5.0, 2.0], "other": [30.0], "peak": [4.0]})
    systems = [scripted_system("other"), scripted_system("packed", packed=True)]
    work = Workload("uni1", ((8, 8),))
    result = timing.measure(setting(), work, systems, clock, rounds=6, until=math.inf)
    assert clock.log[-18:] == ["packed", "other", "peak", "other", "packed", "peak"] * 3
    packed, other = result.systems
    assert result.rounds == 6 and len(packed.ms) == 6 and packed.median == 2.0 and other.median == 30.0
    assert result.peak == 2 * 1024**3 / 4e-3
    assert result.mfu(packed) == pytest.approx(result.flops / 2e-3 / result.peak)


def test_rounds_end_at_the_time_limit(small_peak):
    clock = Scripted({"packed": [1.0], "peak": [4.0]})
    work = Workload("uni1", ((8, 8),))
    result = timing.measure(setting(), work, [scripted_system("packed", True)], clock, rounds=50, until=-1.0)
    assert result.rounds == timing.LEAST_ROUNDS
    deadline = Deadline(0.0)
    assert deadline.left <= 0


def test_a_failing_peer_is_a_note_and_ours_an_error(small_peak, caplog):
    clock = Scripted({"packed": [1.0], "peak": [4.0]})
    work = Workload("uni1", ((8, 8),))
    systems = [scripted_system("packed", True), scripted_system("other", fails=True)]
    result = timing.measure(setting(), work, systems, clock, rounds=3, until=math.inf)
    assert result.systems[1].note == "failed: RuntimeError: no kernel for this" and not result.systems[1].ms
    assert "other on uni1 failed" in caplog.text
    with pytest.raises(RuntimeError, match="no kernel"):
        timing.measure(setting(), work, [scripted_system("packed", True, fails=True)], clock, 3, math.inf)


def test_cosine_finds_one_wrong_token():
    first = [torch.randn(5, 8), torch.randn(3, 8)]
    second = [x.clone() for x in first]
    assert lowest_cosine(first, second) > 0.999
    second[1][2] *= -1
    assert lowest_cosine(first, second) < -0.999
    with pytest.raises(ValueError, match="image 1"):
        lowest_cosine(first, [first[0], first[1][:2]])


# ---------------------------------------------------------------- targets


def result_with(label, peak=1e12, flops=6e11, **systems):
    train, _, name = label.rpartition(":")
    work = Workload(name, ((1, 1),), bool(train))
    result = Result("llava_vit", "model", work, flops, [], peak)
    for key, (ms, backend, allocated) in systems.items():
        name = targets.ORIGINAL if key == "original" else key
        result.systems.append(
            Measured(name, key != "original", [ms] if ms else [], backend=backend, allocated=allocated)
        )
    return result


def met(result):
    return [(v.target.kind, v.system, v.met) for v in targets.verdicts(result)]


def test_targets_are_judged():
    result = result_with("uni32", packed=(1000.0, "cudnn", 1), original=(1990.0, None, 2))
    assert met(result) == [("mfu", "packed", False), ("faster", "packed", False)]
    result = result_with("uni32", packed=(900.0, "cudnn", 1), original=(1990.0, None, 2))
    assert met(result) == [("mfu", "packed", True), ("faster", "packed", True)]
    result = result_with("uni32", packed=(900.0, "cudnn", 1), original=(None, None, None))
    assert met(result) == [("mfu", "packed", True), ("faster", "packed", None)]


def test_flash_attention_3_has_targets_of_its_own():
    both = {"fa2": (1000.0, "flash_attention_2", 50), "fa3": (900.0, "flash_attention_3", 61)}
    found = met(result_with("ragged64", **both, original=(2000.0, None, 120)))
    assert found == [
        ("mfu", "fa2", True),
        ("faster", "fa2", True),
        ("mfu", "fa3", False),
        ("faster", "fa3", True),
        ("memory", "fa2", True),
        ("memory", "fa3", False),
    ]


def test_latency_and_training_targets():
    assert met(result_with("uni1", packed=(2.4, "x", 1), original=(11.9, None, 1))) == [
        ("ms", "packed", True),
        ("faster", "packed", False),
    ]
    labels = {t.label for t in targets.TARGETS if t.family == "llava_vit"}
    assert labels == {"uni1", "uni32", "ragged64", "train:uni16", "train:ragged8"}
    assert met(result_with("train:uni16", packed=(1000.0, "x", 85), original=(1700.0, None, 100)))[2][2] is True


def test_several_draws_are_held_to_their_median():
    padded = {}
    for number, (seed, (packed, other)) in enumerate(
        {"": (10.0, 46.0), "#2": (10.0, 70.0), "#3": (10.0, 52.0)}.items()
    ):
        result = Result("siglip2", "model", Workload(f"ragged32{seed}", ((1, 1 + number),)), 1e12, [], 1e12)
        result.systems = [Measured("packed", True, [packed]), Measured(targets.PADDED, False, [other])]
        padded[seed] = result
    (found,) = targets.over_draws(list(padded.values()))
    assert found.met and found.measured == 5.2 and found.draws == (4.6, 7.0, 5.2)
    assert "median of 3 draws, 4.60 to 7.00" in str(found)
    (found,) = targets.over_draws([padded[""], padded["#3"], padded["#3"]])
    assert not found.met and found.measured == pytest.approx(4.9)  # what was drawn twice counts once
    assert not targets.over_draws([padded["#2"]]) and not targets.over_draws([padded["#2"], padded["#2"]])
    assert [v.measured for v in targets.verdicts(padded[""])] == [4.6, None] and not targets.verdicts(padded["#2"])
    padded["#2"].systems[1].ms = []  # it ran out of memory, say
    (found,) = targets.over_draws(list(padded.values()))
    assert found.measured == pytest.approx(4.9) and "median of 2 draws (of 3)" in str(found)


# ---------------------------------------------------------------- kernels by name


@pytest.mark.parametrize(
    "name, kind",
    [
        ("nvjet_sm90_tst_192x192_64x4_2x1_v_bz_coopB_bias_TNT", "matmuls"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "matmuls"),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm>", "matmuls"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, float>", "matmuls"),
        ("void flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 128, 4, cutlass::bfloat16_t>>", "attention"),
        ("void cutlass::device_kernel<flash::enable_sm90<flash::FlashAttnFwdSm90<...>>>", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x64", "attention"),
        ("triton_red_fused_add_native_layer_norm_0", "norms and elementwise"),
        ("triton_poi_fused__to_copy_add_mul_2", "norms and elementwise"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<int>>", "norms and elementwise"),
        ("Memcpy HtoD (Pinned -> Device)", "copies"),
        ("void at::native::elementwise_kernel<128, 4, direct_copy_kernel_cuda>", "copies"),
    ],
)
def test_kernels_are_told_apart(name, kind):
    assert kind_of(name) == kind


def test_overlapping_kernels_count_once():
    assert busy_time([(5.0, 7.0), (0.0, 2.0), (1.0, 3.0), (1.0, 1.5)]) == 5.0


def test_titles_say_which_sizes():
    tiny = setting()
    assert tiny.title == "tiny llava_vit"
    assert replace(tiny, config=tiny.preset.config(tiny=False)).title == "LlavaViT-L/14"
