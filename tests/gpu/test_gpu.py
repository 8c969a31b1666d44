"""What only a GPU can show. Run on a machine with one: ``python -m pytest tests/gpu``."""

from types import SimpleNamespace

import pytest
import torch
from conftest import unusable

from llava_packing_tower import HEVCViTPackingVisionTower, LlavaViTPackingConfig, LlavaViTPackingModel
from llava_packing_tower.attention.dispatch import BACKENDS, backend_module, resolve_backend, varlen_attention
from llava_packing_tower.data.patches import batch_images_to_packing_input
from llava_packing_tower.data.segments import make_segments
from llava_packing_tower.models.runtime.cuda_graphs import BLOCKS, PIXELS, memory_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
LENGTHS = (300, 17, 1, 64, 513, 128, 300)


@pytest.mark.parametrize("dim", [64, 72, 80, 96, 128])
@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3"])
def test_no_build_is_called_wrong_in_bfloat16(name, dim):
    module, arguments = backend_module(name), (torch.device("cuda"), torch.bfloat16, dim)
    for needs_grad in (False, True):
        if module.unsupported_reason(*arguments, needs_grad) is None:
            assert resolve_backend(name, "cuda", *arguments[1:], needs_grad=needs_grad) == name


@pytest.mark.parametrize("dim", [64, 72, 80, 96, 128])
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "eager"])
def test_backends_by_the_twice_the_error_rule(backend, dim):
    """Forward and gradients in bf16 against float32, error at most twice the bf16 reference's own."""
    if reason := unusable(backend, torch.bfloat16, dim):
        pytest.skip(f"{backend}: {reason}")
    lengths = (256,) * 5 if backend == "cudnn" else LENGTHS
    needs_grad = backend_module(backend).unsupported_reason(torch.device("cuda"), torch.bfloat16, dim, True) is None
    segments = make_segments(lengths, "cuda")
    q, k, v, weight = (torch.randn(sum(lengths), 4, dim, device="cuda").bfloat16() for _ in range(4))

    def run(name, dtype):
        inputs = [x.detach().to(dtype).requires_grad_(needs_grad) for x in (q, k, v)]
        out = varlen_attention(*inputs, segments.cu_seqlens, segments.max_seqlen, backend=name)
        return [out, *(torch.autograd.grad((out * weight.to(dtype)).sum(), inputs) if needs_grad else ())]

    exact, low = run("eager", torch.float32), run_low(q, k, v, weight, lengths)
    for what, got, reference, want in zip(("out", "dq", "dk", "dv"), run(backend, torch.bfloat16), low, exact):
        error = (got.float() - want).abs().max().item()
        own = (reference.float() - want).abs().max().item()
        assert error <= 2 * own, (backend, dim, what, error, own)


def run_low(q, k, v, weight, lengths):
    """Plain bf16 attention, every operation rounded to bf16: the reference's own low-precision error."""
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    parts = [x.split(list(lengths)) for x in inputs]
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


@pytest.mark.parametrize("backend", ["flash_attention_4", "flash_attention_2", "torch_varlen", "auto"])
@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("grad", [False, True])
def test_no_synchronisation_inside_the_forward(tmp_path, backend, fused, grad):
    if backend != "auto" and (reason := unusable(backend, torch.bfloat16, 64)):
        pytest.skip(f"{backend}: {reason}")
    vision = tower(tmp_path)
    vision.vision_tower.set_attention_backend(backend)
    vision.vision_tower.encoder.fused = fused
    vision.requires_grad_(grad)
    images = photos()
    turned = [image.transpose(1, 2).contiguous() for image in images]  # other shapes, the same kind of batch

    def step(batch):
        features = vision(batch)
        if grad:
            sum(f.float().sum() for f in features).backward()
        return features

    for _ in range(PIXELS.capture_at):  # kernels, caches; then a graph of the blocks, and one from pixels on
        step(images)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(turned)
        features = step(images)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [f.shape[0] for f in features] == [1024, 16 * 44, 1, 50 * 23]
    assert all(f.dtype == torch.bfloat16 and f.isfinite().all() for f in features)


