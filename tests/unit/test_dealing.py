"""The deal of an optimizer step: every sample once, equal micro-steps, the token budget, the host's weights."""

from __future__ import annotations

import random
from collections import deque
from datetime import timedelta
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Trainer

from llava_packing_tower.data.image_processor import PackingImageProcessor
from llava_packing_tower.integrations.llava import dealt_loader, native_dataset
from llava_packing_tower.integrations.llava.dealing_report import Dealings, StepTimes, describe
from llava_packing_tower.integrations.llava.dealt_batches import (
    _angles_of_the_batch,
    _hands_on,
    _ranks_apart,
    check_columns,
    check_not_empty,
    refuse_undealt,
)
from llava_packing_tower.integrations.llava.dealt_loader import DealtBatches, DealtDataset, Place
from llava_packing_tower.integrations.llava.methods import add_step
from llava_packing_tower.integrations.llava.patcher import Patches
from llava_packing_tower.multimodal.dealing import (
    LAYER_FLOOR,
    Cost,
    SampleSize,
    balance_of,
    calls_of,
    deal,
    deal_within,
    error_of,
    layer_cost,
    layer_floor,
    weights_as_averaged,
)

COSTS = st.lists(st.floats(0.5, 1e6), min_size=1, max_size=40)


def positions(dealt):
    return sorted(p for parts in dealt for part in parts for p in part)


@settings(deadline=None)
@given(COSTS, st.integers(1, 5), st.integers(1, 4))
def test_every_sample_once_and_no_micro_batch_empty(costs, ranks, steps):
    dealt = deal(costs, ranks, steps)
    assert positions(dealt) == list(range(len(costs)))
    assert [len(parts) for parts in dealt] == [steps] * ranks
    filled = sum(bool(part) for parts in dealt for part in parts)
    assert filled == min(len(costs), ranks * steps)
    assert deal(list(costs), ranks, steps) == dealt
    # Longest first is within 4/3 - 1/3m of the best largest micro-batch (Graham 1969), which is at least the mean.
    largest = max(sum(costs[p] for p in part) for parts in dealt for part in parts)
    bound = max(max(costs), sum(costs) / (ranks * steps))
    second = sorted(costs)[-ranks * steps - 1] * 2 if len(costs) > ranks * steps else 0
    assert largest <= (4 / 3) * max(bound, second) + 1e-6 * largest


@settings(deadline=None)
@given(st.lists(st.integers(1, 100), min_size=1, max_size=40), st.integers(1, 5), st.integers(100, 300), st.data())
def test_the_budget_is_kept_with_equally_many(tokens, ranks, limit, data):
    costs = data.draw(st.lists(st.floats(1, 100), min_size=len(tokens), max_size=len(tokens)))
    dealt = deal_within(tokens, costs, ranks, limit)
    assert positions(dealt) == list(range(len(tokens)))
    assert len({len(parts) for parts in dealt}) == 1
    assert max(sum(tokens[p] for p in part) for parts in dealt for part in parts) <= limit
    filled = sum(bool(part) for parts in dealt for part in parts)
    assert filled == min(len(tokens), ranks * len(dealt[0]))
    # First fit, longest first, needs at most 11/9 of the fewest bins and 6/9 of one more (Dosa 2007).
    fewest = -(-sum(tokens) // limit)
    assert len(dealt[0]) <= -(-max(2 * fewest, 1) // ranks)
    assert deal_within(list(tokens), list(costs), ranks, limit) == dealt


def test_the_budget_takes_the_fewest_micro_batches():
    # Longest first by cost would need a third bin; first fit does not.
    tokens, costs = [6, 5, 5, 4, 4, 4, 2], [1.0, 9.0, 1.0, 9.0, 1.0, 9.0, 1.0]
    dealt = deal_within(tokens, costs, 1, 15)
    assert len(dealt[0]) == 2 and all(sum(tokens[p] for p in part) <= 15 for part in dealt[0])
    with pytest.raises(ValueError, match="a sample has 16 tokens, but a micro-batch may have 15"):
        deal_within([3, 16], [1.0, 1.0], 2, 15)


def test_ranks_share_the_panoramas():
    """One document in ten, as in the measurements of 0.42 of a step's time."""
    chance = random.Random(3)
    costs = [chance.uniform(20, 40) if chance.random() < 0.1 else chance.uniform(1, 4) for _ in range(8 * 2 * 16)]
    undealt = [[list(range((s * 16 + r) * 8, (s * 16 + r + 1) * 8)) for s in range(2)] for r in range(16)]
    assert balance_of(costs, undealt) < 0.6 < 0.95 < balance_of(costs, deal(costs, 16, 2))


def test_similar_micro_batches_share_a_micro_step():
    # 100 beside 90, 6 beside 5; the rank that had 90 gets 6.
    assert deal([100.0, 90.0, 3.0, 2.0, 1.0, 5.0], 2, 2) == [[[0], [2, 3]], [[1], [4, 5]]]


@given(st.integers(1, 30), st.integers(1, 9))
def test_calls_take_all_micro_batches_and_the_last_one_some(micro_batches, calls):
    taken = calls_of(micro_batches, calls)
    assert len(taken) == calls and sum(taken) == micro_batches and taken[-1] >= 1
    assert max(taken) - min(taken) <= 1


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 30)), min_size=1, max_size=30))
def test_weights_are_those_of_the_hosts_average(samples):
    groups, supervised = zip(*samples)
    weights = weights_as_averaged(groups, supervised)
    for group in set(groups):
        inside = [w * n for w, n, g in zip(weights, supervised, groups) if g == group]
        total = sum(n for n, g in zip(supervised, groups) if g == group)
        assert sum(inside) == pytest.approx(1 if total else 0)
        assert {w for w, g in zip(weights, groups) if g == group} == {float(Fraction(1, total)) if total else 0.0}


