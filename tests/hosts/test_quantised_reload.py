"""The check after a reload knows quantised towers: what they keep is not what is in a file, and it is not missing.

Stand-ins for what bitsandbytes (8 and 4 bits), torchao and quanto leave in a state dict: no GPU, and none of them here.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from llava_packing_tower.integrations.llava.checkpoint import check_tower_weights
from llava_packing_tower.tools.demo.tiny_models import make_tower
from llava_packing_tower.towers.packing_tower import HEVCViTPackingVisionTower

pytestmark = pytest.mark.newest
CONFIG = SimpleNamespace(mm_packing_config={"weights": "checkpoint"})
FC1 = "vision_tower.encoder.layers.1.mlp.fc1"


class Wrapped(torch.Tensor):
    """A library's own tensor: it says that it is floating-point, and cannot be compared."""


def eight_bits(layer: nn.Linear) -> nn.Linear:
    layer.weight = nn.Parameter((layer.weight * 100).to(torch.int8), requires_grad=False)
    layer.register_buffer("SCB", torch.ones(layer.out_features))
    layer.register_buffer("weight_format", torch.tensor(0))
    return layer


def four_bits(layer: nn.Linear) -> nn.Linear:
    layer.weight = nn.Parameter(torch.zeros(layer.weight.numel() // 2, 1, dtype=torch.uint8), requires_grad=False)

    def states(module, state, prefix, _):
        state[f"{prefix}weight.absmax"] = torch.ones(3)
        state[f"{prefix}weight.quant_state.bitsandbytes__nf4"] = torch.ones(3, dtype=torch.uint8)

    layer._register_state_dict_hook(states)
    return layer


def own_tensor(layer: nn.Linear) -> nn.Linear:
    layer.weight = nn.Parameter((layer.weight.detach() * 1.01).as_subclass(Wrapped), requires_grad=False)
    return layer


def in_parts(layer: nn.Linear) -> nn.Linear:
    """In place of ``weight``: ``weight._data`` and ``weight._scale``."""
    made = nn.Linear(layer.in_features, layer.out_features)
    made.bias = layer.bias
    data = nn.Module()
    data.register_buffer("_data", (layer.weight * 100).to(torch.int8))
    data.register_buffer("_scale", torch.ones(1))
    del made.weight
    made.add_module("weight", data)
    made.register_buffer("input_scale", torch.ones(1, dtype=torch.int32))
    return made


@pytest.fixture
def saved(tmp_path):
    """A tower, and the folder of a checkpoint that has its tensors."""
    make_tower(tmp_path / "vit_packing", seed=2)
    args = SimpleNamespace(mm_vision_select_layer=-1, mm_projector_type="linear")
    tower = HEVCViTPackingVisionTower(str(tmp_path / "vit_packing"), args)
    folder = tmp_path / "checkpoint"
    folder.mkdir()

    def save(*left_out):
        state = {f"model.vision_tower.{name}": t for name, t in tower.state_dict().items() if name not in left_out}
        save_file(state, folder / "model.safetensors")
        return tower, str(folder)

    return save


def replace(module: nn.Module, make) -> None:
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Linear):
            setattr(module, name, make(child))
        else:
            replace(child, make)


@pytest.mark.parametrize("make", [eight_bits, four_bits, own_tensor, in_parts])
def test_a_quantised_tower_passes_and_its_gaps_are_found(saved, make):
    tower, folder = saved()
    replace(tower, make)
    check_tower_weights(tower, CONFIG, folder)
    tower.vision_tower.layernorm_pre.weight.data += 1  # what is not quantised is compared as ever
    with pytest.raises(ValueError, match=r"1 different from the checkpoint: vision_tower\.layernorm_pre\.weight"):
        check_tower_weights(tower, CONFIG, folder)


@pytest.mark.parametrize("make", [eight_bits, four_bits, own_tensor, in_parts])
def test_a_weight_that_no_file_has_is_found_although_it_is_quantised(saved, make):
    tower, folder = saved(f"{FC1}.weight")
    replace(tower, make)
    with pytest.raises(ValueError, match=r"not in the checkpoint: vision_tower\.encoder\.layers\.1\.mlp\.fc1\."):
        check_tower_weights(tower, CONFIG, folder)
