"""What keeps the encoder fast, as counts that need no GPU: host reads, copies, tensors."""

import random
from types import SimpleNamespace

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llava_packing_tower import HEVCViTPackingVisionTower
from llava_packing_tower.data.patches import batch_images_to_packing_input
from llava_packing_tower.models import encoder
from llava_packing_tower.models.layers import EncoderBlock
from llava_packing_tower.models.registry import family_for
from llava_packing_tower.models.runtime import execution
from llava_packing_tower.tools.bench.models import PRESETS

FAMILIES = tuple(PRESETS)


# ---------------------------------------------------------------- models and batches


def tiny(family, **more):
    preset = PRESETS[family]
    torch.manual_seed(0)
    cls = family_for(preset.model_type)
    return cls(cls.config_class(**{**preset.tiny, **more})).eval().requires_grad_(False)


def ragged(count, seed, patch=1, most=6):
    """Sizes of ``count`` images, up to ``most`` patches a side."""
    dice = random.Random(seed)
    return [(dice.randint(1, most) * patch, dice.randint(1, most) * patch) for _ in range(count)]


def packed(model, sizes, device="cpu"):
    images = [torch.randn(3, h * model.config.patch_size, w * model.config.patch_size) for h, w in sizes]
    kind = {"frames_per_patch": model.frames_per_patch, "device": device}
    return batch_images_to_packing_input(images, model.config.patch_size, model.patch_layout, **kind)


# ---------------------------------------------------------------- host reads and copies: the meta device has no values


@pytest.fixture
def no_autocast(monkeypatch):
    """torch knows no autocast on the meta device, and does not let anyone ask."""
    for module in (encoder, execution):
        monkeypatch.setattr(module, "compute_dtype", lambda hidden_states: hidden_states.dtype)
        monkeypatch.setattr(module, "is_autocast", lambda device: False)


def meta_tower(**sizes):
    """A tower whose weights are on the meta device: reading a value of a tensor there is an error."""
    config = {**PRESETS["llava_vit"].tiny, **sizes}
    model = tiny("llava_vit", **sizes)
    saved = {
        "weights": "checkpoint",
        "config": family_for("llava_vit_packing").config_class(**config).to_dict(),
        "image_processor": model.default_image_processor(model.config).to_dict(),
    }
    arguments = SimpleNamespace(mm_vision_select_layer=-2, mm_packing_config=saved)
    tower = HEVCViTPackingVisionTower("nowhere", arguments)
    tower.load_state_dict(model.state_dict(), strict=False)
    tower.vision_tower = model
    tower([torch.randn(3, 14, 14)])  # the one check that all weights have come reads values
    return tower.to("meta")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("grad", [False, True])
def test_no_value_is_read_from_the_device(no_autocast, family, grad):
    model = tiny(family).requires_grad_(grad).to("meta")
    for sizes in ([(4, 3), (1, 1), (2, 5)], [(3, 3)] * 4):
        rows, grid = packed(model, sizes)
        out = model(rows.to("meta"), grid, feature_layers=(model.num_layers,))[0]
        assert out.is_meta and out.shape == (len(rows), model.config.hidden_size)
        if grad:
            out.sum().backward()


def test_no_value_is_read_by_the_tower(no_autocast):
    tower = meta_tower()
    patch = tower.config.patch_size
    images = [torch.randn(3, h * patch, w * patch) for h, w in ((4, 3), (1, 1), (2, 5))]
    assert [f.shape[0] for f in tower(images)] == [12, 1, 10]
    assert tower(torch.zeros(2, 3, 28, 42, device="meta")).shape == (2, 6, tower.hidden_size)


@pytest.mark.parametrize("read", [torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.cpu, torch.nonzero, bool])
def test_the_meta_device_refuses_every_read(no_autocast, monkeypatch, read):
    """The guard itself: a value read inside of a block is an error there."""
    model = tiny("llava_vit").to("meta")
    rows, grid = packed(model, [(2, 2)])
    rows = rows.to("meta")
    model(rows, grid)
    forward = EncoderBlock.forward
    monkeypatch.setattr(EncoderBlock, "forward", lambda self, x, *a: (read(x.sum()), forward(self, x, *a))[1])
    with pytest.raises((RuntimeError, NotImplementedError), match=r"(?i)meta"):
        model(rows, grid)


