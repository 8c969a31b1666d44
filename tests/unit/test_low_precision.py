"""Every family in bfloat16, its blocks fused, on a CPU: what ``tests/gpu/test_families_gpu.py`` runs on a GPU."""

import pytest
from low_precision import (
    FAMILIES,
    around,
    canvases,
    check_graphs,
    check_training,
    cpu_kernel,
    joined,
    small,
    visuals_of,
)

from llava_packing_tower.data.cached_metadata import CachedMetadata
from llava_packing_tower.models.runtime import cuda_graphs


@pytest.mark.parametrize("autocast, checkpointing", [(False, True), (True, False)])
@pytest.mark.parametrize("name", FAMILIES)
def test_training(name, autocast, checkpointing, monkeypatch):
    check_training(name, "cpu", cpu_kernel(monkeypatch), autocast, checkpointing)


@pytest.mark.parametrize("pixels", [False, True])
@pytest.mark.parametrize("name", [*FAMILIES, "fusion"])
def test_graphs(name, pixels, monkeypatch, tmp_path):
    """A stand-in for the graph runs what was captured on the tensors that it reads; the batches that follow have other
    segments."""

    def capture(function, inputs, device):
        result = function()

        def replay():
            new = function()
            pairs = [(result[key], new[key]) for key in result] if isinstance(result, dict) else [(result[0], new[0])]
            for kept, found in pairs:
                kept.copy_(found)

        return cuda_graphs.Captured(replay, inputs, result, CachedMetadata())

    backend = cpu_kernel(monkeypatch)
    monkeypatch.setattr(cuda_graphs, "DEVICE_TYPE", "cpu")
    monkeypatch.setattr(cuda_graphs, "capture", capture)
    if name == "fusion":
        tower, images = joined(tmp_path, ("dinov3", "qwen3_vl"), "cpu"), canvases(2, "cpu")
    else:
        tower = around(small(name, "cpu"))
        images = visuals_of(tower.vision_tower, "cpu")
    check_graphs(tower, images, backend, monkeypatch, pixels)
