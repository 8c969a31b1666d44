"""A host whose package, modules, classes and builders have names of their own: all of the hook gets there."""

from __future__ import annotations

import importlib
import sys
from types import SimpleNamespace

import pytest
import torch

from llava_packing_tower.integrations.llava import install, registry, tower_builder
from llava_packing_tower.integrations.llava.host import Host, Part, TowerBuilder
from llava_packing_tower.tools.demo.tiny_models import make_tower
from llava_packing_tower.towers.packing_tower import HEVCViTPackingVisionTower

pytestmark = pytest.mark.newest
FILES = {
    "outer/__init__.py": "",
    "outer/other/__init__.py": "from . import models",
    "outer/other/models/__init__.py": "from .body import OtherLlama",
    "outer/other/models/body.py": """
        from torch import nn
        from .encoder import make_tower
        IMAGE_TOKEN_INDEX = -200
        class OtherModel:
            def __init__(self, config):
                self.config = config
            def initialize_vision_modules(self, model_args, fsdp=None):
                self.tower = make_tower(model_args.vision_tower, model_args, delay_load=False)
            def get_vision_tower(self):
                return getattr(self, "tower", None)
        class OtherMixin:
            def prepare_inputs_labels_for_multimodal(
                self, input_ids, attention_mask, past_key_values, labels, images=None
            ):
                return input_ids, attention_mask, past_key_values, self.encode_images(images), labels
            def encode_images(self, images): return images
        class OtherLlama(OtherMixin):
            def generate(self): return self.config.tokenizer_padding_side
            def save_pretrained(self): return "saved"
    """,
    "outer/other/models/encoder.py": "def make_tower(tower, settings, **kwargs): return ('own', tower, kwargs)",
    "outer/other/models/projector.py": "def make_projector(config): return 'own projector'",
    "outer/other/models/load.py": """
        def load_it(model_path, model_base, model_name): return None, None, None, model_path
    """,
    "outer/other/run.py": """
        from dataclasses import dataclass
        from .trainers import OtherTrainer
        IMAGE_TOKEN_INDEX = -200
        @dataclass
        class ModelArguments: pass
        @dataclass
        class DataArguments: pass
        @dataclass
        class TrainingArguments: unfreeze_mm_vision_tower: bool = False
        class OtherDataset:
            data_args = None
            def __init__(self): self.list_data_dict = [{"image": None}]
            def __getitem__(self, i): return self.list_data_dict[i]
        def make_supervised_data_module(tokenizer, data_args): pass
        def safe_save_model_for_hf_trainer(trainer, output_dir): return output_dir
        def get_peft_state_non_lora_maybe_zero_3(named_params, require_grad_only=True): return list(named_params)
        def train(): pass
    """,
    "outer/other/trainers.py": """
        from transformers import Trainer
        class OtherTrainer(Trainer): pass
    """,
    "outer/other/tools.py": "def get_model_name_from_path(model_path): return model_path",
}
HOST = Host(
    name="other",
    title="Other",
    package="outer.other",
    recognises=lambda root: (root / "models" / "body.py").is_file(),
    install="nowhere",
    arch="models.body",
    meta_model="OtherModel",
    mixin="OtherMixin",
    tower_builders=(TowerBuilder("models.encoder", "make_tower", config="settings", tower="tower"),),
    projector_builder=Part("models.projector", "make_projector"),
    models="models",
    language_models="models",
    loader=Part("models.load", "load_it", ("model_path", "model_base", "model_name")),
    train="run",
    dataset="OtherDataset",
    trainer=Part("trainers", "OtherTrainer"),
    mm_utils="tools",
    refused=(("run_dpo", "it never works"),),
)


@pytest.fixture
def other(tmp_path, monkeypatch):
    """The host, importable and known."""
    for name, text in FILES.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join(line.removeprefix(" " * 8) for line in text.split("\n")))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delenv("LLAVA_NEXT_DIR", raising=False)
    monkeypatch.setattr(registry, "all_hosts", lambda: (HOST,))
    install.undo()
    install.apply()
    yield lambda name: importlib.import_module(f"outer.other.{name}")
    install.undo()
    for name in [name for name in sys.modules if name.split(".")[0] == "outer"]:
        del sys.modules[name]


def steps(function):
    return set(getattr(function, "_llava_packing_steps", ()))


