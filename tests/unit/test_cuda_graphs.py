"""CUDA graphs: when one is captured, when it is replayed, when it must not be. (Without a GPU: a stand-in for the graph
runs what was captured on the tensors that it reads.)"""

import itertools
import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from llava_packing_tower import HEVCViTPackingVisionTower, LlavaViTPackingConfig, LlavaViTPackingModel
from llava_packing_tower.data.cached_metadata import CachedMetadata, cached, once
from llava_packing_tower.data.segments import make_segments
from llava_packing_tower.models.runtime import cuda_graphs

ADAPTER = type("Adapter", (torch.nn.GELU,), {"__module__": "peft.tuners.lora.layer"})


@pytest.fixture
def tower(tmp_path, monkeypatch):
    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=2, patch_size=8)
    LlavaViTPackingModel(LlavaViTPackingConfig(**sizes, image_size=32)).save_pretrained(tmp_path / "vit_packing")
    built = HEVCViTPackingVisionTower(str(tmp_path / "vit_packing"), SimpleNamespace(mm_vision_select_layer=-2)).eval()

    def capture(function, inputs, device):
        result = function()

        def replay():
            made.replays += 1
            result[0].copy_(function()[0])

        made.captures += 1
        return cuda_graphs.Captured(replay, inputs, result, CachedMetadata())

    made = SimpleNamespace(captures=0, replays=0)
    monkeypatch.setattr(cuda_graphs, "DEVICE_TYPE", "cpu")
    monkeypatch.setattr(cuda_graphs, "capture", capture)
    built.made = made
    return built


def batch(*sizes, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(3, 8 * h, 8 * w, generator=draw) for h, w in sizes]


def run(tower, images):
    with torch.no_grad():
        return tower(images)


def test_the_third_batch_of_a_shape_is_captured_and_the_fourth_replayed(tower):
    images = [torch.stack(batch((3, 5), (3, 5), seed=seed)) for seed in range(5)]
    with torch.no_grad():
        want = [tower._encode(x)[0].unflatten(0, (2, -1)) for x in images]
    got = [run(tower, x) for x in images]
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert vars(tower.made) == {"captures": 1, "replays": 2}
    assert run(tower, images[0]).data_ptr() != run(tower, images[0]).data_ptr()  # no two results share memory


def test_lists_and_tensors_shapes_and_selections_are_kept_apart(tower):
    ragged = [batch((3, 5), (2, 7), seed=seed) for seed in range(4)]
    for images in ragged:
        for a, b in zip(run(tower, images), tower._encode(images)[0].split([15, 14]), strict=True):
            assert torch.equal(a, b)
    assert vars(tower.made) == {"captures": 1, "replays": 1}
    for a, b in zip(run(tower, ragged[0][::-1]), tower._encode(ragged[0])[0].split([15, 14])[::-1], strict=True):
        assert torch.equal(a, b)
    assert vars(tower.made) == {"captures": 1, "replays": 2}  # the same images in another order
    run(tower, torch.stack(batch((3, 5))))
    tower.select_layer = -1
    other = run(tower, ragged[0])
    assert not torch.equal(other[0], tower._encode(ragged[0])[0][:15] + 1) and tower.made.replays == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda tower: tower.vision_tower.double(),
        lambda tower: setattr(tower.vision_tower.encoder.layers[1].mlp.fc1.weight, "data", torch.randn(96, 64)),
        lambda tower: tower.vision_tower.encoder.layers[0].register_forward_hook(lambda *_: None),
        lambda tower: tower.train(),
        lambda tower: setattr(tower.vision_tower.encoder.layers[1].mlp, "act", ADAPTER()),
        lambda tower: tower.vision_tower.set_fused(False),
        lambda tower: tower.vision_tower.set_attention_backend("eager"),
    ],
)
def test_what_changes_the_run_is_not_replayed(tower, change):
    images = torch.stack(batch((3, 5), (3, 5)))
    for _ in range(4):
        run(tower, images)
    assert tower.made.replays == 1
    change(tower)
    got = run(tower, images)
    assert tower.made.replays == 1
    with torch.no_grad():
        assert torch.equal(got.flatten(0, 1), tower._encode(images)[0])


def test_weights_that_come_back_are_captured_again(tower):
    images, first = torch.stack(batch((3, 5))), tower.vision_tower.encoder.layers[0].mlp.fc1.weight.data
    second = first.clone()
    for weights, captures in ((first, 1), (second, 2), (first, 3)):
        tower.vision_tower.encoder.layers[0].mlp.fc1.weight.data = weights
        for _ in range(4):
            run(tower, images)
        assert tower.made.captures == captures


def test_gradients_are_not_replayed(tower):
    images = torch.stack(batch((3, 5)))
    for _ in range(4):
        run(tower, images)
    tower.requires_grad_(True)
    assert tower(images).requires_grad and tower.made.replays == 1
    tower.requires_grad_(False)
    assert tower(images.clone().requires_grad_()).requires_grad and tower.made.replays == 1
    tower(images)
    assert tower.made.replays == 2


def test_large_batches_and_the_switch(tower, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "MAX_TOKENS", 29)
    for _ in range(5):
        run(tower, batch((3, 5), (3, 5)))
    assert tower.made.captures == 0
    monkeypatch.setattr(cuda_graphs, "MAX_TOKENS", 30)
    monkeypatch.setenv("LLAVA_PACKING_CUDA_GRAPHS", "0")
    for _ in range(5):
        run(tower, batch((3, 5), (3, 5)))
    assert tower.made.captures == 0


@pytest.fixture
def small_memory(monkeypatch):
    policy = cuda_graphs.Policy(capture_at=3, counted=4, most=2)
    monkeypatch.setattr(cuda_graphs, "PIXELS", policy)
    monkeypatch.setitem(cuda_graphs._memories, policy, weakref.WeakKeyDictionary())
    return policy


