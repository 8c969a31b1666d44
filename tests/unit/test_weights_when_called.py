"""A weight is read by the module that holds it, when that is called: before and after it may be gathered elsewhere."""

import pytest
import torch
from families import TINY, pack, ragged, tiny


def only_while_called(model: torch.nn.Module) -> None:
    """As ZeRO-3 does: outside of the calls of its module a parameter is there, but empty."""

    def hold(module: torch.nn.Module) -> None:
        kept = {name: parameter.data for name, parameter in module.named_parameters(recurse=False)}

        def put(values) -> None:
            for name, parameter in module.named_parameters(recurse=False):
                parameter.data = values(name)

        module.register_forward_pre_hook(lambda *_: put(kept.get))
        module.register_forward_hook(lambda *_: put(lambda name: kept[name].new_empty(0)))
        put(lambda name: kept[name].new_empty(0))

    for module in list(model.modules()):
        if next(module.parameters(recurse=False), None) is not None:
            hold(module)


@pytest.mark.parametrize("family", list(TINY))
def test_no_weight_is_read_around_its_module(family):
    model = tiny(family)
    rows, grid = pack(model, ragged(model))
    with torch.no_grad():
        expected = model(rows, grid)
        only_while_called(model)
        torch.testing.assert_close(model(rows, grid), expected)
