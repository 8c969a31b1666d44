"""Nothing that is not plainly one of our modules is read around its forward: every kind of foreign module, in every
place, on every path, gives what the plain blocks give, also where the model ran before it came and after it went."""

import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from foreign_kinds import CALLABLE, LINEAR, MODEL, NEUTRAL, OUTSIDE, PLACES
from torch import nn

from llava_packing_tower.attention import dispatch
from llava_packing_tower.data.cached_metadata import CachedMetadata
from llava_packing_tower.data.patches import batch_images_to_packing_input
from llava_packing_tower.data.segments import read_grid
from llava_packing_tower.models import encoder
from llava_packing_tower.models.registry import family_for
from llava_packing_tower.models.runtime import cuda_graphs, execution
from llava_packing_tower.models.runtime.module_state import state_of
from llava_packing_tower.tools.bench.models import PRESETS

pytestmark = pytest.mark.newest
LAYERS = (0, 1, 3)


@pytest.fixture
def paths(monkeypatch):
    """All ways of running on a CPU: the operations of the fused blocks are plain torch there; what would be captured of
    the blocks is run as it is, and counted; what is captured from pixels on stays as it was captured."""
    taken = dict.fromkeys(("fused", "graphs", "pixels"), 0)
    sdpa = dispatch.backend_module("sdpa")
    backend = SimpleNamespace(VARLEN=True, unsupported_reason=lambda *_: None, attend=sdpa.attend)
    monkeypatch.setitem(dispatch.BACKENDS, "cpu_varlen", "cpu_varlen")
    monkeypatch.setitem(dispatch._LOADED, "cpu_varlen", backend)

    def spy(name, function):
        def call(*arguments, **options):
            taken[name] += 1
            return function(*arguments, **options)

        return call

    def run_blocks(module, run, hidden_states, segments, rotary, keep, backend, weights):
        return run(hidden_states, segments, rotary, keep, backend)

    def capture(function, inputs, device):
        return cuda_graphs.Captured(spy("pixels", lambda: None), inputs, function(), CachedMetadata())

    def encode_captured(images, encode, like):
        return capture(lambda: encode(images), [x.clone() for x in images], like.device)

    monkeypatch.setattr(encoder, "fused_block", spy("fused", encoder.fused_block))
    monkeypatch.setattr(encoder, "run_blocks", spy("graphs", run_blocks))
    monkeypatch.setattr(execution, "graphs_allowed", lambda device, tokens: paths.graphs)
    monkeypatch.setattr(cuda_graphs, "DEVICE_TYPE", "cpu")
    monkeypatch.setattr(cuda_graphs, "_capture_images", encode_captured)
    monkeypatch.setattr(cuda_graphs, "PIXELS", replace(cuda_graphs.PIXELS, capture_at=1))
    monkeypatch.setitem(cuda_graphs._memories, cuda_graphs.PIXELS, weakref.WeakKeyDictionary())
    paths = SimpleNamespace(taken=taken, graphs=False)
    return paths


def make(family, **more):
    preset = PRESETS[family]
    torch.manual_seed(0)
    cls = family_for(preset.model_type)
    model = cls(cls.config_class(**{**preset.tiny, "num_hidden_layers": 3, **more})).double().eval()
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, mean=float("norm" in name and name.endswith("weight")), std=0.2)
    model.requires_grad_(False).set_attention_backend("cpu_varlen")
    patch = model.config.patch_size
    images = [torch.randn(3, h * patch, w * patch, dtype=torch.float64) for h, w in ((4, 3), (1, 1), (2, 5))]

    def encode(images):
        rows, grid = batch_images_to_packing_input(images, patch, model.patch_layout)
        return torch.cat(model(rows, grid, feature_layers=LAYERS), dim=-1), read_grid(grid)

    object.__setattr__(model, "_run", lambda: encode(images)[0])
    object.__setattr__(model, "_from_pixels", lambda: cuda_graphs.encode_images(model, images, LAYERS, encode)[0])
    return model


def by_path(model, paths):
    """Features of every path, and those of the plain blocks."""
    results = {}
    core = model.encoder
    for path in ("eager", "fused", "graphs", "training", "from pixels", "from pixels again"):
        core.fused, paths.graphs = path != "eager", path == "graphs"
        trained = core.layers[0].layer_norm2.weight.requires_grad_(path == "training")
        run = model._from_pixels if path.startswith("from pixels") else model._run
        results[path] = run().detach().clone()
        trained.requires_grad_(False)
    paths.graphs = False
    return results.pop("eager"), results


def check(model, paths, change, neutral=False, allowed=frozenset(), **tolerance):
    """The paths agree before ``change``, with it, and without it again; with it none but those that are allowed go
    around a forward."""
    before, results = by_path(model, paths)
    assert all(count > 0 for count in paths.taken.values()), paths.taken
    for path, got in results.items():
        torch.testing.assert_close(got, before, msg=path, **tolerance)
    undo = change(model)
    try:
        paths.taken.update(dict.fromkeys(paths.taken, 0))
        for _ in range(2):
            want, results = by_path(model, paths)
            assert neutral or not torch.allclose(want, before, rtol=1e-3, atol=1e-3), "a kind without effect"
            for path, got in results.items():
                torch.testing.assert_close(got, want, msg=path, **tolerance)
        around = {path for path, count in paths.taken.items() if count}
        assert around <= allowed, (around, state_of(model.encoder).snapshot().foreign)
    finally:
        undo()
    paths.taken.update(dict.fromkeys(paths.taken, 0))
    want, results = by_path(model, paths)
    for path, got in results.items():
        torch.testing.assert_close(got, want, msg=path, **tolerance)
    torch.testing.assert_close(want, before)
    assert all(paths.taken.values()), (paths.taken, state_of(model).snapshot()[1:])


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", LINEAR, ids=lambda kind: kind.__name__)
def test_a_foreign_layer_is_called(paths, kind, place):
    model = make("llava_vit")
    owner, _, name = place.partition(".")

    check(model, paths, lambda model: kind(getattr(model.encoder.layers[1], owner), name))


@pytest.mark.parametrize("name", MODEL)
def test_a_foreign_part_of_the_model_is_called(paths, name):
    allowed = {"fused", "graphs"} if name in OUTSIDE else {"pixels"} if name in CALLABLE else set()
    check(make("llava_vit"), paths, MODEL[name], name in NEUTRAL, allowed)


@pytest.mark.parametrize("kind", LINEAR, ids=lambda kind: kind.__name__)
def test_a_gate_is_called(paths, kind):
    """Gated MLPs, layer scales, biases on a part of q, k, v, prefix tokens."""
    model = make("dinov3", use_gated_mlp=True, hidden_act="silu")
    check(model, paths, lambda model: kind(model.encoder.layers[1].mlp, "gate"))


@pytest.mark.parametrize("family", ["siglip2", "aimv2", "dinov3"])
def test_adapters_of_all_families(paths, family):
    slack = {"rtol": 1e-4, "atol": 1e-4} if family == "aimv2" else {}  # its norms are computed in float32
    check(make(family), paths, MODEL["peft LoRA"], **slack)
