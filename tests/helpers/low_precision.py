"""Every family of the registry in half precision, fused, against float32: the bodies of tests on a GPU and without one.

Low precision passes at twice the error of plain blocks and plain attention in the same precision.
"""

from types import SimpleNamespace

import torch
from families import TINY, ragged
from torch import nn

from llava_packing_tower import HEVCViTPackingVisionTower
from llava_packing_tower.attention import dispatch
from llava_packing_tower.data.patches import batch_images_to_packing_input
from llava_packing_tower.data.segments import make_segments
from llava_packing_tower.models.registry import CLASSES, family_for
from llava_packing_tower.models.runtime import cuda_graphs
from llava_packing_tower.towers.fused_tower import FusedPackingVisionTower

FAMILIES = {types[0].removesuffix("_packing"): family_for(types[0]) for types in CLASSES.values()}
GRIDS = ((3, 5), (1, 7), (9, 6), (1, 1), (3, 5))
LOW = torch.bfloat16


def sdpa(q, k, v, segments, scale):
    """sdpa as a kernel for packed batches: it reads ``cu_seqlens``, for a CUDA graph is given no lengths."""
    if not segments.lengths:
        segments = make_segments(segments.cu_seqlens.diff().tolist())
    return dispatch.backend_module("sdpa").attend(q, k, v, segments, scale)


class WithOwnBackward(torch.autograd.Function):
    """Attention as flash-attn's backend offers it: an autograd function that a block can take in."""

    @staticmethod
    def forward(ctx, q, k, v, segments, scale):
        ctx.save_for_backward(q, k, v)
        ctx.rest = segments, scale
        return sdpa(q, k, v, segments, scale)

    @staticmethod
    def backward(ctx, grad):
        inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        with torch.enable_grad():
            out = sdpa(*inputs, *ctx.rest)
        return *torch.autograd.grad(out, inputs, grad), None, None


def cpu_kernel(monkeypatch, one_node: bool = False) -> str:
    """The name of a backend that takes packed batches on a CPU: sdpa, said to be one kernel."""
    module = SimpleNamespace(VARLEN=True, unsupported_reason=lambda *_: None, attend=sdpa)
    if one_node:
        module.Attention = WithOwnBackward
    monkeypatch.setitem(dispatch.BACKENDS, "cpu_varlen", "cpu_varlen")
    monkeypatch.setitem(dispatch._LOADED, "cpu_varlen", module)
    return "cpu_varlen"


