"""What is known of a module without walking it: it must notice everything that changes."""

import copy

import pytest
import torch
from torch import nn

from llava_packing_tower.models.runtime.module_state import HOOKS, addresses, state_of


@pytest.fixture
def module():
    return nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 2, bias=False)))


def weights(module):
    return state_of(module).snapshot().weights


def hooked(module):
    return state_of(module).snapshot().hooked


def test_nothing_at_first(module):
    assert not hooked(module)
    assert [id(p) for p in weights(module)] == [id(p) for p in module.parameters()]
    assert state_of(module) is state_of(module) and state_of(copy.deepcopy(module)) is not state_of(module)


@pytest.mark.parametrize(
    "register", ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"]
)
def test_a_hook_far_down_is_seen_and_its_removal_too(module, register):
    assert not hooked(module)
    handle = getattr(module[1][1], f"register_{register}")(lambda *_: None)
    assert hooked(module)
    handle.remove()
    assert not hooked(module)
    assert len(HOOKS) == 4


def test_a_replaced_submodule_is_seen(module):
    before = addresses(weights(module))
    assert addresses(weights(module)) == before
    new = nn.Linear(3, 2)
    module[1][1] = new
    assert addresses(weights(module)) != before
    new.register_forward_hook(lambda *_: None)
    assert hooked(module)


def test_a_moved_weight_and_a_new_parameter_are_seen(module):
    before = addresses(weights(module))
    module[0].weight.data = module[0].weight.data.clone()
    moved = addresses(weights(module))
    assert moved != before
    module[0].bias = nn.Parameter(torch.zeros(3))
    assert addresses(weights(module)) != moved


def test_adapters_are_seen(module):
    """They are switched on and off without a weight or a hook changing: nothing recorded may be replayed."""
    adapter = type("Linear", (nn.Linear,), {"__module__": "peft.tuners.lora.layer"})
    before = state_of(module).snapshot()
    assert before.foreign is None
    module[0] = adapter(2, 3)
    after = state_of(module).snapshot()
    assert after.foreign == "0 is a peft.tuners.lora.layer.Linear" and after.version != before.version
