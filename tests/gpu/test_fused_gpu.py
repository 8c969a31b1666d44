"""The Triton kernels of the fused blocks on a GPU: against the plain torch of ``kernels.reference``, and whole towers
against float32."""

import pytest
import torch
from conftest import unusable
from families import BLOCK_VARIANTS

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

from llava_packing_tower.data.patches import batch_images_to_packing_input
from llava_packing_tower.kernels import reference, triton
from llava_packing_tower.models.registry import family_for
from llava_packing_tower.tools.bench.models import PRESETS

SHAPES = [(1, 64), (37, 48), (1030, 1152), (5000, 256)]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def noise(*shape, dtype=torch.bfloat16):
    return (torch.randn(shape, device="cuda") + 0.3).to(dtype)


def check(got, want, tolerance=0.02):
    if want is None:
        assert got is None
        return
    assert got.dtype == want.dtype and got.shape == want.shape
    assert (got.float() - want.float()).abs().max() <= tolerance * want.float().abs().max()


def filled(x, columns):
    """Partial sums of both sides; NaN where nothing is written."""
    return [module.partials(columns, x).fill_(torch.nan) for module in (triton, reference)]


def check_sums(ours, theirs, start, stop):
    got, want = (m.finish(p, torch.float32) for m, p in ((triton, ours), (reference, theirs)))
    check(got[start:stop], want[start:stop], 1e-3)
    assert got[:start].isnan().all() and got[stop:].isnan().all()  # nobody else's columns


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_norms(shape, rms, dtype):
    width = shape[1]
    x, pending, grad, residual = (noise(*shape, dtype=dtype) for _ in range(4))
    weight, shift = noise(width, dtype=dtype), noise(width, dtype=dtype)
    bias = None if rms else noise(width, dtype=dtype)
    for more, also in ((pending, None), (pending, shift), (None, None)):
        sides = [m.add_norm(x, more, weight, bias, 1e-6, rms, pending_bias=also) for m in (triton, reference)]
        for got, want in zip(*sides):
            check(got, want)
    row = noise(width, dtype=torch.float32)
    for added, following in ((row, shift), (None, shift), (row, None), (None, None)):
        sides = [m.row_norm(x, added, weight, bias, 1e-6, rms, following) for m in (triton, reference)]
        for got, want in zip(*sides):
            check(got, want)
    total, _, stats = reference.add_norm(x, pending, weight, bias, 1e-6, rms)
    for passing, summed in ((residual, False), (None, False), (residual, True)):
        sums = filled(x, 4 * width + 7)
        sides = [
            m.norm_backward(total, stats, grad.clone(), passing, weight, bias, rms, s, 4, summed)
            for m, s in zip((triton, reference), sums)
        ]
        for got, want in zip(*sides):
            check(got, want)
        check_sums(*sums, 4, 4 + (3 + summed) * width)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("name", list(reference.ACTIVATIONS))
@pytest.mark.parametrize("shape", SHAPES)
def test_activations(shape, name, gated):
    width = shape[1]
    inner, grad = noise(*shape) * 2, noise(*shape)
    factor = noise(*shape) if gated else None
    for biased in (False, True):
        biases = [noise(width) if biased and x is not None else None for x in (inner, factor)]
        inputs = (inner, biases[0], factor, biases[1])
        check(triton.act(name, *inputs), reference.act(name, *inputs), 0.005)
        sums = filled(inner, 2 * width + 8)
        sides = [m.act_backward(name, *inputs, grad.clone(), s, 4) for m, s in zip((triton, reference), sums)]
        for got, want in zip(*sides):
            check(got, want, 0.005)
        check_sums(*sums, 4, 4 + width * (1 + gated))
    sums = filled(inner, width + 4)
    for module, partials in zip((triton, reference), sums):
        module.column_sums(grad, partials, 4)
    check_sums(*sums, 4, 4 + width)


def test_more_tokens_than_a_grid_is_high():
    """65 535 is the limit of a grid's second axis; four tokens go into one program."""
    inner, factor = noise(300_000, 64), noise(300_000, 64)
    check(triton.act("silu", inner, None, factor), reference.act("silu", inner, None, factor), 0.005)


@pytest.mark.parametrize("kind", ["interleaved", "half", None])
@pytest.mark.parametrize("shape", [(1, 2, 16), (1033, 3, 96), (5000, 16, 64), (700, 16, 72)])
def test_rotation(shape, kind):
    tokens, heads, head_dim = shape
    width = 3 * heads * head_dim
    cos, sin = torch.randn(2, tokens, 1, head_dim, device="cuda")  # no two alike: a swapped partner would show
    if kind is not None:
        ours = noise(tokens, 3, heads, head_dim)
        before, theirs = ours.clone(), ours.clone()
        triton.rotate_(ours, cos, sin, kind)
        reference.rotate_(theirs, cos, sin, kind)
        check(ours, theirs)
        assert torch.equal(ours[:, 2], before[:, 2])
    grads = (noise(*shape), noise(*shape), noise(tokens, 2, heads, head_dim)[:, 1])  # one with other strides
    sums = filled(grads[0], width + 4)
    rotary = None if kind is None else (cos, sin)
    check(*(m.qkv_backward(grads, rotary, kind, s, 4) for m, s in zip((triton, reference), sums)))
    check_sums(*sums, 4, 4 + width)