@pytest.mark.parametrize("low_dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name not in ("cudnn", "eager")] + ["auto"])
def test_tower_error_at_most_twice_the_references(tmp_path, backend, fused, low_dtype):
    if backend != "auto" and (reason := unusable(backend, low_dtype, 64)):
        pytest.skip(f"{backend}: {reason}")
    vision = tower(tmp_path)
    model = vision.vision_tower
    images = photos()

    def run(name, dtype, fused=False):
        model.to(dtype).set_attention_backend(name)
        model.encoder.fused = fused
        return torch.cat([f.float() for f in vision([x.to(dtype) for x in images])])

    state = {k: v.clone() for k, v in model.state_dict().items()}
    exact = run("eager", torch.float32)
    low = run("eager", low_dtype)
    model.load_state_dict(state)
    got = run(backend, low_dtype, fused)
    assert (got - exact).abs().max() <= 2 * (low - exact).abs().max()


def test_host_images_cross_in_one_copy(tmp_path):
    vision = tower(tmp_path)
    images = photos("cpu", torch.float32)
    rows, grid = batch_images_to_packing_input(images, 14, device="cuda", dtype=torch.bfloat16)
    again, _ = batch_images_to_packing_input([x.cuda() for x in images], 14, dtype=torch.bfloat16)
    assert rows.is_cuda and not grid.is_cuda and torch.equal(rows, again)
    for a, b in zip(vision(images), vision([x.cuda() for x in images])):
        assert torch.equal(a, b)


def test_auto_takes_a_kernel():
    chosen = resolve_backend("auto", "cuda", torch.bfloat16, 64)
    assert chosen != "sdpa" or unusable("torch_varlen", torch.bfloat16, 64)
    assert resolve_backend("auto", "cuda", torch.float32, 64) == "sdpa"
    if not unusable("cudnn", torch.bfloat16, 64):
        assert resolve_backend("auto", "cuda", torch.bfloat16, 64, lengths=(1024, 1024)) == "cudnn"
        with pytest.raises(ValueError, match="needs segments of one length, got 5 to 9"):
            resolve_backend("cudnn", "cuda", torch.bfloat16, 64, lengths=(5, 9))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("ragged", [False, True])
def test_training_under_autocast_by_the_twice_the_error_rule(tmp_path, ragged, checkpointing):
    """Parameter gradients of fused blocks with weights in float32 under autocast, against float32."""
    vision = tower(tmp_path)
    vision.requires_grad_(True)
    model = vision.vision_tower
    state = {k: v.clone() for k, v in model.state_dict().items()}
    images = photos() if ragged else list(torch.randn(4, 3, 224, 448, device="cuda").bfloat16())
    weight = torch.randn(sum(x.shape[1] * x.shape[2] // 196 for x in images), 256, device="cuda").bfloat16()

    def run(backend, dtype, fused, checkpointing=False):
        model.to(dtype).load_state_dict(state)
        model.set_attention_backend(backend)
        model.encoder.fused, model.encoder.gradient_checkpointing = fused, checkpointing
        model.train().zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16, enabled=fused is None):
            features = torch.cat(vision([x.to(dtype) for x in images]))
        (features.float() * weight.float()).sum().backward()
        return {n: p.grad.float().clone() for n, p in model.named_parameters() if p.grad is not None}

    exact, low = run("eager", torch.float32, False), run("eager", torch.bfloat16, False)
    got = run("auto", torch.float32, None, checkpointing)
    assert model.encoder.last_plan.path == "fused"
    assert got.keys() == exact.keys()
    for name, want in exact.items():
        assert (got[name] - want).norm() <= 2 * (low[name] - want).norm() + 1e-6 * want.norm(), name


@pytest.mark.parametrize("autocast", [False, True])
def test_graphs_give_the_same_features(tmp_path, monkeypatch, autocast):
    """Small batches replay CUDA graphs by token bucket: other sizes, other counts, moved weights, inference mode."""
    from llava_packing_tower.models.runtime import cuda_graphs

    monkeypatch.setattr(cuda_graphs, "_key", lambda *_: None)  # here the blocks alone
    vision = tower(tmp_path)
    if autocast:
        vision.float()
    encoder = vision.vision_tower.encoder
    batches = [
        [torch.randn(3, h * 14, w * 14, device="cuda").bfloat16() for h, w in sizes]
        for sizes in (((32, 32),), ((16, 16),), ((15, 17),), ((5, 9), (20, 3)), ((4, 11), (7, 13)), ((60, 64),))
    ]

    def features(batch, graphed):
        encoder.fused = None if graphed else False
        with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            return torch.cat(vision(batch)).float()

    for _ in range(2):
        for batch in batches:
            eager, replayed = features(batch, False), features(batch, True)
            assert (eager - replayed).abs().max() <= 0.03 * eager.abs().max()
            assert torch.equal(replayed, features(batch, True))
    assert 4 <= len(memory_of(encoder, BLOCKS).captured) <= len(batches)  # two of one bucket and count share a graph
    before = features(batches[0], True)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.mul_(1.5)  # in place: the graph sees it
    changed = features(batches[0], True)
    assert not torch.allclose(before, changed)
    vision.to("cpu").to("cuda")  # other memory: the graph must not be used
    torch.randn(1 << 24, device="cuda")
    assert (features(batches[0], True) - changed).abs().max() <= 0.03 * changed.abs().max()
    vision.requires_grad_(True)
    encoder.fused = None
    torch.cat(vision(batches[3])).float().sum().backward()  # what inference kept serves training
    assert encoder.layers[0].mlp.fc1.weight.grad is not None


@pytest.mark.parametrize("backend", ["auto", "flash_attention_4", "flash_attention_2", "torch_varlen"])
@pytest.mark.parametrize("family", ["llava_vit", "siglip2", "aimv2", "dinov3"])
def test_graphs_from_pixels_give_the_same_features(family, backend):
    """From the fourth batch of the same shapes on, pixels to features are one graph: same features as without."""
    from llava_packing_tower.tools.bench.models import PRESETS
    from llava_packing_tower.tools.bench.systems import Setting, packed_system, random_weights

    if reason := backend != "auto" and unusable(backend, torch.bfloat16, 64):
        pytest.skip(f"{backend}: {reason}")
    preset = PRESETS[family]
    config = preset.config(tiny=True)
    config.hidden_size, config.num_attention_heads = 256, 4
    setting = Setting(family, preset, config, torch.device("cuda"), torch.bfloat16)
    model = packed_system(setting, random_weights(setting), backend, train=False).model
    vision = model if isinstance(model, HEVCViTPackingVisionTower) else around(model)
    patch = config.patch_size
    equal = [torch.randn(3, 3, patch * 16, patch * 17, device="cuda").bfloat16() for _ in range(8)]
    ragged = [
        [torch.randn(3, h * patch, w * patch, device="cuda").bfloat16() for h, w in ((9, 21), (16, 4), (5, 5))]
        for _ in range(8)
    ]
    for batches in (equal, ragged):
        for number, images in enumerate(batches):
            with torch.inference_mode(number % 2 == 0), torch.no_grad():
                got = vision(images)
                want = vision._encode(images)[0]
            got = got.flatten(0, 1) if isinstance(got, torch.Tensor) else torch.cat(got)
            assert (got.float() - want.float()).abs().max() <= 0.03 * want.float().abs().max(), number
            if number == 5:  # other contents of the memory that lies free meanwhile
                torch.randn(1 << 26, device="cuda")
    assert len(memory_of(vision.vision_tower, PIXELS).captured) == 2
    vision.to("cpu").to("cuda")
    junk = torch.randn(1 << 26, device="cuda")
    with torch.no_grad():
        moved = torch.cat(vision(ragged[-1]))
    assert (moved.float() - want.float()).abs().max() <= 0.03 * want.float().abs().max()
    del junk


def around(model):
    """A tower around a model that is there already."""
    saved = {"weights": "checkpoint", "config": model.config.to_dict()}
    saved["image_processor"] = model.default_image_processor(model.config).to_dict()
    vision = HEVCViTPackingVisionTower("x", SimpleNamespace(mm_vision_select_layer=-2, mm_packing_config=saved))
    vision.vision_tower = model
    return vision.eval()


def test_shapes_that_come_again_after_many_are_no_slower(tmp_path):
    """Captures that are not used again cost more than they save: two rounds over 60 shapes make none from pixels on."""
    vision = tower(tmp_path)
    images = [torch.randn(1, 3, 14 * h, 14 * w, device="cuda").bfloat16() for h in range(4, 14) for w in range(5, 11)]
    with torch.no_grad():
        for _ in range(3):
            for image in images:
                vision(image)
    assert not memory_of(vision.vision_tower, PIXELS).captured
    assert 1 <= len(memory_of(vision.vision_tower.encoder, BLOCKS).captured) <= 4