def test_cost_counts_operations():
    row, pair = layer_cost(64, 3, 1000, passes=3)
    assert (row, pair) == (pytest.approx(6e-6), pytest.approx(4e-9 * 64 * 3 * 3))
    assert layer_cost(64, 3, 1000, passes=1) == (pytest.approx(row / 3), pytest.approx(pair / 3))
    assert layer_cost(64, 3, 1000, passes=2.25) == (pytest.approx(row * 0.75), pytest.approx(pair))
    cost = Cost(patch=2, patch_pair=0.5, token=3, token_pair=0.25, supervised=7)
    assert cost(SampleSize(patches=10, pairs=52, tokens=8, supervised=2)) == 20 + 26 + 24 + 8 + 14
    assert Cost(**cost.items()) == cost and cost.micro_step == 0


def test_a_micro_step_costs_something_without_rows():
    """Text alone: a hundredth of the operations, in two thirds of the time."""
    assert layer_floor(48, passes=3) == 48 * LAYER_FLOOR == 2 * layer_floor(72, passes=1)
    costs, seconds = [1000.0, 60_000.0, 110_000.0], [0.36, 0.45, 0.52]
    floor = layer_floor(48, passes=3)
    assert error_of([cost + floor for cost in costs], seconds) < 0.1 < 0.5 < error_of(costs, seconds)
    # It is the same for every rank and every deal: what waits is less of a step's time.
    dealt = [[[0], [1]], [[2], [3]]]
    assert balance_of([3, 1, 1, 1], dealt) == 6 / 8 < balance_of([3, 1, 1, 1], dealt, micro_step=2) == 14 / 16


def test_the_times_say_what_the_formula_leaves_out():
    times = StepTimes(deque((float(cost), 0.2 + 3e-6 * cost) for cost in range(10_000, 200_000, 9000)))
    assert times.fitted() == (pytest.approx(0.2), pytest.approx(3e-6))
    assert "(+0.200 s a step, 3.000 s for 10^15 operations)" in describe(Dealings(1, 0.5, 0.9), times)
    same = StepTimes(deque([(5.0, 1.0), (5.0, 2.0)] * 9))
    assert same.fitted() is None and describe(Dealings(1, 0.5, 0.9), same).endswith("33 % off the measured times")


