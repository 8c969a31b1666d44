"""What is known of a module without walking it: it must notice everything that changes."""

import copy

import pytest
import torch
from torch import nn

from llava_packing_tower.module_state import HOOKS, state_of


@pytest.fixture
def module():
    return nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 2, bias=False)))


def test_nothing_at_first(module):
    state = state_of(module)
    assert not state.has_hooks() and state.trained()
    assert [id(p) for p in state.parameters()] == [id(p) for p in module.parameters()]
    assert state_of(module) is state and state_of(copy.deepcopy(module)) is not state


@pytest.mark.parametrize(
    "register", ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"]
)
def test_a_hook_far_down_is_seen_and_its_removal_too(module, register):
    state = state_of(module)
    handle = getattr(module[1][1], f"register_{register}")(lambda *_: None)
    assert state.has_hooks()
    handle.remove()
    assert not state.has_hooks()
    assert len(HOOKS) == 4


def test_a_replaced_submodule_is_seen(module):
    state = state_of(module)
    before = state.weight_addresses()
    assert state.weight_addresses() == before
    new = nn.Linear(3, 2)
    module[1][1] = new
    assert state.weight_addresses() != before
    new.register_forward_hook(lambda *_: None)
    assert state.has_hooks()


def test_a_moved_weight_and_a_new_parameter_are_seen(module):
    state = state_of(module)
    before = state.weight_addresses()
    module[0].weight.data = module[0].weight.data.clone()
    moved = state.weight_addresses()
    assert moved != before
    module[0].bias = nn.Parameter(torch.zeros(3))
    assert state.weight_addresses() != moved


def test_trained(module):
    state = state_of(module)
    module.requires_grad_(False)
    assert not state.trained()
    module[1][1].weight.requires_grad_(True)
    assert state.trained()
