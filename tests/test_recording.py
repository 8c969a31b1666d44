"""Recordings of the whole tower: when one is made, when it is used, when it must not be. (Without a GPU: a stand-in for
the graph runs the tower on the recorded pixels.)"""

from types import SimpleNamespace

import pytest
import torch

from llava_packing_tower import HEVCViTPackingVisionTower, LlavaViTPackingConfig, LlavaViTPackingModel, recording
from llava_packing_tower.packing import kept
from llava_packing_tower.tape import Tape, taped

ADAPTER = type("Adapter", (torch.nn.GELU,), {"__module__": "peft.tuners.lora.layer"})


@pytest.fixture
def tower(tmp_path, monkeypatch):
    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=2, patch_size=8)
    LlavaViTPackingModel(LlavaViTPackingConfig(**sizes, image_size=32)).save_pretrained(tmp_path / "vit_packing")
    built = HEVCViTPackingVisionTower(str(tmp_path / "vit_packing"), SimpleNamespace(mm_vision_select_layer=-2)).eval()

    def record(images, encode, like):
        pixels = images.clone() if isinstance(images, torch.Tensor) else [x.clone() for x in images]
        packed, grids = encode(pixels)

        def replay():
            made.replays += 1
            packed.copy_(encode(pixels)[0])

        made.recordings += 1
        return recording.Recording(replay, pixels, packed, grids, Tape())

    made = SimpleNamespace(recordings=0, replays=0)
    monkeypatch.setattr(recording, "DEVICE_TYPE", "cpu")
    monkeypatch.setattr(recording, "record", record)
    monkeypatch.setattr(recording, "compile_wanted", lambda choice, device: choice is not False)
    built.made = made
    return built


def batch(*sizes, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(3, 8 * h, 8 * w, generator=draw) for h, w in sizes]


def run(tower, images):
    with torch.no_grad():
        return tower(images)


def test_the_third_batch_of_a_shape_is_recorded_and_the_fourth_replayed(tower):
    images = [torch.stack(batch((3, 5), (3, 5), seed=seed)) for seed in range(5)]
    with torch.no_grad():
        want = [tower._encode(x)[0].unflatten(0, (2, -1)) for x in images]
    got = [run(tower, x) for x in images]
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert vars(tower.made) == {"recordings": 1, "replays": 2}
    assert run(tower, images[0]).data_ptr() != run(tower, images[0]).data_ptr()  # no two results share memory


def test_lists_and_tensors_shapes_and_selections_are_kept_apart(tower):
    ragged = [batch((3, 5), (2, 7), seed=seed) for seed in range(4)]
    for images in ragged:
        for a, b in zip(run(tower, images), tower._encode(images)[0].split([15, 14]), strict=True):
            assert torch.equal(a, b)
    assert vars(tower.made) == {"recordings": 1, "replays": 1}
    for a, b in zip(run(tower, ragged[0][::-1]), tower._encode(ragged[0])[0].split([15, 14])[::-1], strict=True):
        assert torch.equal(a, b)
    assert vars(tower.made) == {"recordings": 1, "replays": 2}  # the same images in another order
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
        lambda tower: tower.vision_tower.set_compile(False),
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
    monkeypatch.setattr(recording, "MAX_TOKENS", 29)
    for _ in range(5):
        run(tower, batch((3, 5), (3, 5)))
    assert tower.made.recordings == 0
    monkeypatch.setattr(recording, "MAX_TOKENS", 30)
    monkeypatch.setenv("LLAVA_PACKING_CUDA_GRAPHS", "0")
    for _ in range(5):
        run(tower, batch((3, 5), (3, 5)))
    assert tower.made.recordings == 0


def test_what_is_kept_is_bounded(tower, monkeypatch):
    monkeypatch.setattr(recording, "MAX_RECORDINGS", 2)
    monkeypatch.setattr(recording, "MAX_COUNTED", 5)
    for width in range(1, 9):
        for _ in range(3):
            run(tower, batch((1, width)))
    memory = recording._memories[tower.vision_tower]
    assert len(memory.recordings) == 2 and len(memory.counts) == 5
    with pytest.raises(ValueError, match="height 12 is not a positive multiple"):
        run(tower, [torch.randn(3, 12, 8)])


def test_a_tape_gives_the_same_values_in_the_same_order():
    calls = []

    @kept(1)
    def outer(number):
        calls.append(number)
        return inner(number) + 1

    @kept(1)
    def inner(number):
        return torch.full((1,), float(number))

    def one_pass():
        return [outer(1), outer(2), taped(lambda: calls.append("made") or "made"), outer(1)]

    tape = Tape()
    with tape.making():
        first = one_pass()
    assert calls == [1, 2, "made", 1]  # one value at most is kept here: the tape holds them all
    with tape.playing():
        second = one_pass()
    assert len(calls) == 4 and all(a is b for a, b in zip(first, second, strict=True))
    with pytest.raises(ValueError, match="more than the 4"), tape.playing():
        one_pass()
        outer(3)
    with pytest.raises(ValueError, match="asked for 4 values, the second for 1"), tape.playing():
        outer(1)
    assert outer(5).item() == 6 and calls[-1] == 5
