"""What only a GPU can show. Run on a machine with one: ``python -m pytest tests/gpu``."""

from types import SimpleNamespace

import pytest
import torch
from conftest import unusable

from llava_packing_tower import HEVCViTPackingVisionTower, LlavaViTPackingConfig, LlavaViTPackingModel
from llava_packing_tower.attention import BACKENDS, auto_order, backend_module, resolve_backend, varlen_attention
from llava_packing_tower.packing import batch_images_to_packing_input, make_segments
from llava_packing_tower.recording import RECORD_AT
from llava_packing_tower.rotation import ROTATIONS, turned_back

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
LENGTHS = (300, 17, 1, 64, 513, 128, 300)


@pytest.mark.parametrize("dim", [64, 72, 96, 128])
@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3"])
def test_no_build_is_called_wrong_in_bfloat16(name, dim):
    module, arguments = backend_module(name), (torch.device("cuda"), torch.bfloat16, dim)
    for needs_grad in (False, True):
        if module.why_not(*arguments, needs_grad) is None:
            assert resolve_backend(name, "cuda", *arguments[1:], needs_grad=needs_grad) == name


@pytest.mark.parametrize("dim", [64, 72, 96, 128])
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "eager"])
def test_backends_by_the_twice_the_error_rule(backend, dim):
    """Forward and gradients in bf16 against float32, error at most twice the bf16 reference's own."""
    if reason := unusable(backend, torch.bfloat16, dim):
        pytest.skip(f"{backend}: {reason}")
    lengths = (256,) * 5 if backend == "cudnn" else LENGTHS
    needs_grad = backend_module(backend).why_not(torch.device("cuda"), torch.bfloat16, dim, True) is None
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
@pytest.mark.parametrize("compile_blocks", [None, False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_no_synchronisation_inside_the_forward(tmp_path, backend, compile_blocks, grad):
    if backend != "auto" and (reason := unusable(backend, torch.bfloat16, 64)):
        pytest.skip(f"{backend}: {reason}")
    vision = tower(tmp_path)
    vision.vision_tower.set_attention_backend(backend)
    vision.vision_tower.encoder.compile_blocks = compile_blocks
    vision.requires_grad_(grad)
    images = photos()
    turned = [image.transpose(1, 2).contiguous() for image in images]  # other shapes, the same kind of batch

    def step(batch):
        features = vision(batch)
        if grad:
            sum(f.float().sum() for f in features).backward()
        return features

    for _ in range(RECORD_AT):  # kernels, caches, compilation; then a graph of the blocks, and a recording
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
@pytest.mark.parametrize("compile_blocks", [None, False, True])
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name not in ("cudnn", "eager")] + ["auto"])
def test_tower_error_at_most_twice_the_references(tmp_path, backend, compile_blocks, low_dtype):
    if backend != "auto" and (reason := unusable(backend, low_dtype, 64)):
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
    low = run("eager", low_dtype)
    model.load_state_dict(state)
    got = run(backend, low_dtype, compile_blocks)
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
def test_compiled_training_by_the_twice_the_error_rule(tmp_path, ragged, checkpointing):
    """Parameter gradients of the compiled bf16 tower against float32."""
    vision = tower(tmp_path)
    vision.requires_grad_(True)
    model = vision.vision_tower
    state = {k: v.clone() for k, v in model.state_dict().items()}
    images = photos() if ragged else list(torch.randn(4, 3, 224, 448, device="cuda").bfloat16())
    weight = torch.randn(sum(x.shape[1] * x.shape[2] // 196 for x in images), 256, device="cuda").bfloat16()

    def run(backend, dtype, compiled, checkpointing=False):
        model.to(dtype).load_state_dict(state)
        model.set_attention_backend(backend)
        model.encoder.compile_blocks, model.encoder.gradient_checkpointing = compiled, checkpointing
        model.train().zero_grad(set_to_none=True)
        (torch.cat(vision([x.to(dtype) for x in images])) * weight.to(dtype)).sum().backward()
        return {n: p.grad.float().clone() for n, p in model.named_parameters() if p.grad is not None}

    exact, low = run("eager", torch.float32, False), run("eager", torch.bfloat16, False)
    got = run("auto", torch.bfloat16, True, checkpointing)
    assert got.keys() == exact.keys()
    for name, want in exact.items():
        assert (got[name] - want).norm() <= 2 * (low[name] - want).norm() + 1e-6 * want.norm(), name


@pytest.mark.parametrize("blocks", [None, True])
def test_graphs_give_the_same_features(tmp_path, monkeypatch, blocks):
    """Small batches replay CUDA graphs by token bucket: other sizes, other counts, moved weights, inference mode."""
    from llava_packing_tower import graphs, recording

    monkeypatch.setattr(recording, "RECORD_AT", -1)  # here the blocks alone
    vision = tower(tmp_path)
    encoder = vision.vision_tower.encoder
    batches = [
        [torch.randn(3, h * 14, w * 14, device="cuda").bfloat16() for h, w in sizes]
        for sizes in (((32, 32),), ((16, 16),), ((15, 17),), ((5, 9), (20, 3)), ((4, 11), (7, 13)), ((60, 64),))
    ]

    def features(batch, graphed):
        encoder.compile_blocks = blocks if graphed else False
        with torch.inference_mode():
            return torch.cat(vision(batch)).float()

    for _ in range(2):
        for batch in batches:
            eager, replayed = features(batch, False), features(batch, True)
            assert (eager - replayed).abs().max() <= 0.03 * eager.abs().max()
            assert torch.equal(replayed, features(batch, True))
    assert 4 <= len(graphs._memories[encoder].captured) <= len(batches)  # two of one bucket and count share a graph
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
    encoder.compile_blocks = blocks
    torch.cat(vision(batches[3])).float().sum().backward()  # what inference kept serves training
    assert encoder.layers[0].mlp.fc1.weight.grad is not None


@pytest.mark.parametrize("backend", ["auto", "flash_attention_4", "flash_attention_2", "torch_varlen"])
@pytest.mark.parametrize("family", ["llava_vit", "siglip2", "aimv2", "dinov3"])
def test_recordings_give_the_same_features(family, backend):
    """From the fourth batch of the same shapes on, pixels to features are one graph: same features as without."""
    from llava_packing_tower import recording
    from llava_packing_tower.bench.presets import PRESETS
    from llava_packing_tower.bench.systems import Setting, our_system, random_weights

    if reason := backend != "auto" and unusable(backend, torch.bfloat16, 64):
        pytest.skip(f"{backend}: {reason}")
    preset = PRESETS[family]
    config = preset.config(tiny=True)
    config.hidden_size, config.num_attention_heads = 256, 4
    setting = Setting(family, preset, config, torch.device("cuda"), torch.bfloat16)
    model = our_system(setting, random_weights(setting), backend, train=False).model
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
    assert len(recording._memories[vision.vision_tower].captured) == 2
    vision.to("cpu").to("cuda")
    junk = torch.randn(1 << 26, device="cuda")
    with torch.no_grad():
        moved = torch.cat(vision(ragged[-1]))
    assert (moved.float() - want.float()).abs().max() <= 0.03 * want.float().abs().max()
    del junk


@pytest.mark.parametrize("kind", list(ROTATIONS))
@pytest.mark.parametrize("shape", [(5, 2, 16), (33, 3, 96), (1000, 16, 64)])
def test_the_backward_of_the_rotation(kind, shape):
    """The Triton kernel against the formula."""
    from llava_packing_tower import rotation_kernel

    grads = [torch.randn(shape, device="cuda").bfloat16() for _ in range(3)]
    angles = torch.randn(shape[0], 1, shape[2], device="cuda")  # no two alike: a swapped partner would show
    out = rotation_kernel.backward(*grads, angles.cos(), angles.sin(), kind == "pairs")
    for part, grad in enumerate(grads[:2]):
        want = turned_back(grad, angles.cos(), angles.sin(), ROTATIONS[kind]).bfloat16()
        torch.testing.assert_close(out[:, part], want)
    assert torch.equal(out[:, 2], grads[2])


def around(model):
    """A tower around a model that is there already."""
    saved = {"weights": "checkpoint", "config": model.config.to_dict()}
    saved["image_processor"] = model.default_image_processor(model.config).to_dict()
    vision = HEVCViTPackingVisionTower("x", SimpleNamespace(mm_vision_select_layer=-2, mm_packing_config=saved))
    vision.vision_tower = model
    return vision.eval()


def test_ragged_batches_do_not_recompile(tmp_path):
    """400 random batches: one graph per kernel and mode (inference, training), whatever the sizes and counts are."""
    import random

    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    vision = tower(tmp_path, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=1)
    vision.vision_tower.set_compile(True)
    draw = random.Random(0)

    def batch():
        sizes = [(draw.randint(1, 40), draw.randint(1, 40)) for _ in range(draw.randint(1, 24))]
        return [torch.randn(3, h * 14, w * 14, device="cuda").bfloat16() for h, w in sizes]

    # What auto may choose between: each has code of its own, compiled when it is first needed.
    kinds = {n for n in auto_order((1024, 1024)) if n != "sdpa" and not unusable(n, torch.bfloat16, 64)}
    for train in (False, True):
        vision.requires_grad_(train)
        for _ in range(200):
            with torch.set_grad_enabled(train):
                vision(batch())
    assert not counters["graph_break"]
    assert 1 <= counters["stats"]["unique_graphs"] <= 2 * len(kinds), counters["stats"]
