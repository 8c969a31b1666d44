"""Two training steps of a real LLaVA on a GPU in bfloat16, for every family of the registry and two of them as one.

``LLAVA_NEXT_DIR=... python -m pytest tests/gpu/test_families_in_llava_gpu.py``; without a GPU: FAMILIES_ON_CPU=1.
"""

import math
import os

import family_trainings
import host_runs
import pytest
import torch
from low_precision import FAMILIES, small
from safetensors.torch import load_file

DEVICE = "cpu" if os.environ.get("FAMILIES_ON_CPU") == "1" else "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.skipif(not host_runs.NEXT, reason="LLAVA_NEXT_DIR is not set"),
    pytest.mark.timeout(900),
]
TOWERS = {name: (name,) for name in FAMILIES} | {"fusion": ("radio", "qwen3_vl")}
STEPS = 2


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """All of them in one process; of each the models of its towers, what it told, and its folder."""
    folder = tmp_path_factory.mktemp("families")
    host_runs.make_workspace(folder)
    models = {name: small(name, "cpu", layers=2) for name in FAMILIES}
    for name, model in models.items():
        model.save_pretrained(folder / "towers" / name)
    jobs = [
        family_trainings.job(
            *(name, folder / "config.yaml", folder),
            " + ".join(f"packing:{folder / 'towers' / own}" for own in names),
            *(DEVICE, False),
            max_steps=STEPS,
            image_aspect_ratio="native",
            mm_packing_max_patches=48,
            mm_projector_type="spatial_merge_2x2",
        )
        for name, names in TOWERS.items()
    ]
    told = family_trainings.start(jobs, folder, host_runs.NEXT, timeout=800)
    return models, told, folder


def unused(model) -> set[str]:
    """Names of what the last block's output does not depend on: the norm behind it, say."""
    rows = torch.randn(12, model.patch_dim)
    grid = torch.tensor([[1, 4, 3]])
    if side := getattr(model, "fixed_side", None):
        rows, grid = torch.randn(side * side, model.patch_dim), torch.tensor([[1, side, side]])
    out = model.requires_grad_(True)(rows, grid, feature_layers=(model.num_layers,))[0]
    (out * torch.randn(out.shape)).sum().backward()
    return {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}


@pytest.mark.parametrize("name", TOWERS)
def test_two_steps(trained, name):
    models, told, folder = trained
    said = told[name]
    assert "error" not in said, said["error"]
    assert len(said["losses"]) == STEPS and all(map(math.isfinite, said["losses"]))
    assert said["step"].startswith("packed decoder: on (") and "head: supervised positions" in said["step"]
    assert said["paths"] == ["fused" if DEVICE == "cuda" else "eager"] * len(TOWERS[name])

    saved = load_file(folder / name / "llava_llama" / "model.safetensors")
    for index, own in enumerate(TOWERS[name]):
        start = f"towers.{index}." if len(TOWERS[name]) > 1 else ""
        before, idle = models[own].state_dict(), unused(models[own])
        after = {key: saved[f"model.vision_tower.vision_tower.{start}{key}"] for key in before}
        assert not any(key.startswith(("encoder.", "patch_embed")) for key in idle)  # norms behind, and heads
        unchanged = {key for key, value in after.items() if torch.equal(before[key].to(value.dtype), value)}
        assert unchanged == idle
