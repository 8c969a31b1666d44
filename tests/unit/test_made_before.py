"""Checkpoints and a converted folder that version 34c8e29 wrote go on loading, with the features that they had then."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from llava_packing_tower.data.image_processor import PackingImageProcessor
from llava_packing_tower.models.registry import family_for
from llava_packing_tower.utils.files import read_json

pytestmark = pytest.mark.newest
FOLDERS = sorted(folder for folder in (Path(__file__).parents[1] / "made_before").iterdir() if folder.is_dir())


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_loads_with_the_same_weights_and_features(folder):
    source = read_json(folder / "config.json")
    expected = load_file(folder / "expected.safetensors")
    cls = family_for(source["model_type"])
    stored = {}
    for file in folder.glob("model*.safetensors"):
        stored.update(load_file(file))
    for load in (cls.from_pretrained, AutoModel.from_pretrained):
        model = load(folder, attn_implementation="eager")
        assert type(model) is cls and not model.training
        assert {k: v.float() for k, v in stored.items()}.keys() == model.state_dict().keys()
        assert all(torch.equal(v, stored[k].float()) for k, v in model.state_dict().items())
        with torch.no_grad():
            out = model(expected["patches"], expected["grid_thw"])
        out = out if torch.is_tensor(out) else out.last_hidden_state
        torch.testing.assert_close(out, expected["features"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_says_the_same_of_itself(folder):
    source = read_json(folder / "config.json")
    cls = family_for(source["model_type"])
    config = cls.config_class.from_pretrained(folder)
    assert {key: getattr(config, key) for key in source if key not in ("dtype", "transformers_version")} == {
        key: value for key, value in source.items() if key not in ("dtype", "transformers_version")
    }
    written = PackingImageProcessor.from_pretrained(folder).to_dict()
    before = read_json(folder / "preprocessor_config.json")
    assert before == {key: written[key] for key in before}


def test_every_family_and_both_kinds_of_files_are_there():
    assert {folder.name for folder in FOLDERS} == {"aimv2", "converted", "dinov3", "llava_vit", "siglip2"}
    assert len(list((FOLDERS[0].parent / "dinov3").glob("model-*.safetensors"))) > 1
