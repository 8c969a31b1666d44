"""The checkpoint of the family on the page docs/adding_a_family.md, as its makers would publish it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

WIDTH, HEADS, PATCH = 32, 2, 4


def publish(folder: Path) -> Path:
    """Their names for the tensors, their config."""
    d = WIDTH
    shapes = {"stem.weight": (d, 3, PATCH, PATCH), "stem.bias": (d,), "rows.weight": (8, d), "columns.weight": (8, d)}
    shapes |= {"norm.weight": (d,), "norm.bias": (d,), "classifier.weight": (10, d)}
    for block in (f"blocks.{i}" for i in range(2)):
        for linear in ("attn.q", "attn.k", "attn.v", "attn.out"):
            shapes |= {f"{block}.{linear}.weight": (d, d), f"{block}.{linear}.bias": (d,)}
        shapes |= {f"{block}.mlp.fc1.weight": (48, d), f"{block}.mlp.fc1.bias": (48,)}
        shapes |= {f"{block}.mlp.fc2.weight": (d, 48), f"{block}.mlp.fc2.bias": (d,)}
        shapes |= {f"{block}.norm{n}.{kind}": (d,) for n in (1, 2) for kind in ("weight", "bias")}
    folder.mkdir()
    save_file({name: torch.randn(shape) * 0.3 for name, shape in shapes.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "toy_vit", "dim": d, "num_hidden_layers": 2}))
    return folder
