import json

import numpy as np
import pytest
import torch
from PIL import Image

from llava_packing_tower import PackingImageProcessor

SIZES = [(64, 48), (31, 77), (16, 16), (9, 40), (333, 128)]


def photo(width, height, seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("options", [{}, {"crop_size": 20}, {"resample": 2}, {"size": {"height": 12, "width": 20}}])
@pytest.mark.parametrize("size", SIZES)
def test_equals_transformers_clip_processor(size, options):
    """The original towers use transformers' CLIPImageProcessor: same pixels, also where the crop is padded."""
    transformers = pytest.importorskip("transformers")
    if transformers.__version__ >= "5":
        pytest.skip("transformers 5 has no CLIPImageProcessor without torchvision")
    image = photo(*size)
    theirs = transformers.CLIPImageProcessor(**{"size": {"shortest_edge": 16}, "crop_size": 16, **options})
    ours = PackingImageProcessor(**{"size": 16, "crop_size": 16, **options})
    expected = theirs.preprocess(image, return_tensors="pt")["pixel_values"]
    actual = ours.preprocess(image, return_tensors="pt")["pixel_values"]
    assert actual.shape == expected.shape and actual.dtype == torch.float32
    assert (actual - expected).abs().max() < 1e-6


def test_what_llava_does_with_it():
    processor = PackingImageProcessor(size=16)
    image = photo(40, 30)
    one = processor.preprocess(image, return_tensors="pt")["pixel_values"][0]
    assert one.shape == (3, 16, 16)
    called = processor([image, photo(20, 50)], return_tensors="pt")["pixel_values"]
    assert called.shape == (2, 3, 16, 16) and torch.equal(called[0], one)
    assert processor.crop_size["height"] == 16 and processor.size["shortest_edge"] == 16
    assert tuple(int(x * 255) for x in processor.image_mean) == (122, 116, 104)
    frames = np.stack([np.asarray(photo(24, 20, seed)) for seed in range(3)])
    assert processor.preprocess(frames, return_tensors="pt")["pixel_values"].shape == (3, 3, 16, 16)


def test_ragged_output_is_a_list():
    processor = PackingImageProcessor(size=16)
    values = processor.preprocess([photo(40, 20), photo(20, 20)], return_tensors="pt", do_center_crop=False)
    assert [tuple(x.shape) for x in values["pixel_values"]] == [(3, 16, 32), (3, 16, 16)]
    assert processor.do_center_crop


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_other_modes_become_rgb(mode):
    image = photo(20, 20).convert(mode)
    values = PackingImageProcessor(size=16).preprocess(image, return_tensors="pt")["pixel_values"]
    expected = PackingImageProcessor(size=16).preprocess(image.convert("RGB"), return_tensors="pt")["pixel_values"]
    assert torch.equal(values, expected)


def test_arrays_and_tensors_equal_images():
    image = photo(20, 24)
    processor = PackingImageProcessor(size=16)
    expected = processor.preprocess(image, return_tensors="pt")["pixel_values"]
    array = np.asarray(image)
    for same in (array, array.transpose(2, 0, 1), torch.from_numpy(array.copy())):
        assert torch.equal(processor.preprocess(same, return_tensors="pt")["pixel_values"], expected)
    with pytest.raises(ValueError, match=r"uint8 pixels.*float32 \[24, 20, 3\]"):
        processor.preprocess(array.astype(np.float32))


def test_config_files(tmp_path, golden):
    folder = golden / "hevc_packing_tower"
    processor = PackingImageProcessor.from_pretrained(folder)
    processor.save_pretrained(tmp_path / "p")
    written = json.loads((tmp_path / "p" / "preprocessor_config.json").read_text())
    original = json.loads((folder / "preprocessor_config.json").read_text())
    assert written == original
    assert PackingImageProcessor.from_pretrained(tmp_path / "p").to_dict() == processor.to_dict()
    with pytest.raises(ValueError, match=r"no preprocessor_config\.json"):
        PackingImageProcessor.from_pretrained(tmp_path)


@pytest.mark.parametrize("size", [{"shortest_edge": 0}, {"height": 4}, {"longest_edge": 4}])
def test_bad_sizes(size):
    with pytest.raises(ValueError, match="a size is"):
        PackingImageProcessor(size=size)


def test_bad_return_tensors():
    with pytest.raises(ValueError, match="'tf'"):
        PackingImageProcessor().preprocess(photo(8, 8), return_tensors="tf")
