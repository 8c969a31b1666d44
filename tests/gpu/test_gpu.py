"""What only a GPU can show. Run on a machine with one: ``python -m pytest tests/gpu``."""

from types import SimpleNamespace

import pytest
import torch

from llava_packing_tower import HEVCViTPackingVisionTower, LlavaViTPackingConfig, LlavaViTPackingModel
from llava_packing_tower.attention import BACKENDS, backend_module, varlen_attention
from llava_packing_tower.packing import batch_images_to_packing_input, make_segments

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
LENGTHS = (300, 17, 1, 64, 513, 128, 300)


def usable(name, dtype, dim):
    return backend_module(name).why_not(torch.device("cuda"), dtype, dim)


@pytest.mark.parametrize("dim", [64, 72, 96, 128])
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "eager"])
def test_backends_by_the_twice_the_error_rule(backend, dim):
    """Forward and gradients in bf16 against float32, error at most twice the bf16 reference's own."""
    if reason := usable(backend, torch.bfloat16, dim):
        pytest.skip(f"{backend}: {reason}")
    segments = make_segments(LENGTHS, "cuda")
    q, k, v, weight = (torch.randn(sum(LENGTHS), 4, dim, device="cuda").bfloat16() for _ in range(4))

    def run(name, dtype):
        inputs = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        out = varlen_attention(*inputs, segments.cu_seqlens, segments.max_seqlen, backend=name)
        return [out, *torch.autograd.grad((out * weight.to(dtype)).sum(), inputs)]

    exact, low = run("eager", torch.float32), run_low(q, k, v, weight)
    for what, got, reference, want in zip(("out", "dq", "dk", "dv"), run(backend, torch.bfloat16), low, exact):
        error = (got.float() - want).abs().max().item()
        own = (reference.float() - want).abs().max().item()
        assert error <= 2 * own, (backend, dim, what, error, own)


def run_low(q, k, v, weight):
    """Plain bf16 attention, every operation rounded to bf16: the reference's own low-precision error."""
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    parts = [x.split(list(LENGTHS)) for x in inputs]
    outputs = []
    for a, b, c in zip(*parts):
        scores = torch.einsum("ihd,jhd->hij", a, b) * q.shape[-1] ** -0.5
        outputs.append(torch.einsum("hij,jhd->ihd", scores.softmax(-1), c))
    out = torch.cat(outputs)
    return [out, *torch.autograd.grad((out * weight).sum(), inputs)]


def tower(tmp_path, **config):
    sizes = dict(hidden_size=256, intermediate_size=512, num_hidden_layers=6, num_attention_heads=4, patch_size=14)
    model = LlavaViTPackingModel(LlavaViTPackingConfig(**{**sizes, "image_size": 448, **config}))
    model.save_pretrained(tmp_path / "packing")
    args = SimpleNamespace(mm_vision_select_layer=-2)
    return HEVCViTPackingVisionTower(str(tmp_path / "packing"), args).to("cuda", torch.bfloat16)


def photos(device="cuda", dtype=torch.bfloat16):
    sizes = ((448, 448), (224, 616), (14, 14), (700, 322))
    return [torch.randn(3, h, w, device=device, dtype=dtype) for h, w in sizes]


@pytest.mark.parametrize("backend", ["flash_attention_2", "torch_varlen", "auto"])
@pytest.mark.parametrize("compile_blocks", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_no_synchronisation_inside_the_forward(tmp_path, backend, compile_blocks, grad):
    if backend != "auto" and (reason := usable(backend, torch.bfloat16, 64)):
        pytest.skip(f"{backend}: {reason}")
    vision = tower(tmp_path)
    vision.vision_tower.set_attention_backend(backend)
    vision.vision_tower.encoder.compile_blocks = compile_blocks
    vision.requires_grad_(grad)
    images = photos()
    vision(images)  # kernels, caches, compilation
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        features = vision(images)
        if grad:
            sum(f.float().sum() for f in features).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [f.shape[0] for f in features] == [1024, 16 * 44, 1, 50 * 23]
    assert all(f.dtype == torch.bfloat16 and f.isfinite().all() for f in features)


@pytest.mark.parametrize("compile_blocks", [False, True])
@pytest.mark.parametrize("backend", ["flash_attention_2", "torch_varlen", "sdpa"])
def test_tower_error_at_most_twice_the_references(tmp_path, backend, compile_blocks):
    if reason := usable(backend, torch.bfloat16, 64):
        pytest.skip(f"{backend}: {reason}")
    vision = tower(tmp_path)
    model = vision.vision_tower
    images = photos()

    def run(name, dtype, compiled=False):
        model.to(dtype).set_attention_backend(name)
        model.encoder.compile_blocks = compiled
        return torch.cat([f.float() for f in vision([x.to(dtype) for x in images])])

    state = {k: v.clone() for k, v in model.state_dict().items()}
    exact = run("eager", torch.float32)
    low = run("eager", torch.bfloat16)
    model.load_state_dict(state)
    got = run(backend, torch.bfloat16, compile_blocks)
    assert (got - exact).abs().max() <= 2 * (low - exact).abs().max()


def test_host_images_cross_in_one_copy(tmp_path):
    vision = tower(tmp_path)
    images = photos("cpu", torch.float32)
    rows, grid = batch_images_to_packing_input(images, 14, device="cuda", dtype=torch.bfloat16)
    again, _ = batch_images_to_packing_input([x.cuda() for x in images], 14, dtype=torch.bfloat16)
    assert rows.is_cuda and not grid.is_cuda and torch.equal(rows, again)
    for a, b in zip(vision(images), vision([x.cuda() for x in images])):
        assert torch.equal(a, b)


def test_auto_takes_a_varlen_kernel():
    from llava_packing_tower.attention import resolve_backend

    chosen = resolve_backend("auto", "cuda", torch.bfloat16, 64)
    assert chosen != "sdpa" or usable("torch_varlen", torch.bfloat16, 64)
    assert resolve_backend("auto", "cuda", torch.float32, 64) == "sdpa"