def test_every_method_has_its_steps(other):
    body, run, load = other("models.body"), other("run"), other("models.load")
    assert registry.host_of(body) is HOST and registry.host_of_model(body.OtherLlama()) is HOST
    assert {"remember_tower", "native_settings"} <= steps(body.OtherModel.initialize_vision_modules)
    assert {"blank_images", "native_images"} <= steps(body.OtherMixin.prepare_inputs_labels_for_multimodal)
    assert steps(body.OtherLlama.generate) == {"pad_left"} and steps(body.OtherLlama.save_pretrained)
    assert {"class_by_architectures", "check_loaded"} <= steps(load.load_it)
    assert {"tune_parts"} <= steps(run.OtherTrainer.__init__) and steps(run.OtherTrainer.training_step)
    assert run.OtherDataset().list_data_dict == [{}]
    assert "mm_packing_attention" in run.ModelArguments.__dataclass_fields__
    # An argument that the host has in another group is not added a second time.
    assert "unfreeze_mm_vision_tower" not in run.ModelArguments.__dataclass_fields__
    assert "_llava_packing_original" in vars(other("tools").get_model_name_from_path)
    assert "_llava_packing_original" in vars(other("models.projector").make_projector)
    install.undo()
    assert not steps(body.OtherModel.initialize_vision_modules) and not steps(load.load_it)
    assert "_llava_packing_original" not in vars(other("tools").get_model_name_from_path)


def test_tokens_are_counted_where_no_positions_are_returned(other, monkeypatch):
    """Its ``prepare_inputs_labels_for_multimodal`` returns five things, as GeoChat's does."""
    from llava_packing_tower.integrations.llava import speed

    counted = []
    meter = SimpleNamespace(current=1, count_tokens=lambda *given: counted.append(given))
    monkeypatch.setattr(speed, "_running", meter)
    ids, mask = torch.tensor([[1, -200, 5], [6, 7, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    embeds, labels = torch.zeros(2, 3, 4), torch.tensor([[-100, -100, 5], [6, 7, -100]])
    mixin = other("models.body").OtherMixin()
    step = type(mixin).prepare_inputs_labels_for_multimodal._llava_packing_steps["count_tokens"]
    given = {"input_ids": ids, "attention_mask": mask}
    list(step(SimpleNamespace(arguments=given, result=(None, mask, None, embeds, labels))))
    ((words, tokens, found),) = counted
    assert words.tolist() == [[True, False, True], [True, True, False]]
    assert tokens.tolist() == mask.bool().tolist() and found is labels


def test_the_builder_is_called_by_the_names_of_its_own_arguments(other, tmp_path):
    folder = tmp_path / "a_packing"
    make_tower(folder, seed=1)
    body = other("models.body")
    args = SimpleNamespace(vision_tower=str(folder), mm_vision_select_layer=-1)
    model = body.OtherModel(SimpleNamespace())
    model.initialize_vision_modules(args)
    assert type(model.tower) is HEVCViTPackingVisionTower and model.tower.is_loaded
    assert model.config.mm_packing_config["weights"] == "folder"
    given = SimpleNamespace()
    assert body.make_tower("openai/clip", given, x=1) == ("own", "openai/clip", {"x": 1})
    assert body.make_tower(settings=given, tower="openai/clip") == ("own", "openai/clip", {})


def test_settings_that_a_host_does_not_have(tmp_path):
    make_tower(tmp_path / "a_packing", seed=1)
    builder = TowerBuilder("m", "build", config="cfg", defaults=(("mm_vision_select_layer", -3),))
    build = tower_builder.hooked(lambda cfg, **kwargs: "own", builder)
    for given, expected in (({}, -3), ({"mm_vision_select_layer": -1}, -1)):
        config = SimpleNamespace(mm_vision_tower=str(tmp_path / "a_packing"), **given)
        assert build(config).select_layer == expected == config.mm_vision_select_layer
    other = SimpleNamespace(mm_vision_tower="clip")
    assert build(other) == "own" and not hasattr(other, "mm_vision_select_layer")


def test_a_list_of_towers_has_ours_among_its_own(tmp_path):
    make_tower(tmp_path / "a_packing", seed=1)
    builder = TowerBuilder("m", "build", config="cfg", settings=("mm_list", "list"), lengths=("mm_lens", "lens"))
    build = tower_builder.hooked(lambda cfg, **kwargs: [(cfg.list, cfg.lens, kwargs)], builder)
    names = ["clip", str(tmp_path / "a_packing"), "dino"]
    given = SimpleNamespace(list=names, lens=[576, 64, 256], mm_vision_select_layer=-1)
    first, tower, last = build(given, delay_load=True)
    assert (first, last) == ((["clip"], [576], {"delay_load": True}), (["dino"], [256], {"delay_load": True}))
    assert type(tower) is HEVCViTPackingVisionTower and given.list is names
    given.lens = [576, 65, 256]
    with pytest.raises(ValueError, match="has 64 tokens, not 65"):
        build(given)


def test_what_it_refuses_is_refused(other):
    from llava_packing_tower.integrations.llava import refused

    assert refused.refused("outer.other.run") is None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(refused, "all_hosts", registry.all_hosts)
        assert refused.refused("outer.other.run_dpo") == "it never works"
        assert refused.refused("/somewhere/outer/other/run_dpo.py") == "it never works"
        assert refused.refused("/somewhere/other/run_dpo.py") is None


def test_a_module_of_no_host_is_named():
    with pytest.raises(ValueError, match="module torch belongs to no LLaVA"):
        registry.host_of(torch)