def test_what_is_kept_is_bounded(tower, small_memory):
    for width in range(1, 9):
        for _ in range(3):
            run(tower, batch((1, width)))
    memory = cuda_graphs.memory_of(tower.vision_tower, small_memory)
    assert len(memory.captured) == len(memory.counts) == 2  # what was dropped is counted anew
    for width in range(9, 17):
        run(tower, batch((1, width)))
    assert len(memory.captured) == 2 and len(memory.counts) == 4
    with pytest.raises(ValueError, match="height 12 is not a positive multiple"):
        run(tower, [torch.randn(3, 12, 8)])


def test_shapes_that_come_again_after_many_others_are_not_captured(tower, small_memory):
    """A capture costs as much as fifty replays save: with ever new shapes it would be made and dropped unused."""
    for _ in range(6):
        for width in range(1, 8):
            run(tower, batch((1, width)))
    assert tower.made.captures == 0
    for _ in range(4):
        for width in (1, 2):
            run(tower, batch((1, width)))
    assert vars(tower.made) == {"captures": 2, "replays": 2}


def test_metadata_is_given_again_in_the_same_order():
    calls = []

    @cached(1)
    def outer(number):
        calls.append(number)
        return inner(number) + 1

    @cached(1)
    def inner(number):
        return torch.full((1,), float(number))

    def one_pass():
        return [outer(1), outer(2), once(lambda: calls.append("made") or "made"), outer(1)]

    metadata = CachedMetadata()
    with metadata.making():
        first = one_pass()
    assert calls == [1, 2, "made", 1]  # one value at most is kept here: the metadata of the graph holds them all
    with metadata.giving_again():
        second = one_pass()
    assert len(calls) == 4 and all(a is b for a, b in zip(first, second, strict=True))
    with pytest.raises(ValueError, match="more than the 4"), metadata.giving_again():
        one_pass()
        outer(3)
    with pytest.raises(ValueError, match="asked for 4 values, the second for 1"), metadata.giving_again():
        outer(1)
    assert outer(5).item() == 6 and calls[-1] == 5


# ---------------------------------------------------------------- graphs of the blocks alone


def blocks(hidden_states, segments, rotary, keep, backend):
    """Stand-in for the blocks: sums over each segment, with the tables; what the padding holds must not show."""
    borders = segments.cu_seqlens.tolist()
    parts = [hidden_states[a:b] * rotary[0][a:b, 0] for a, b in itertools.pairwise(borders)]
    out = torch.cat([part + part.sum(0) for part in parts])
    blocks.calls.append((len(hidden_states), len(borders) - 1, segments.max_seqlen, segments.lengths))
    return {index: out + index for index in keep}


@pytest.fixture
def captures(monkeypatch):
    """Captured graphs, made without a GPU."""
    made, blocks.calls = [], []

    def capture(function, inputs, device):
        calls = len(blocks.calls)
        for x in inputs[:1] + inputs[2:]:
            x.fill_(7.0)  # what lies in the padding must not show
        result = function()
        made.append(blocks.calls[-1][:3])
        del blocks.calls[calls:]
        return cuda_graphs.Captured(lambda: result.update(function()), inputs, result, CachedMetadata())

    monkeypatch.setattr(cuda_graphs, "capture", capture)
    return made


def graphed(lengths, module, seed=0, weights=1):
    draw = torch.Generator().manual_seed(seed)
    tokens, table = torch.randn(sum(lengths), 4, generator=draw), torch.randn(sum(lengths), 1, 4, generator=draw)
    segments = make_segments(lengths)
    got = cuda_graphs.run_blocks(module, blocks, tokens, segments, (table,), (1, 2), "torch_varlen", weights)
    want = blocks(tokens, segments, (table,), (1, 2), "torch_varlen")
    blocks.calls.pop()
    assert list(got) == [1, 2] and all(torch.equal(got[i], want[i]) for i in got)


def test_the_second_batch_of_a_kind_is_captured_and_the_first_runs_in_the_same_shapes(captures):
    module = torch.nn.Identity()
    for number, lengths in enumerate([(3, 250, 7), (11, 200), (5, 5, 251), (2, 4, 251)]):
        graphed(lengths, module, seed=number)
    assert captures == [(512, 4, 256)]  # (5, 5, 251) is the second of its kind
    kind = (512, 4, 256, ())
    assert blocks.calls == [kind, (256, 3, 256, ()), kind, kind]
    graphed((2, 4, 251), module, weights=2)  # other weights: all over again
    assert len(captures) == 1 and len(cuda_graphs.memory_of(module, cuda_graphs.BLOCKS).captured) == 1
    graphed((2, 4, 251), module, weights=2)
    assert len(captures) == 2 and len(cuda_graphs.memory_of(module, cuda_graphs.BLOCKS).captured) == 1


def test_a_full_bucket_gets_no_padding(captures):
    module = torch.nn.Identity()
    for _ in range(3):
        graphed((100, 156), module)
    assert captures == [(256, 2, 256)] and set(blocks.calls) == {(256, 2, 256, ())}


def test_kinds_that_take_turns_are_not_captured_over_and_over(captures, monkeypatch):
    policy = replace(cuda_graphs.BLOCKS, most=2)
    monkeypatch.setattr(cuda_graphs, "BLOCKS", policy)
    monkeypatch.setitem(cuda_graphs._memories, policy, weakref.WeakKeyDictionary())
    module = torch.nn.Identity()
    for _ in range(6):
        for count in range(1, 6):
            graphed((256,) * count, module)
    assert len(cuda_graphs.memory_of(module, cuda_graphs.BLOCKS).captured) == 2
    assert len(captures) <= 15  # at most every second time