@pytest.mark.parametrize(
    ("ranks", "micro_batches", "engine", "newer", "apart"),
    [
        (2, 7, None, False, True),
        (1, 7, None, False, False),
        (2, 16, None, False, False),
        (2, 7, "ZeRO", False, False),
        (2, 7, None, True, False),
    ],
)
def test_ranks_whose_gradients_are_not_added_up_keep_their_samples(ranks, micro_batches, engine, newer, apart):
    """transformers 4.40 ends epochs of fewer micro-batches than an optimizer step has with gradients of each rank."""
    state = SimpleNamespace(deepspeed_plugin=engine)
    trainer = SimpleNamespace(
        args=SimpleNamespace(gradient_accumulation_steps=16),
        accelerator=SimpleNamespace(num_processes=ranks, state=state),
        **({"get_batch_samples": None} if newer else {}),
    )
    reason = _ranks_apart(trainer, micro_batches)
    assert (reason is not None) == apart and (not apart or "7 micro-batches" in reason)


@pytest.mark.parametrize(
    ("scaling", "longest", "limit"),
    [
        ({"type": "dynamic", "factor": 2.0}, 65, 64),
        ({"rope_type": "dynamic", "factor": 2.0}, None, 64),
        ({"rope_type": "longrope", "original_max_position_embeddings": 16}, 17, 16),
        ({"rope_type": "dynamic", "factor": 2.0}, 64, None),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16}, 65, None),
        (None, 65, None),
    ],
)
def test_samples_whose_angles_depend_on_their_batch_stay_in_it(scaling, longest, limit):
    config = SimpleNamespace(
        rope_scaling=scaling, max_position_embeddings=64, tokenizer_model_max_length=longest, rope_parameters=None
    )
    reason = _angles_of_the_batch(config)
    assert (reason is None) == (limit is None) and (limit is None or f"more than {limit} tokens" in reason)


def test_ranks_with_other_samples_are_noticed(monkeypatch):
    """An index would mean another sample on each of them."""
    seen = []

    def gather(every, own, group):
        seen.append(own)
        every[:] = [seen[0], own]

    monkeypatch.setattr(dealt_loader.dist, "all_gather_object", gather)
    samples = [{"id": n, "image": f"{n}.png", "conversations": [{"from": "human", "value": "q" * n}]} for n in range(4)]
    exchange = dealt_loader.Exchange(1, timedelta(1))
    assert exchange.agrees(samples) and seen == []
    exchange.ranks, exchange.group = 2, "both"
    assert exchange.agrees(samples) and exchange.agrees([dict(sample) for sample in samples])
    for others in (samples[::-1], samples[:3], [*samples[:3], {**samples[3], "image": "4.png"}]):
        assert not exchange.agrees(others)


def test_chance_chooses_the_same_samples_on_every_rank(monkeypatch):
    """LLaVA-NeXT's ``sampling_strategy: random`` draws from Python's numbers, which nobody has seeded by then."""
    ours = SimpleNamespace(image_processor=PackingImageProcessor(size=8))
    monkeypatch.setattr(native_dataset, "current_training_arguments", lambda: SimpleNamespace(seed=5))
    monkeypatch.delenv("LLAVA_PACKING_TRAINER", raising=False)

    def drawn(data_args):
        native_dataset.same_choice(SimpleNamespace(arguments={"data_args": data_args}))
        return random.random()

    assert drawn(ours) == drawn(ours) != drawn(SimpleNamespace(image_processor=None))
    monkeypatch.setenv("LLAVA_PACKING_TRAINER", "sft")  # `llava-packing train` has seeded them
    assert drawn(ours) != drawn(ours)


def test_a_loader_without_a_batch_is_refused():
    """transformers 5 would train no step, and save a model as if it had."""
    trainer = SimpleNamespace(train_dataset=range(37), accelerator=SimpleNamespace(num_processes=2))
    for count in (2, 1, 0):
        batches = torch.utils.data.BatchSampler(range(count * 40), 40, True)
        loader = torch.utils.data.DataLoader(range(count * 40), batch_sampler=batches)
        if count:
            check_not_empty(trainer, loader)
    with pytest.raises(ValueError, match="37 samples make no micro-batch: per_device_train_batch_size is 40 on 2 proc"):
        check_not_empty(trainer, loader)


def trainer_of(entries=({"id": 0}, {"id": 1, "image": "1.png"}), **asked):
    args = SimpleNamespace(remove_unused_columns=False)
    self = SimpleNamespace(args=args, label_smoother=None, compute_loss=Trainer.compute_loss)
    self.train_dataset = SimpleNamespace(list_data_dict=list(entries))
    config = SimpleNamespace(**{f"mm_packing_{name}": value for name, value in asked.items()})
    self.model = SimpleNamespace(get_vision_tower=None, config=config)
    return self


