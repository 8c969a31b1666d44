"""Fused blocks on a CPU, where their operations are plain torch: values, gradients, and when they are taken.

The kernels themselves are compared with these operations in ``tests/gpu/test_fused_gpu.py``.
"""

import subprocess
from types import SimpleNamespace

import pytest
import torch
from families import BLOCK_VARIANTS
from low_precision import cpu_kernel
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from llava_packing_tower.attention import dispatch
from llava_packing_tower.data.patches import batch_images_to_packing_input
from llava_packing_tower.kernels import fused_block, reference
from llava_packing_tower.models.registry import family_for
from llava_packing_tower.models.runtime import fused
from llava_packing_tower.tools.bench.models import PRESETS

SIZES = [(4, 3), (1, 1), (2, 5)]


@pytest.fixture(params=["three nodes", "one node"])
def varlen(monkeypatch, request):
    return cpu_kernel(monkeypatch, one_node=request.param == "one node")


def tiny(family, dtype=torch.float64, **more):
    cls = family_for(PRESETS[family].model_type)
    torch.manual_seed(0)
    model = cls(cls.config_class(**{**PRESETS[family].tiny, **more})).to(dtype).train()
    for name, parameter in model.named_parameters():
        mean = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        nn.init.normal_(parameter, mean=mean, std=0.2)
    return model


def batch(model):
    patch = model.config.patch_size
    images = [torch.randn(3, h * patch, w * patch, dtype=model.dtype) for h, w in SIZES]
    return batch_images_to_packing_input(images, patch, model.patch_layout, frames_per_patch=model.frames_per_patch)


@pytest.fixture
def how(monkeypatch):
    """How each call of the encoder ran its blocks."""
    from llava_packing_tower.models.encoder import PackedEncoder

    seen, run = [], PackedEncoder.run
    monkeypatch.setattr(
        PackedEncoder, "run", lambda self, *a, path, **k: (seen.append(path), run(self, *a, path=path, **k))[1]
    )
    return seen


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family, more", BLOCK_VARIANTS)
def test_values_and_gradients_are_those_of_the_blocks(varlen, how, family, more, checkpointing):
    """float64, two hidden states at once, every parameter; RMSNorm rounds to float32 in the blocks themselves."""
    model = tiny(family, **more)
    model.set_attention_backend(varlen)
    model.encoder.gradient_checkpointing = checkpointing
    rows, grid = batch(model)
    layers = (1, model.num_layers)
    upstream = torch.randn(len(layers), len(rows), model.config.hidden_size, dtype=torch.float64)
    results = []
    for choice in (False, True):
        model.encoder.fused = choice
        model.zero_grad()
        states = model(rows, grid, feature_layers=layers)
        torch.autograd.backward(states, list(upstream))
        with torch.no_grad():
            inferred = model(rows, grid, feature_layers=layers)
        results.append([*states, *inferred, *(p.grad for p in model.parameters())])
    assert how == ["eager", "eager", "fused", "fused"]
    rms = model.encoder.config.norm == "rms_norm"
    for got, want in zip(results[1], results[0], strict=True):
        if want is None:
            assert got is None
        else:
            torch.testing.assert_close(got, want, rtol=1e-4 if rms else 1e-9, atol=1e-4 if rms else 1e-9)


@pytest.mark.parametrize("layers, own", [((3,), 0), ((1, 3), 1), ((0, 2, 3), 1)])
def test_a_bias_takes_the_sums_of_the_gradient_that_passes_by(varlen, monkeypatch, layers, own):
    """The two gradients of a block are one tensor, unless its output was returned as well: then sums are made."""
    model = tiny("llava_vit", num_hidden_layers=3)
    model.set_attention_backend(varlen)
    model.encoder.fused = True
    calls, sums = [], reference.column_sums
    monkeypatch.setattr(reference, "column_sums", lambda *args: (calls.append(args), sums(*args)))
    rows, grid = batch(model)
    sum(x.sum() for x in model(rows, grid, feature_layers=layers)).backward()
    assert len(calls) == own


@pytest.mark.parametrize("reentrant", [False, True])
def test_both_kinds_of_checkpoints(varlen, reentrant):
    """A reentrant checkpoint runs the blocks first without gradients, when they must not write into their input."""
    model = tiny("llava_vit", num_hidden_layers=3)
    model.set_attention_backend(varlen)
    rows, grid = batch(model)
    results = []
    for choice in (False, True):
        model.encoder.fused = choice
        if choice:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.zero_grad()
        states = model(rows, grid, feature_layers=(1, 3))
        sum(x.square().sum() for x in states).backward()
        results.append([*states, *(p.grad for p in model.encoder.parameters())])
    for got, want in zip(*reversed(results), strict=True):
        torch.testing.assert_close(got, want)


