import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_packing_tower import PatchLayout, batch_images_to_packing_input, image_to_packing_input, patchify, unpatchify
from llava_packing_tower.data.patches import longest_first, split_packed
from llava_packing_tower.data.positions import prefix_indices
from llava_packing_tower.data.segments import make_segments, read_grid

LAYOUTS = list(PatchLayout)


def numbered(channels, height, width):
    """Every pixel another number, so that no permutation can go unseen."""
    return torch.arange(channels * height * width, dtype=torch.float32).reshape(channels, height, width)


def test_rows_by_hand():
    image = numbered(3, 4, 6)  # patches of 2: 2 rows x 3 columns
    first = patchify(image, 2, PatchLayout.CHANNEL_FIRST)
    last = patchify(image, 2, PatchLayout.CHANNEL_LAST)
    # patch (row 1, column 2) covers pixel rows 2..3 and columns 4..5
    pixels = [[[float(c * 24 + y * 6 + x) for x in (4, 5)] for y in (2, 3)] for c in range(3)]
    assert first[5].tolist() == [pixels[c][y][x] for c in range(3) for y in range(2) for x in range(2)]
    assert last[5].tolist() == [pixels[c][y][x] for y in range(2) for x in range(2) for c in range(3)]
    assert not torch.equal(first, last)


def test_golden_rows(golden_case):
    case = golden_case("llava_vit", "mixed")
    samples = [case[f"pixels.{i}"] for i in range(4)]
    rows, grid = batch_images_to_packing_input(samples, 4)
    assert torch.equal(rows, case["patches"]) and torch.equal(grid, case["grid_thw"])
    back = unpatchify(rows, grid, 4)
    assert all(torch.equal(a, b) for a, b in zip(back, samples, strict=True))


@settings(deadline=None, max_examples=40)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=5),
    patch=st.integers(1, 3),
    layout=st.sampled_from(LAYOUTS),
)
def test_roundtrip(sizes, patch, layout):
    images = [numbered(3, h * patch, w * patch) + 1000 * i for i, (h, w) in enumerate(sizes)]
    rows, grid = batch_images_to_packing_input(images, patch, layout)
    assert grid.tolist() == [[1, h, w] for h, w in sizes] and grid.dtype == torch.int64
    assert rows.shape == (sum(h * w for h, w in sizes), 3 * patch * patch)
    for image, again in zip(images, unpatchify(rows, grid, patch, layout), strict=True):
        assert torch.equal(image, again)
    assert torch.equal(rows, torch.cat([patchify(image, patch, layout) for image in images]))


def test_tensor_and_list_agree():
    batch = torch.randn(3, 3, 8, 12)
    a = batch_images_to_packing_input(batch, 4)
    b = batch_images_to_packing_input(list(batch), 4)
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    one, grid = image_to_packing_input(batch[1], patch_size=4)
    assert torch.equal(one, a[0][6:12]) and grid.tolist() == [[1, 2, 3]]


def test_cast_and_gradient():
    images = [torch.randn(3, 4, 8, requires_grad=True), torch.randn(3, 8, 4, requires_grad=True)]
    rows, _ = batch_images_to_packing_input(images, 4, dtype=torch.float64)
    assert rows.dtype == torch.float64
    (rows * torch.arange(rows.numel()).view_as(rows)).sum().backward()
    expected = patchify(images[1].detach(), 4)
    assert torch.equal(rows[2:].detach().float(), expected)
    assert images[1].grad.unique().numel() == images[1].numel()


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "no images"),
        ([torch.zeros(3, 8, 8), torch.zeros(3, 9, 8)], r"image 1 is 9 x 8 pixels.*height 9.*patch size 4.*8 or 12"),
        ([torch.zeros(3, 8, 3)], r"width 3 .*nearest widths: 4"),
        ([torch.zeros(1, 8, 8)], "image 0 has 1 channels, expected 3"),
        ([torch.zeros(8, 8)], r"image 0 must be a tensor \[C, H, W\].*\[8, 8\]"),
        (["photo.jpg"], "got str"),
        (torch.zeros(2, 3, 2, 8, 8), r"must be \[B, C, H, W\]"),
    ],
)
def test_bad_images(images, message):
    with pytest.raises(ValueError, match=message):
        batch_images_to_packing_input(images, 4)


@pytest.mark.parametrize(
    ("grid", "count", "message"),
    [
        (torch.tensor([[1, 2, 3]]), 7, r"describes 6 patches .*7 rows"),
        (torch.tensor([[1, 0, 3]]), None, r"grid_thw\[0\] = \[1, 0, 3\]"),
        (torch.tensor([1, 2, 3]), None, r"\[B, 3\]"),
        (torch.tensor([[1.0, 2.0, 3.0]]), None, "integer"),
        (torch.zeros(0, 3, dtype=torch.long), None, "B >= 1"),
    ],
)
def test_bad_grids(grid, count, message):
    with pytest.raises(ValueError, match=message):
        read_grid(grid, count)


def test_segments():
    segments = make_segments([3, 1, 5])
    assert segments.cu_seqlens.tolist() == [0, 3, 4, 9] and segments.cu_seqlens.dtype == torch.int32
    assert segments.max_seqlen == 5 and type(segments.max_seqlen) is int
    with pytest.raises(ValueError, match=r"\[2, 0\]"):
        make_segments([2, 0])


def test_split():
    parts = split_packed(torch.arange(11), [(1, 2, 3), (5, 1, 1)])
    assert [p.tolist() for p in parts] == [list(range(6)), list(range(6, 11))]


def test_prefix_indices():
    insert, patches = prefix_indices((2, 3), 2, torch.device("cpu"))
    tokens = ["cls", "reg", "a0", "a1", "b0", "b1", "b2"]
    packed = [tokens[i] for i in insert]
    assert packed == ["cls", "reg", "a0", "a1", "cls", "reg", "b0", "b1", "b2"]
    assert [packed[i] for i in patches] == tokens[2:]


def test_longest_first_keeps_the_order_of_equals():
    sizes = [(3, 2, 2), (3, 4, 4), (3, 2, 2), (3, 2, 8), (3, 5, 5)]
    assert longest_first([torch.zeros(size) for size in sizes]) == [4, 1, 3, 0, 2]
    assert longest_first([]) == []
