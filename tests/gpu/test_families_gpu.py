"""Every family of the registry on a GPU in bfloat16, by the twice-the-error rule: ``pytest tests/gpu``."""

import pytest
import torch
from conftest import unusable
from low_precision import FAMILIES, around, canvases, check_graphs, check_training, joined, small, visuals_of

from llava_packing_tower.models.runtime.cuda_graphs import PIXELS

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
BACKENDS = ("auto", "flash_attention_2", "flash_attention_4")


def need(name, backend, needs_grad):
    config = FAMILIES[name].config_class()
    head = config.hidden_size // config.num_attention_heads
    if backend != "auto" and (reason := unusable(backend, torch.bfloat16, head, needs_grad)):
        pytest.skip(f"{backend}: {reason}")


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", FAMILIES)
def test_training(name, backend, autocast, checkpointing):
    need(name, backend, needs_grad=True)
    check_training(name, "cuda", backend, autocast, checkpointing)


@pytest.mark.parametrize("pixels", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", FAMILIES)
def test_graphs(name, backend, pixels, monkeypatch):
    need(name, backend, needs_grad=False)
    tower = around(small(name, "cuda"))
    check_graphs(tower, visuals_of(tower.vision_tower, "cuda"), backend, monkeypatch, pixels)


@pytest.mark.parametrize("pixels", [False, True])
def test_graphs_of_several_towers(pixels, monkeypatch, tmp_path):
    check_graphs(joined(tmp_path, ("dinov3", "qwen3_vl"), "cuda"), canvases(2, "cuda"), "auto", monkeypatch, pixels)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_no_synchronisation_inside_the_forward(name, grad):
    """Positions, windows and segments are made on the host: the device is never waited for, shapes known or new."""
    tower = around(small(name, "cuda").bfloat16())
    tower.requires_grad_(grad)
    images = [x.bfloat16() for x in visuals_of(tower.vision_tower, "cuda")]
    turned = [x.transpose(-1, -2).contiguous() for x in images]  # other shapes, the same kind of batch

    def step(batch):
        features = tower(batch)
        if grad:
            sum(f.float().sum() for f in features).backward()
        return features

    for _ in range(PIXELS.capture_at):  # kernels, caches; then graphs
        step(images)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(turned)
        features = step(images)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(f.isfinite().all() for f in features)