def test_a_hook_may_keep_what_a_block_returned(varlen):
    model = tiny("llava_vit", num_hidden_layers=3).eval()
    model.set_attention_backend(varlen)
    kept = []
    for layer in model.encoder.layers:
        layer.register_forward_hook(lambda module, inputs, out: kept.append(out))
    rows, grid = batch(model)
    with torch.no_grad():
        for choice in (False, True):
            model.encoder.fused = choice
            model(rows, grid)
    for (total, pending), (got, row) in zip(kept[:3], kept[3:], strict=True):
        torch.testing.assert_close(got + row, total + pending)


@pytest.mark.parametrize("family", ["llava_vit", "aimv2"])  # with biases and without
def test_inference_leaves_its_input_and_the_kept_states_alone(varlen, family):
    """Blocks sum onto one tensor: what goes in and what was kept must not be that tensor."""
    model = tiny(family, num_hidden_layers=3).eval()
    model.set_attention_backend(varlen)
    rows, grid = batch(model)
    with torch.no_grad():
        expected = model(rows, grid, feature_layers=(0, 1, 2, 3))
        model.encoder.fused = True
        for got, want in zip(model(rows, grid, feature_layers=(0, 1, 2, 3)), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("trained", ["mlp.fc1.weight", "layer_norm1.bias", "qkv.weight", "fc2.bias", "proj.weight"])
def test_only_what_is_trained_gets_a_gradient(varlen, trained):
    model = tiny("llava_vit")
    model.set_attention_backend(varlen)
    rows, grid = batch(model)
    grads = []
    for choice in (False, True):
        model.encoder.fused = choice
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith("encoder") and name.endswith(trained))
            parameter.grad = None
        model(rows, grid, feature_layers=(model.num_layers,))[0].square().sum().backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) == model.num_layers
    for name, want in grads[0].items():
        torch.testing.assert_close(grads[1][name], want)


def test_gradients_of_several_batches_add_up(varlen):
    """The bias gradients are parts of one tensor, and column sums travel with a gradient: neither may leak."""
    model = tiny("llava_vit")
    model.set_attention_backend(varlen)
    batches = [batch(model) for _ in range(2)]
    grads = []
    for choice in (False, True):
        model.encoder.fused = choice
        model.zero_grad()
        for rows, grid in batches:
            model(rows, grid, feature_layers=(model.num_layers,))[0].square().sum().backward()
        grads.append([p.grad.clone() for p in model.encoder.parameters()])
    for got, want in zip(*reversed(grads)):
        torch.testing.assert_close(got, want)


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket._qualified_op_name)
        return function(*args, **(kwargs or {}))


def stand_ins():
    """The operations as one call each, which is what they are on a GPU."""
    empty = torch.empty_like

    return SimpleNamespace(
        add_norm=lambda x, pending, *_, **__: (x if pending is None else empty(x), empty(x), x.new_empty(2, len(x))),
        row_norm=lambda x, *_: (empty(x), x.new_empty(x.shape[1])),
        norm_backward=lambda total, *_: (empty(total), empty(total)),
        act=lambda name, inner, *_: empty(inner),
        act_backward=lambda name, inner, inner_bias, factor, *_: (empty(inner), factor, empty(inner)),
        rotate_=lambda *_: None,
        qkv_backward=lambda grads, *_: empty(grads[0]).repeat(1, 3, 1).flatten(1),
        column_sums=lambda *_: None,
        partials=reference.partials,
        finish=lambda partials, dtype: partials.new_empty(partials.shape[1], dtype=dtype),
    )


MATMULS = {"aten::mm", "aten::addmm", "aten::addmm_"}


@pytest.mark.parametrize("grad", [False, True])
def test_products_and_calls_per_block(varlen, monkeypatch, grad):
    """What the host does per block, as counts: four products forward, eight more backward, and nothing that grows."""
    monkeypatch.setattr(fused_block, "operations", lambda x: stand_ins())
    monkeypatch.setattr(fused, "operations", lambda x: stand_ins())
    plain = SimpleNamespace(
        VARLEN=True, unsupported_reason=lambda *_: None, attend=lambda q, k, v, segments, scale: q + k + v
    )
    monkeypatch.setitem(dispatch._LOADED, varlen, plain)
    counts = []
    for layers in (2, 6):
        model = tiny("llava_vit", torch.float32, num_hidden_layers=layers).requires_grad_(grad)
        model.set_attention_backend(varlen)
        model.encoder.fused = True
        rows, grid = batch(model)
        with Calls() as calls:
            out = model(rows, grid, feature_layers=(layers,))[0]
            if grad:
                out.sum().backward()
        counts.append((sum(name in MATMULS for name in calls.names), len(calls.names)))
    (products, calls), (more_products, more_calls) = counts
    assert more_products - products == 4 * (12 if grad else 4)
    assert (more_calls - calls) / 4 <= (100 if grad else 30), counts


