"""Learned tables of positions on grids of any shape, against torch's ``interpolate``."""

import pytest
import torch
from conftest import assert_close
from torch.nn import functional

from llava_packing_tower.data.resampling import Resampling
from llava_packing_tower.models.position_tables import ResampledPositions

GRIDS = [(1, 3, 7), (1, 1, 1), (2, 9, 4), (1, 1, 11), (1, 6, 6)]


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("kernel", ["bilinear", "bicubic"])
@pytest.mark.parametrize("sides", [(3, 7), (6, 2), (5, 5), (1, 4)])
def test_tables_that_are_no_squares(sides, kernel, align_corners):
    """Values and gradients; transformers' MoonViT takes square tables only, its authors' code any."""
    table = ResampledPositions(sides, 6, Resampling(kernel, align_corners))
    torch.nn.init.normal_(table.weight)
    tokens = torch.randn(sum(t * h * w for t, h, w in GRIDS), 6)
    image = table.weight.view(*sides, 6).permute(2, 0, 1)[None]
    parts = []
    for t, h, w in GRIDS:
        found = functional.interpolate(image, (h, w), mode=kernel, align_corners=align_corners)
        parts.append(found[0].permute(1, 2, 0).reshape(h * w, 6).repeat(t, 1))
    wanted = tokens + torch.cat(parts)
    assert_close(table(tokens, GRIDS), wanted)
    weight = torch.randn(tokens.shape)
    grads = [torch.autograd.grad((out * weight).sum(), table.weight)[0] for out in (table(tokens, GRIDS), wanted)]
    assert_close(grads[0] / grads[1].abs().max(), grads[1] / grads[1].abs().max(), atol=1e-5)
