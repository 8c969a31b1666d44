"""Models by name, in this package and through timm."""

import importlib
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from llava_packing_tower import LlavaViTPackingModel, create_model
from llava_packing_tower.models.llava_vit import timm_names
from llava_packing_tower.models.llava_vit.presets import PRESETS, preset
from llava_packing_tower.models.llava_vit.standard import LlavaViTModel

# name of the size: patch, width, layers, heads, MLP width, parameters
SIZES = {
    "small": (16, 384, 6, 6, 1536, 12_716_928),
    "base": (16, 768, 12, 12, 3072, 92_733_696),
    "large": (14, 1024, 24, 16, 4096, 315_509_760),
    "huge": (14, 1280, 32, 20, 5120, 650_110_720),
    "giant": (14, 1536, 40, 16, 6144, 1_162_498_560),
}
STANDARD_HUGE = (14, 1536, 27, 16, 4608, 662_025_216)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("form", ["hf_llava_vit_packing_{}_ln", "hf_llava_vit_{}_ln", "llava_vit_{}_ln"])
def test_sizes_and_parameter_counts(size, form):
    with torch.device("meta"):
        model = create_model(form.format(size))
    assert isinstance(model, LlavaViTPackingModel if "packing" in form else LlavaViTModel)
    config = model.config
    found = (config.patch_size, config.hidden_size, config.num_hidden_layers, config.num_attention_heads)
    count = sum(parameter.numel() for parameter in model.parameters())
    expected = STANDARD_HUGE if (form, size) == ("hf_llava_vit_{}_ln", "huge") else SIZES[size]
    assert (*found, config.intermediate_size, count) == expected


def test_the_rms_size_is_of_the_source_only():
    with torch.device("meta"):
        config = create_model("llava_vit_base_rms").config
    assert config.layer_norm_type == "rms_norm" and config.hidden_size == 768
    with pytest.raises(ValueError, match="unknown model name 'hf_llava_vit_packing_base_rms'; known: hf_"):
        preset("hf_llava_vit_packing_base_rms")


def test_fields_in_place_of_the_presets_and_no_pretrained_weights():
    model = create_model("hf_llava_vit_packing_small_ln", num_hidden_layers=1, image_size=224)
    assert model.config.num_hidden_layers == 1 and model.config.image_size == 224 and model.config.hidden_size == 384
    assert not any(parameter.isnan().any() for parameter in model.parameters())
    with pytest.raises(ValueError, match="no weights are published"):
        create_model("hf_llava_vit_packing_small_ln", pretrained=True)


@pytest.fixture
def registered(monkeypatch):
    """Tell the timm that is given, as an import of it does."""

    def tell(timm):
        for name, module in timm.items():
            monkeypatch.setitem(sys.modules, name, module)
        timm_names.when_timm_is_there(timm["timm"])

    return tell


def stand_in(known=()):
    """What of timm the registration uses: a registry that refuses a name that it has."""
    registry = dict.fromkeys(known)
    timm, models = types.ModuleType("timm"), types.ModuleType("timm.models")
    timm.__spec__ = importlib.machinery.ModuleSpec("timm", None)
    timm.models, models.is_model = models, registry.__contains__

    def register_model(entry):
        assert entry.__name__ not in registry and hasattr(sys.modules[entry.__module__], entry.__name__)
        registry[entry.__name__] = entry

    models.register_model = register_model
    return registry, {"timm": timm, "timm.models": models}


def test_registered_where_timm_is_installed(registered):
    registry, timm = stand_in()
    registered(timm)
    assert set(PRESETS) == set(registry)
    # timm's create_model passes these of its own.
    options = {"pretrained_cfg": None, "pretrained_cfg_overlay": None, "cache_dir": None, "num_hidden_layers": 1}
    model = registry["hf_llava_vit_packing_small_ln"](pretrained=False, **options)
    assert type(model).__name__ == "LlavaViTPackingModel" and model.config.num_hidden_layers == 1
    assert type(registry["llava_vit_small_ln"](num_hidden_layers=1)).__name__ == "LlavaViTSourceModel"


def test_names_that_timm_has_already_are_left_alone(registered):
    registry, timm = stand_in(["llava_vit_small_ln"])
    registered(timm)
    assert registry["llava_vit_small_ln"] is None and registry["llava_vit_base_ln"] is not None


def test_a_broken_timm_breaks_nothing(registered, caplog):
    timm = stand_in()[1]
    del timm["timm.models"].register_model
    registered(timm)
    assert create_model("hf_llava_vit_packing_small_ln", num_hidden_layers=1)
    assert "timm is installed but cannot be used" in caplog.text


@pytest.mark.parametrize("first", ["timm", "llava_packing_tower"])
def test_the_order_of_imports_does_not_matter(tmp_path, first):
    """In a process of its own: nothing imports timm or torch but the user, and then the names are there."""
    (tmp_path / "timm" / "models").mkdir(parents=True)
    (tmp_path / "timm" / "__init__.py").write_text("from . import models\n")
    (tmp_path / "timm" / "models" / "__init__.py").write_text(
        "NAMES = {}\nis_model = NAMES.__contains__\n\ndef register_model(entry):\n    NAMES[entry.__name__] = entry\n"
    )
    second = {"timm": "llava_packing_tower", "llava_packing_tower": "timm"}[first]
    code = f"""
import sys
import {first}
assert "timm" not in sys.modules or {first == "timm"}
import {second}
import timm
assert "torch" not in sys.modules
assert "hf_llava_vit_packing_giant_ln" in timm.models.NAMES and "ov_encoder_base" in timm.models.NAMES
"""
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_the_real_timm():
    timm = pytest.importorskip("timm")
    model = timm.create_model("hf_llava_vit_packing_small_ln", num_hidden_layers=1)
    assert isinstance(model, LlavaViTPackingModel) and model.config.hidden_size == 384
    assert len(timm.list_models("hf_llava_vit_packing_*_ln")) == 5
