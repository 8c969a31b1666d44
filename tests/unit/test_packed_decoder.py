"""Rows, causal attention by segments, and the loss on supervised positions, against plain arithmetic."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from llava_packing_tower.attention import dispatch
from llava_packing_tower.attention.dispatch import backend_module
from llava_packing_tower.data.segments import make_segments
from llava_packing_tower.integrations.llava import words_on_host
from llava_packing_tower.multimodal import packed_decoder
from llava_packing_tower.multimodal.packed_decoder import causal_attention, causal_backend, pack_batch, segments_of
from llava_packing_tower.multimodal.supervised_head import IGNORE, next_labels, supervised_loss

LENGTHS = (5, 1, 8, 5, 3)


def masked(q, k, v, lengths, scale):
    """Causal attention with a mask of all by all: what the backends must never need."""
    group = q.shape[1] // k.shape[1]
    k, v = (torch.stack([x[:, head // group] for head in range(q.shape[1])], dim=1) for x in (k, v))
    sample = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    place = torch.arange(len(sample))
    seen = (sample[:, None] == sample[None]) & (place[:, None] >= place[None])
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v)


@pytest.mark.newest
@pytest.mark.parametrize("name", ["sdpa", "eager"])
@pytest.mark.parametrize("key_heads", [1, 2, 6])
@pytest.mark.parametrize("lengths", [LENGTHS, (4, 4, 4), (7,)])
def test_causal_attention_of_grouped_queries(name, key_heads, lengths):
    heads = [torch.randn(sum(lengths), count, 8, requires_grad=True) for count in (6, key_heads, key_heads)]
    expected = masked(*heads, lengths, 0.3)
    found = backend_module(name).attend(*heads, make_segments(lengths), 0.3, causal=True)
    weights = torch.randn_like(expected)
    assert (found - expected).abs().max() < 1e-5
    for ours, theirs in zip(torch.autograd.grad(found, heads, weights), torch.autograd.grad(expected, heads, weights)):
        assert (ours - theirs).abs().max() < 1e-5


def test_full_attention_is_what_it_was():
    q, k, v = torch.randn(3, sum(LENGTHS), 2, 8)
    for name in ("sdpa", "eager"):
        parts = [
            (a.transpose(0, 1) @ b.permute(1, 2, 0) * 0.3).softmax(-1) @ c.transpose(0, 1)
            for a, b, c in zip(q.split(LENGTHS), k.split(LENGTHS), v.split(LENGTHS))
        ]
        expected = torch.cat([part.transpose(0, 1) for part in parts])
        assert (backend_module(name).attend(q, k, v, make_segments(LENGTHS), 0.3) - expected).abs().max() < 1e-5


def looks_ahead(q, k, v, segments, scale, causal):
    return backend_module("sdpa").attend(q, k, v, segments, scale)


def fails(q, k, v, segments, scale, causal):
    raise RuntimeError("no kernel image")


def older(q, k, v, segments, scale):
    return backend_module("sdpa").attend(q, k, v, segments, scale)


def forget_choices():
    dispatch._choose.cache_clear()
    dispatch._verdicts.clear()


@pytest.mark.parametrize("attend", [looks_ahead, fails, older])
def test_a_backend_that_is_wrong_is_not_chosen(monkeypatch, attend):
    module = backend_module("flash_attention_2")
    monkeypatch.setattr(module, "unsupported_reason", lambda *_: None)
    monkeypatch.setattr(module, "attend", attend)
    forget_choices()
    assert causal_backend("cpu", torch.float32, 16, LENGTHS) == "sdpa"
    forget_choices()


def batch(lengths, side="right"):
    longest = max(lengths)
    row = torch.arange(longest)
    counts = torch.tensor(lengths)[:, None]
    return row < counts if side == "right" else row >= longest - counts


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_row_holds_each_token_once(side):
    mask = batch(LENGTHS, side)
    values = torch.randn(*mask.shape, 4)
    row = pack_batch(mask, torch.full(mask.shape, IGNORE))
    assert torch.equal(row.pack(values)[0], values[mask])
    assert row.position_ids.tolist() == [[p for length in LENGTHS for p in range(length)]]
    assert row.segments.lengths == LENGTHS and row.segments.max_seqlen == 8
    assert torch.equal(row.pad(row.pack(values), *mask.shape), values * mask[..., None])


def test_batches_that_have_no_equal_in_one_row():
    nothing = torch.full((2, 4), IGNORE)
    gap = torch.tensor([[1, 1, 0, 1], [1, 1, 1, 1]]).bool()
    assert pack_batch(gap, nothing) is None
    left = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]).bool()
    labels = torch.tensor([[IGNORE, IGNORE, 5, 6], [IGNORE, 7, 8, 9]])
    assert pack_batch(left, next_labels(labels)) is None  # padding would predict the 5
    labels[0, 2] = IGNORE
    assert pack_batch(left, next_labels(labels)).segments.lengths == (2, 4)
    assert pack_batch(torch.zeros(2, 4, dtype=torch.bool), nothing) is None
    empty = torch.tensor([[1, 1, 1, 0], [0, 0, 0, 0]]).bool()
    assert pack_batch(empty, nothing).segments.lengths == (3,)


def test_a_row_is_known_by_its_positions():
    row = pack_batch(batch(LENGTHS), torch.full((5, 8), IGNORE))
    assert segments_of(row.position_ids, training=False) is row.segments
    assert segments_of(row.position_ids.detach(), training=True) is row.segments  # what a reentrant checkpoint passes
    copy = row.position_ids.clone()
    assert segments_of(copy, training=False) is None
    assert segments_of(copy, training=True).lengths == LENGTHS
    assert segments_of(torch.arange(9)[None], training=True) is None  # one sample
    assert segments_of(torch.arange(9)[None] + 4, training=True) is None  # one padded on the left
    assert segments_of(torch.arange(9).expand(2, 9), training=True) is None and segments_of(None, True) is None


def test_many_rows_may_wait_for_their_backward():
    rows = [pack_batch(batch((n + 1, 2)), torch.full((2, max(n + 1, 2)), IGNORE)) for n in range(200)]
    for row in rows:
        assert segments_of(row.position_ids, training=True).lengths == row.segments.lengths
    assert len(packed_decoder._rows) <= packed_decoder.KEPT_ROWS


def test_causal_attention_chooses_by_itself():
    heads = [torch.randn(sum(LENGTHS), count, 16) for count in (4, 2, 2)]
    found = causal_attention(*heads, make_segments(LENGTHS), 0.25)
    assert (found - masked(*heads, LENGTHS, 0.25)).abs().max() < 1e-5


# ---------------------------------------------------------------- the head


def test_labels_are_those_of_the_neighbour_in_the_row():
    labels = torch.tensor([[1, 2, 3], [4, IGNORE, 6]])
    assert next_labels(labels).tolist() == [[2, 3, IGNORE], [IGNORE, 6, IGNORE]]


@pytest.mark.parametrize("num_items", [None, 7, torch.tensor(7)])
def test_the_loss_is_that_of_all_positions(num_items):
    head, states = nn.Linear(6, 11), torch.randn(9, 6, requires_grad=True)
    targets = torch.tensor([3, IGNORE, 0, IGNORE, IGNORE, 10, 1, IGNORE, 4])
    given = [states, *head.parameters()]
    reduction = "mean" if num_items is None else "sum"
    expected = nn.functional.cross_entropy(head(states), targets, reduction=reduction) / (num_items or 1)
    rows = []
    head.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    found = supervised_loss(states, targets, head, num_items)
    assert rows == [5] and abs(found.item() - expected.item()) < 1e-6
    for ours, theirs in zip(torch.autograd.grad(found, given), torch.autograd.grad(expected, given)):
        assert (ours - theirs).abs().max() < 1e-6


def test_no_label_is_nan_with_gradients_of_zero():
    head, states = nn.Linear(6, 11), torch.randn(4, 6, requires_grad=True)
    loss = supervised_loss(states, torch.full((4,), IGNORE), head)
    assert loss.isnan()
    assert all((gradient == 0).all() for gradient in torch.autograd.grad(loss, [states, *head.parameters()]))


def test_half_precision_logits_are_summed_in_float32():
    head, states = nn.Linear(6, 11).bfloat16(), torch.randn(4, 6).bfloat16()
    assert supervised_loss(states, torch.tensor([1, 2, IGNORE, 3]), head).dtype == torch.float32


# ---------------------------------------------------------------- what is known on the host


def test_a_copy_on_the_host_is_of_one_state_of_a_tensor():
    labels = torch.tensor([[IGNORE, 5, 6], [7, 8, IGNORE]])
    there = words_on_host._back(labels, torch.device("meta"))
    assert there.device.type == "meta" and words_on_host.on_host(there) is labels
    there[0, 1] = IGNORE  # by somebody between LLaVA's two methods: the copy has no longer what is trained
    with pytest.raises(NotImplementedError):  # a meta tensor cannot be read, but it is asked again
        words_on_host.on_host(there)
    assert torch.equal(words_on_host.on_host(labels), labels)