def tiny(family, **more):
    cls = family_for(PRESETS[family].model_type)
    sizes = {**PRESETS[family].tiny, "hidden_size": 256, "num_attention_heads": 4, **more}
    model = cls(cls.config_class(**sizes)).cuda()
    for name, parameter in model.named_parameters():
        is_scale = "norm" in name and name.endswith("weight")
        torch.nn.init.normal_(parameter, mean=float(is_scale), std=0.3 if is_scale or name.endswith("bias") else 0.06)
    return model


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "backend, dtype",
    [(name, torch.bfloat16) for name in ("auto", "flash_attention_4", "flash_attention_2", "torch_varlen")]
    + [(name, torch.float16) for name in ("auto", "flash_attention_2")],
    ids=str,
)
@pytest.mark.parametrize("equal", [False, True])
@pytest.mark.parametrize("family, more", BLOCK_VARIANTS)
def test_features_and_gradients_by_the_twice_the_error_rule(family, more, equal, backend, dtype, checkpointing):
    if reason := unusable(backend, dtype, 64, needs_grad=True):
        pytest.skip(reason)
    model = tiny(family, **more).train()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    patch = model.config.patch_size
    sizes = [(16, 17)] * 3 if equal else [(24, 13), (1, 1), (9, 20)]
    images = [torch.randn(3, h * patch, w * patch, device="cuda") for h, w in sizes]
    rows, grid = batch_images_to_packing_input(
        images, patch, model.patch_layout, frames_per_patch=model.frames_per_patch
    )
    last = model.num_layers
    weight = torch.randn(len(rows), 256, device="cuda")

    def run(dtype, fused, backend):
        model.to(dtype).load_state_dict(state)
        model.set_attention_backend(backend)
        model.encoder.fused = fused
        model.encoder.gradient_checkpointing = checkpointing
        model.zero_grad(set_to_none=True)
        first, out = model(rows.to(dtype), grid, feature_layers=(1, last))
        ((first + out).float() * weight).sum().backward()
        with torch.no_grad():
            inferred = model(rows.to(dtype), grid, feature_layers=(last,))[0]
        grads = {n: p.grad.float().clone() for n, p in model.named_parameters() if p.grad is not None}
        return {"training": out.detach().float(), "inference": inferred.float(), **grads}

    exact, low = run(torch.float32, False, "eager"), run(dtype, False, "eager")
    got = run(dtype, True, backend)
    assert got.keys() == exact.keys()
    for name, want in exact.items():
        error, allowed = (got[name] - want).norm(), 2 * (low[name] - want).norm()
        assert error <= allowed + 1e-6 * want.norm(), (name, error / want.norm(), allowed / want.norm())


def test_fused_is_the_default_in_half_precision():
    model = tiny("llava_vit").bfloat16()
    images = [torch.randn(3, 28, 42, device="cuda").bfloat16()]
    rows, grid = batch_images_to_packing_input(images, model.config.patch_size)
    seen = []
    for fused in (None, False):
        model.encoder.fused = fused
        model(rows, grid)
        seen.append(model.encoder.last_plan.path)
    assert seen == ["fused", "eager"]
    model.float()
    model.encoder.fused = None
    model(rows.float(), grid)
    assert model.encoder.last_plan.path == "eager"  # float32 has no varlen kernel
    with torch.autocast("cuda", torch.bfloat16):
        model(rows.float(), grid)
    assert model.encoder.last_plan.path == "fused"


def test_kernels_launched_directly_give_what_triton_gives(monkeypatch):
    """The compiled kernels of the installed Triton take what ``launcher.launch`` passes them."""
    launcher = pytest.importorskip("llava_packing_tower.kernels.triton.launcher")
    norm = pytest.importorskip("llava_packing_tower.kernels.triton.norm")
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(37, 96, generator=generator, device="cuda").to(torch.bfloat16)
    weight = torch.rand(96, generator=generator, device="cuda").to(torch.bfloat16)
    assert launcher._DIRECT, "Triton is beyond the versions in launcher.py: try it there, and raise them"
    _, *direct = (norm.add_norm(x, None, weight, None, 1e-6, True) for _ in range(3))  # the first one builds
    assert launcher._compiled
    monkeypatch.setattr(launcher, "_DIRECT", False)
    plain = norm.add_norm(x, None, weight, None, 1e-6, True)
    for found in direct:
        assert all(torch.equal(a, b) for a, b in zip(found, plain) if a is not None)