def test_host_reads_do_not_grow_with_images_or_layers(monkeypatch):
    """On the host itself: only the grid, which lies there by contract, is turned into Python numbers."""
    reads = []

    def spied(name):
        real = getattr(torch.Tensor, name)

        def spy(tensor, *arguments, **options):
            reads.append((name, tuple(tensor.shape)))
            return real(tensor, *arguments, **options)

        return spy

    for name in ("item", "tolist", "nonzero", "cpu", "numpy", "__bool__", "__int__", "__float__"):
        monkeypatch.setattr(torch.Tensor, name, spied(name))
    counts = []
    for layers, images in ((2, 3), (6, 3), (2, 40)):
        model = tiny("llava_vit", num_hidden_layers=layers)
        rows, grid = packed(model, ragged(images, seed=layers))
        reads.clear()
        with torch.no_grad():
            model(rows, grid, feature_layers=(layers - 1,))
        assert {read for read in reads} == {("tolist", (images, 3))}, reads
        counts.append(len(reads))
    assert counts == [1, 1, 1]


class Crossings(TorchDispatchMode):
    """Elements of every copy from the host to the (meta) device."""

    def __init__(self):
        super().__init__()
        self.elements = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        inputs = [x for x in tree_leaves((args, kwargs or {})) if isinstance(x, torch.Tensor)]
        outputs = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        if any(x.device.type == "cpu" for x in inputs) and any(x.is_meta for x in outputs):
            self.elements += [x.numel() for x in outputs if x.is_meta]
        return out


def test_pixels_cross_to_the_device_once(no_autocast):
    tower = meta_tower()
    patch = tower.config.patch_size
    tower([torch.randn(3, 7 * patch, 11 * patch)])  # frequencies are kept
    counts = []
    for seed, count in ((1, 3), (2, 30)):
        images = [torch.randn(3, h * patch, w * patch) for h, w in ragged(count, seed)]
        pixels = sum(image.numel() for image in images)
        with Crossings() as crossings:
            tower(images)
        assert [n for n in crossings.elements if n >= pixels] == [pixels]
        counts.append(len(crossings.elements))
    assert counts == [3, 3]  # rows, segment borders, what the positions are made from


# ---------------------------------------------------------------- memory


class Alive(TorchDispatchMode):
    """How many activations (storages of at least ``size`` elements) made so far are alive; views of the weights are
    none."""

    def __init__(self, size, weights):
        super().__init__()
        self.size, self.storages = size, {}
        self.weights = {StorageWeakRef(weight.untyped_storage()).cdata for weight in weights}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.numel() >= self.size:
                reference = StorageWeakRef(x.untyped_storage())
                if reference.cdata not in self.weights:
                    self.storages[reference.cdata] = reference
        return out

    def count(self):
        self.storages = {key: ref for key, ref in self.storages.items() if not ref.expired()}
        return len(self.storages)


def most_alive(monkeypatch, layers, grad=False, checkpointing=False, **options):
    """The most activations that are alive as any block begins, the forward's own inputs not counted."""
    model = tiny("llava_vit", num_hidden_layers=layers).requires_grad_(grad).train(grad)
    if checkpointing:
        model.gradient_checkpointing_enable()
    rows, grid = packed(model, [(6, 5), (2, 2), (3, 4)])
    forward, counts = EncoderBlock.forward, []
    size = len(rows) * model.config.hidden_size
    with monkeypatch.context() as patch, Alive(size, model.parameters()) as alive:
        patch.setattr(EncoderBlock, "forward", lambda self, *a: (counts.append(alive.count()), forward(self, *a))[1])
        with torch.set_grad_enabled(grad):
            out = model(rows, grid, **options)
        counts.append(alive.count())
    del out
    return max(counts)


def test_live_tensors_do_not_grow_with_depth(monkeypatch):
    """Only the selected hidden state is kept, however deep the encoder is; all of them only when they are asked for."""
    shallow = most_alive(monkeypatch, 4, feature_layers=(3,))
    deep = most_alive(monkeypatch, 12, feature_layers=(11,))
    everything = most_alive(monkeypatch, 12, output_hidden_states=True)
    assert deep == shallow <= 6
    assert everything >= deep + 10


def test_checkpointing_keeps_one_or_two_tensors_per_layer(monkeypatch):
    def per_layer(**options):
        deep, shallow = (most_alive(monkeypatch, n, grad=True, feature_layers=(n,), **options) for n in (10, 4))
        return (deep - shallow) / 6

    assert per_layer(checkpointing=True) <= 2 < per_layer()


def test_blocks_above_the_selected_layer_do_not_run(no_autocast, monkeypatch):
    tower, calls = meta_tower(num_hidden_layers=5), []
    forward = EncoderBlock.forward
    monkeypatch.setattr(EncoderBlock, "forward", lambda self, *a: (calls.append(self), forward(self, *a))[1])
    tower(torch.zeros(1, 3, 28, 28, device="meta"))
    assert calls == list(tower.vision_tower.encoder.layers[:4])