def test_arguments_with_which_samples_lose_their_images():
    """They fail in the first step with an image, whichever script starts the host."""
    trainer = trainer_of()
    check_columns(trainer)
    trainer.label_smoother = object()
    with pytest.raises(ValueError, match="label_smoothing_factor: transformers smooths the labels of the text"):
        check_columns(trainer)
    trainer.compute_loss = lambda *_: 0.0  # which may know better
    check_columns(trainer)
    trainer.args.remove_unused_columns = True
    with pytest.raises(ValueError, match="remove_unused_columns: LLaVA's samples would lose their images"):
        check_columns(trainer)
    trainer.train_dataset.list_data_dict = [{"id": 0}, {"id": 1, "image": None}]
    check_columns(trainer)


def test_a_data_loader_of_ones_own_does_not_lose_a_key():
    refuse_undealt(trainer_of(balance=True))
    with pytest.raises(ValueError, match="mm_packing_batch_tokens 300 cannot be kept: SimpleNamespace makes its data"):
        refuse_undealt(trainer_of(batch_tokens=300))
    with pytest.raises(ValueError, match="mm_packing_loss_average tokens cannot be kept"):
        refuse_undealt(trainer_of(loss_average="tokens"))


def test_a_training_step_of_ones_own():
    """It would get batches of several micro-batches, which only ours takes apart."""

    class Host(Trainer):
        pass

    class Own(Host):
        def training_step(self, model, inputs):
            return model(**inputs).loss

    class Around(Host):
        def training_step(self, model, inputs):
            return 2 * super().training_step(model, inputs)

    class Under(Around, Own):
        pass

    patches = Patches()
    add_step(Host, "LLaVATrainer.training_step", "dealt_batches", lambda call: None, patches)  # as in a host
    assert _hands_on(Host) and _hands_on(Around) and not _hands_on(Own) and not _hands_on(Under)
    patches.undo()


@pytest.mark.parametrize(("counted", "weight"), [((205, 8), 0.25), ((90, 4), 0.125), ((0, 0), 0.0)])
def test_a_video_gets_the_part_of_the_loss_that_was_counted_for_it(counted, weight):
    """Its frames may be others than its header says, and a header may not be readable although its frames are."""

    class Samples:
        def __init__(self):
            self.list_data_dict = [{"video": "a.mp4"}, {"image": "a.png"}]

        def __getitem__(self, index):
            return {"id": index}

    reader = SimpleNamespace(of_item=lambda item: SampleSize(9, 9, tokens=205, supervised=8))
    place = Place(0, 0, 0.25, *counted)
    found = DealtDataset(Samples(), reader)[place].place
    assert (found.tokens, found.supervised, found.weight) == (205, 8, weight)
    if counted != (205, 8):
        with pytest.raises(ValueError, match="sample 1 has 205 tokens, 8 of them supervised, but"):
            DealtDataset(Samples(), reader)[place._replace(index=1)]


@pytest.mark.newest
@pytest.mark.parametrize("ranks", [1, 2])
def test_accelerate_tells_the_hosts_sampler_the_epoch(ranks):
    """Else a run that skips no data (ignore_data_skip) takes the order of its first epoch again."""
    from accelerate.data_loader import BatchSamplerShard, DataLoaderShard
    from torch.utils.data import BatchSampler, SequentialSampler

    class OfEpochs(SequentialSampler):
        def set_epoch(self, epoch):
            self.epoch = epoch

    sampler = OfEpochs(range(5))
    batches = BatchSampler(sampler, 2, False)
    batches = batches if ranks == 1 else BatchSamplerShard(batches, ranks, 1)
    dealt = DealtBatches(batches, iter, None, None, 1, 2, int)
    DataLoaderShard(range(5), batch_sampler=dealt).set_epoch(3)
    assert sampler.epoch == 3


def test_error_of_a_prediction():
    assert error_of([1, 2, 3], [10.0, 20.0, 30.0]) == pytest.approx(0)
    assert error_of([1, 1], [1.0, 3.0]) == pytest.approx(0.5)
