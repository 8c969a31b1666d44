"""Small checkpoints of every kind, and the command line, for the tests of `convert` and `verify`."""

from __future__ import annotations

import json

import torch
from safetensors.torch import load_file, save_file

from llava_packing_tower.cli.main import main
from llava_packing_tower.models.llava_vit.config import LlavaViTConfig
from llava_packing_tower.models.llava_vit.standard import LlavaViTModel

SIZES = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=2, patch_size=32)


def lively(model: torch.nn.Module, seed: int = 3) -> torch.nn.Module:
    """Weights of a size that makes attention pick and choose, so that every part of the model matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.add_(0.2 * noise)
            else:
                parameter.copy_(1.5 * noise / parameter[0].numel() ** 0.5)
    return model


def standard_folder(folder, dtype=torch.float32, **fields):
    """A `llava_vit` folder."""
    lively(LlavaViTModel(LlavaViTConfig(**{**SIZES, **fields}))).to(dtype).save_pretrained(folder)
    return folder


def packing_folder(source, folder, *options):
    assert main(["convert", str(source), "--output_dir", str(folder), "--no-verify", *options]) == 0
    return folder


def change_weights(folder, change):
    """Let ``change`` edit the tensors of a checkpoint folder in place."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


def source_state_dict(standard: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Standard tensors under the names of the training code."""
    result = {}
    for name, tensor in standard.items():
        if ".self_attn.q_proj." in name:
            parts = [standard[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            name, tensor = name.replace("q_proj", "in_proj"), torch.cat(parts)
        elif "_proj." in name and ".self_attn.out_proj." not in name and "head." not in name:
            continue
        if not name.startswith("head."):
            for old, new in (
                ("embeddings.patch_embedding.", "conv1."),
                ("layernorm_", "ln_"),
                ("encoder.layers.", "transformer.layers."),
                ("layer_norm", "ln_"),
                ("self_attn.", "attn."),
                ("mlp.fc1.", "mlp.0."),
                ("mlp.fc2.", "mlp.2."),
            ):
                name = name.replace(old, new)
        result[name] = tensor.clone()
    return result


def same_bits(left, right):
    left, right = load_file(left / "model.safetensors"), load_file(right / "model.safetensors")
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]), name


def config_of(folder):
    return json.loads((folder / "config.json").read_text())