# ---------------------------------------------------------------- when


def test_not_without_a_gpu(varlen, how):
    model = tiny("llava_vit", torch.bfloat16)
    model.set_attention_backend(varlen)
    model(*batch(model))
    assert how == ["eager"]
    model.encoder.fused = True
    model(*batch(model))
    assert how == ["eager", "fused"]


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family, more", BLOCK_VARIANTS)
def test_autocast_has_blocks_cast_their_weights(varlen, how, family, more, weights):
    """As near to the float32 result as eager blocks in bfloat16 are, twice their error at most; gradients likewise, in
    the dtype of the weights."""
    model = tiny(family, torch.float32, **more).to(weights).float()
    model.set_attention_backend(varlen)
    rows, grid = batch(model)
    upstream = torch.randn(len(rows), model.config.hidden_size)
    results = {}
    for name in ("exact", "low", "autocast"):
        model.to({"exact": torch.float32, "low": torch.bfloat16}.get(name, weights))
        model.encoder.fused = name == "autocast"
        model.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=name == "autocast"):
            out = model(rows, grid, feature_layers=(model.num_layers,))[0]
            with torch.no_grad():
                inferred = model(rows, grid, feature_layers=(model.num_layers,))[0]
        out.backward(upstream.to(out.dtype))
        grads = {n: p.grad.float().clone() for n, p in model.encoder.named_parameters()}
        assert all(p.grad.dtype == p.dtype for p in model.encoder.parameters())
        results[name] = {"training": out.detach().float(), "inference": inferred.float(), **grads}
    assert how == ["eager"] * 4 + ["fused"] * 2
    for name, want in results["exact"].items():
        error, allowed = ((results[which][name] - want).norm() for which in ("autocast", "low"))
        assert error <= 2 * allowed + 1e-6 * want.norm(), (name, error / want.norm(), allowed / want.norm())


def test_hooks_on_a_block_are_run_and_hooks_inside_of_one_need_the_block_itself(varlen, how):
    model, seen = tiny("llava_vit"), []
    model.set_attention_backend(varlen)
    model.encoder.fused = True
    rows, grid = batch(model)
    expected = model(rows, grid)
    outer = model.encoder.layers[1].register_forward_hook(lambda *_: seen.append("block"))
    torch.testing.assert_close(model(rows, grid), expected)
    assert how == ["fused"] * 2 and seen == ["block"]
    inner = model.encoder.layers[0].mlp.fc2.register_forward_hook(lambda *_: seen.append("fc2"))
    torch.testing.assert_close(model(rows, grid), expected)
    assert how[2:] == ["eager"] and seen[1:] == ["fc2", "block"]
    inner.remove()
    outer.remove()
    model(rows, grid)
    assert how[3:] == ["fused"]


def test_other_layers_than_ours_are_left_alone(varlen, how):
    class Adapted(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = tiny("llava_vit")
    model.set_attention_backend(varlen)
    model.encoder.fused = True
    rows, grid = batch(model)
    before = model(rows, grid).last_hidden_state
    fc2 = model.encoder.layers[0].mlp.fc2
    adapted = Adapted(fc2.in_features, fc2.out_features).double()
    adapted.load_state_dict(fc2.state_dict())
    model.encoder.layers[0].mlp.fc2 = adapted
    assert not torch.allclose(model(rows, grid).last_hidden_state, before)
    assert how == ["fused", "eager"]


def test_a_bad_switch_is_named(monkeypatch):
    monkeypatch.setenv("LLAVA_PACKING_FUSED", "yes")
    model = tiny("llava_vit")
    with pytest.raises(ValueError, match="LLAVA_PACKING_FUSED must be 0 or 1, got 'yes'"):
        model(*batch(model))


def test_a_kernel_that_cannot_be_built_is_a_warning_and_other_blocks(monkeypatch, caplog):
    def no_compiler(*_):
        raise subprocess.CalledProcessError(1, "gcc")

    broken = SimpleNamespace(add_norm=no_compiler, ERRORS=(subprocess.SubprocessError,))
    for kernels, reason in ((broken, "CalledProcessError"), (None, "Triton cannot be imported")):
        monkeypatch.setattr(fused, "kernels", kernels)
        fused.kernels_work.cache_clear()
        caplog.clear()
        for _ in range(2):
            assert not fused.kernels_work(torch.device("cpu"))
        assert [reason in record.message for record in caplog.records] == [True]
    fused.kernels_work.cache_clear()