def small(name: str, device: str, layers: int = 3):
    """Random weights; heads as wide as those of the family's default size, which need not be a power of two."""
    cls, own = FAMILIES[name], TINY.get(name, (None, {}))[1]
    default = cls.config_class()
    head = default.hidden_size // default.num_attention_heads
    sizes = {"hidden_size": 2 * head, "intermediate_size": 3 * head, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = cls.config_class(**sizes, num_hidden_layers=layers, patch_size=4, image_size=16, **own)
    model = cls(config).to(device)
    for key, parameter in model.named_parameters():
        is_scale = "norm" in key and key.endswith("weight")
        nn.init.normal_(parameter, mean=float(is_scale), std=0.3 if is_scale or key.endswith("bias") else 0.06)
    return model.eval()


def visuals_of(model, device: str) -> list[torch.Tensor]:
    """Ragged images, and a clip of three frames (which two frames to a patch do not divide) where it takes clips."""
    found = ragged(model, GRIDS)
    if not model.image_only:
        found.insert(2, torch.stack([found[2], found[2].flip(1), found[2].flip(2)], dim=1))
    return [x.to(device) for x in found]


def around(model):
    """A tower around a model that is there already."""
    saved = {"weights": "checkpoint", "config": model.config.to_dict()}
    saved["image_processor"] = model.default_image_processor(model.config).to_dict()
    tower = HEVCViTPackingVisionTower("x", SimpleNamespace(mm_vision_select_layer=-1, mm_packing_config=saved))
    tower.vision_tower = model
    return tower.eval()


def check_twice(got: dict, exact: dict, low: dict) -> None:
    assert got.keys() == exact.keys()
    for name, want in exact.items():
        error, allowed = (got[name] - want).norm(), 2 * (low[name] - want).norm()
        assert error <= allowed + 1e-6 * want.norm(), (name, error / want.norm(), allowed / want.norm())


def check_training(name: str, device: str, backend: str, autocast: bool, checkpointing: bool) -> None:
    """Hidden states and every gradient, fused; with autocast the weights are in float32. And the states without
    gradients."""
    model = small(name, device).train()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    frames = model.frames_per_patch
    rows, grid = batch_images_to_packing_input(
        visuals_of(model, device), model.config.patch_size, model.patch_layout, frames_per_patch=frames
    )
    layers = (1, model.num_layers)
    weight = torch.randn(len(rows), model.config.hidden_size).to(device)

    def run(dtype, fused, backend, cast=False):
        model.to(dtype).load_state_dict(state)
        model.set_attention_backend(backend)
        model.set_fused(fused)
        model.encoder.gradient_checkpointing = checkpointing and fused is True
        model.zero_grad(set_to_none=True)
        with torch.autocast(torch.device(device).type, LOW, enabled=cast):
            first, out = model(rows.to(dtype), grid, feature_layers=layers)
            ((first + out).float() * weight).sum().backward()
            with torch.no_grad():
                inferred = model(rows.to(dtype), grid, feature_layers=layers[1:])[0]
                final = model(rows.to(dtype), grid)
                final = getattr(final, "last_hidden_state", final)
        assert fused is not True or model.encoder.last_plan.path == "fused"
        states = {"training": out, "inference": inferred, "final": final}
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        return {key: x.detach().float().clone() for key, x in {**states, **grads}.items()}

    exact, low = run(torch.float32, False, "eager"), run(LOW, False, "eager")
    got = run(torch.float32 if autocast else LOW, True, backend, cast=autocast)
    assert len(exact) > 10
    check_twice(got, exact, low)


def joined(folder, names: tuple[str, ...], device: str) -> FusedPackingVisionTower:
    """Several small towers as one."""
    for name in names:
        small(name, "cpu").save_pretrained(folder / name)
    args = SimpleNamespace(mm_vision_select_layer=-1)
    return FusedPackingVisionTower(" + ".join(f"packing:{folder / name}" for name in names), args).to(device).eval()


def canvases(count: int, device: str) -> list[torch.Tensor]:
    """Ragged images for ``count`` towers with patches of 4."""
    return [torch.randn(3 * count, 4 * h, 4 * w).to(device) for h, w in GRIDS]


def check_graphs(tower, images: list[torch.Tensor], backend: str, monkeypatch, pixels: bool) -> None:
    """Batches of shapes that come again, in inference: graphs are captured and replayed, and give the features that
    float32 has; of the blocks alone, or from pixels on."""
    model, parts = tower.vision_tower, [part.vision_tower for part in tower.encoders().values()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    batches = [images]
    batches += [[x.flip(-1) * scale for x in batches[0]] for scale in (0.5, 1.5, 1.0, 2.0)]
    if not pixels:
        monkeypatch.setattr(cuda_graphs, "_key", lambda *_: None)

    def run(dtype, fused, backend):
        model.to(dtype).load_state_dict(state)
        for part in parts:
            part.set_attention_backend(backend)
            part.set_fused(fused)
        with torch.no_grad():
            return {str(i): torch.cat(tower([x.to(dtype) for x in b])).float() for i, b in enumerate(batches)}

    exact, low = run(torch.float32, False, "eager"), run(LOW, False, "eager")
    check_twice(run(LOW, True, backend), exact, low)
    if pixels:
        assert len(cuda_graphs.memory_of(model, cuda_graphs.PIXELS).captured) == 1
    for part in [] if pixels else parts:
        if part.encoder.last_plan.graph:  # blocks with several kinds of segments have none of their own
            assert len(cuda_graphs.memory_of(part.encoder, cuda_graphs.BLOCKS).captured) == 1
