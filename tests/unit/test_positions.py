import json

import pytest
import torch

from llava_packing_tower import (
    compute_patch_positions_from_grid_thw,
    compute_patch_positions_with_interpolated_temporal,
    interpolate_frame_indices,
)
from llava_packing_tower.data.positions import rotary_3d


@pytest.fixture(scope="module")
def cases(golden):
    return json.loads((golden / "positions.json").read_text())


def test_every_golden_section_is_read(cases):
    assert set(cases) == {
        "compute_patch_positions_from_grid_thw",
        "compute_patch_positions_with_interpolated_temporal",
        "interpolate_batched",
        "interpolate_frame_indices",
    }


def test_positions_from_grid(cases):
    for case in cases["compute_patch_positions_from_grid_thw"]:
        result = compute_patch_positions_from_grid_thw(torch.tensor(case["grid_thw"]))
        assert result.tolist() == case["expected"] and str(result.dtype) == case["dtype"]


def test_interpolated_positions(cases):
    for case in cases["compute_patch_positions_with_interpolated_temporal"]:
        indices = torch.tensor(case["interpolated_indices"])
        result = compute_patch_positions_with_interpolated_temporal(indices, case["h"], case["w"], torch.device("cpu"))
        assert result.tolist() == case["expected"] and str(result.dtype) == case["dtype"]


def test_frame_indices(cases):
    for case in cases["interpolate_frame_indices"]:
        indices = torch.tensor([case["frame_indices"]])
        result = interpolate_frame_indices(indices, torch.tensor([case["total_frames"]]), case["target_frames"])
        assert result.tolist() == [case["expected"]] and result.dtype == torch.int64
    batched = cases["interpolate_batched"]
    result = interpolate_frame_indices(torch.tensor(batched["frame_indices"]), torch.tensor(batched["total_frames"]))
    assert result.tolist() == batched["expected"]


def test_ties_go_to_the_even_neighbour_everywhere():
    """All frames of every clip length below 200, against exact integer arithmetic."""
    for total in range(1, 200):
        got = interpolate_frame_indices(torch.arange(total)[None], torch.tensor([total]))[0].tolist()
        span = max(total - 1, 1)
        for index, value in enumerate(got):
            quotient, rest = divmod(index * 63, span)
            up = 2 * rest > span or (2 * rest == span and quotient % 2 == 1)
            assert value == quotient + up, (total, index)


def test_clamping():
    assert interpolate_frame_indices(torch.tensor([[3]]), torch.tensor([1])).tolist() == [[63]]
    assert interpolate_frame_indices(torch.tensor([[-2, 9]]), torch.tensor([8])).tolist() == [[0, 63]]
    assert interpolate_frame_indices(torch.tensor([[0, 1]]), torch.tensor([0])).tolist() == [[0, 63]]


@pytest.mark.parametrize("shape", [(4,), (1, 2, 3)])
def test_wrong_shapes(shape):
    with pytest.raises(ValueError, match="frame_indices"):
        interpolate_frame_indices(torch.zeros(shape), torch.tensor([4]))
    with pytest.raises(ValueError, match="interpolated_indices"):
        compute_patch_positions_with_interpolated_temporal(torch.zeros(shape, dtype=torch.long), 2, 2)


def test_rotary_table_by_hand():
    """The worked example of the head of 32: elements 0..3 and 16..19 turn with t, 4..9 and 20..25 with h, rest w."""
    cos, sin = rotary_3d(torch.tensor([[5.0, 2.0, 7.0]]), 32, 10000.0)
    angle = [5 * 10000 ** (-k / 4) for k in range(4)]
    angle += [2 * 10000 ** (-k / 6) for k in range(6)] + [7 * 10000 ** (-k / 6) for k in range(6)]
    expected = torch.tensor(angle * 2, dtype=torch.float64)
    assert cos.shape == (1, 1, 32) and cos.dtype == torch.float32
    torch.testing.assert_close(cos[0, 0].double(), expected.cos(), atol=1e-6, rtol=0)
    torch.testing.assert_close(sin[0, 0].double(), expected.sin(), atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="multiple of 32, got 48"):
        rotary_3d(torch.zeros(1, 3), 48, 10000.0)
