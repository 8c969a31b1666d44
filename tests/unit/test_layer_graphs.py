"""Checkpointed blocks of an encoder by CUDA graphs, without a GPU (see ``cpu_graphs``)."""

import pytest
import torch
from cpu_graphs import BACKEND, graphs_on_cpu

from llava_packing_tower import LlavaViTPackingConfig, LlavaViTPackingModel
from llava_packing_tower.models.runtime import layer_graphs


@pytest.fixture
def made():
    with graphs_on_cpu() as made:
        yield made


def build(wide=48):
    torch.manual_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=wide, num_hidden_layers=3, num_attention_heads=2, patch_size=8)
    model = LlavaViTPackingModel(LlavaViTPackingConfig(**sizes, image_size=32, use_head=False)).double().train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.set_fused(True)
    model.set_attention_backend(BACKEND)
    model.encoder.gradient_checkpointing = True
    return model


def batch(*sizes, seed=0):
    """Patches [N, 192] of images of so many rows and columns, and their grids."""
    draw, grids = torch.Generator().manual_seed(seed), torch.tensor([[1, h, w] for h, w in sizes])
    return torch.randn(int(grids.prod(1).sum()), 192, generator=draw, dtype=torch.float64), grids


def step(model, *batches):
    """Losses and gradients of a step with several passes before the first backward."""
    model.zero_grad()
    losses = [model(*each).last_hidden_state.pow(2).sum() / 10 for each in batches]
    sum(losses).backward()
    return [loss.detach() for loss in losses], {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def compare(model, monkeypatch, *batches):
    got = step(model, *batches)
    with monkeypatch.context() as patch:
        patch.setenv("LLAVA_PACKING_CUDA_GRAPHS", "0")
        want = step(model, *batches)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_gradients_are_those_of_checkpointing(made, monkeypatch):
    model = build()
    first, second = batch((3, 4), (5, 2), (1, 7)), batch((2, 9), (3, 3), seed=1)  # 29 and 27 tokens, 3 and 2 images
    compare(model, monkeypatch, first, second)
    assert vars(made) == {"captures": 4, "replays": 12}  # of two kinds, not of six layers; 3 layers, twice, 2 batches
    shorter = batch((4, 5), (1, 2), seed=2)  # 22 tokens, as long a bucket
    compare(model, monkeypatch, shorter, second)
    assert made.captures == 4
    compare(model, monkeypatch, batch((4, 4), (2, 8)))  # a full bucket
    assert made.captures == 6


def test_what_one_batch_left_behind_is_no_part_of_the_next(made, monkeypatch):
    model = build()
    step(model, batch((5, 6)))
    for buffers in (layer_graphs._graphs[model.encoder][1].buffers,):
        for buffer in buffers.values():
            buffer.rows[: buffer.filled] = torch.nan
    compare(model, monkeypatch, batch((3, 6)))


def test_frozen_blocks_and_weights_get_no_gradients(made, monkeypatch):
    model = build()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.1" in name or "layers.2.mlp" in name)
    compare(model, monkeypatch, batch((3, 4), (5, 2)))
    assert set(step(model, batch((2, 3)))[1]) == {n for n, p in model.named_parameters() if p.requires_grad}


def test_weights_that_change_are_read_anew(made, monkeypatch):
    model = build()
    for number in range(3):
        compare(model, monkeypatch, batch((3, 4), (5, 2), seed=number))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(parameter.grad * 1e-3)
        model.encoder.layers[1].mlp.fc1.weight.data = model.encoder.layers[1].mlp.fc1.weight.data.clone()
    assert made.captures == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model.encoder, "gradient_checkpointing", False),
        lambda model: model.eval(),
        lambda model: model.encoder.layers[1].register_forward_hook(lambda *_: None),
        lambda model: setattr(model.encoder.layers[1].mlp, "act", torch.nn.Sequential(model.encoder.layers[1].mlp.act)),
        lambda model: model.set_fused(False),
        lambda model: setattr(model.encoder, "_gradient_checkpointing_func", lambda run, *given: run(*given)),
    ],
)
def test_what_is_not_replayed(made, change):
    model = build()
    step(model, batch((3, 4), (5, 2)))
    assert made.replays == 6
    change(model)
    step(model, batch((3, 4), (5, 2)))
    assert made.replays == 6


def test_large_batches_are_checkpointed_as_before(made, monkeypatch):
    model = build()
    compare(model, monkeypatch, batch((9, 8)))  # 72 tokens, of at most 64
    monkeypatch.setattr(layer_graphs, "MAX_WORK", 20 * sum(p.numel() for p in model.encoder.layers[0].parameters()))
    compare(model, monkeypatch, batch((3, 7)))
    assert vars(made) == {"captures": 0, "replays": 0}
    compare(model, monkeypatch, batch((4, 5)))
    assert made.replays == 6


def test_blocks_of_other_sizes_are_checkpointed(made, monkeypatch):
    model = build()
    other = build(40)
    model.encoder.layers[1] = other.encoder.layers[1]
    graphs = layer_graphs.LayerGraphs(model.encoder.layers[0])
    states = torch.zeros(4, 64, dtype=torch.float64)
    assert graphs.fits(list(model.encoder.layers[2].parameters()), states)
    assert not graphs.fits(list(model.encoder.layers[1].parameters()), states)
    assert not graphs.fits(list(model.encoder.layers[2].parameters()), states.float())


@pytest.mark.parametrize("failures", [1, 2])
def test_without_memory_for_graphs_blocks_are_checkpointed(made, monkeypatch, caplog, failures):
    """The first failure may be of memory that the allocator keeps: only a second one is final, for such batches."""
    model, capture, failed = build(), layer_graphs.capture, []

    def without_memory(function, device):
        if len(failed) < failures:
            failed.append(torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."))
            raise failed[-1]
        return capture(function, device)

    monkeypatch.setattr(layer_graphs, "capture", without_memory)
    for _ in range(2):
        compare(model, monkeypatch, batch((3, 4), (5, 2)))
    assert made.replays == (12 if failures == 1 else 0)
    assert ("no CUDA graphs of layers for batches of 32 tokens: CUDA out of memory" in caplog.text) == (failures == 2)
    compare(model, monkeypatch, batch((2, 4)))
    assert made.replays == (18 if failures == 1 else 6)
