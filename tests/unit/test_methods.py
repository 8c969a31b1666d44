"""One wrapper per method of a LLaVA: the order of its steps, what a step may do, and that it can be taken back."""

from __future__ import annotations

import inspect
from types import ModuleType

import pytest

from llava_packing_tower.integrations.llava import methods
from llava_packing_tower.integrations.llava.methods import STEPS, add_step
from llava_packing_tower.integrations.llava.patcher import Patches

INITIALIZE = "LlavaMetaModel.initialize_vision_modules"
LOAD = "builder.load_pretrained_model"


class Base:
    def __init__(self, size, *, colour="red"):
        self.size, self.colour = size, colour


class LlavaMetaModel(Base):
    def initialize_vision_modules(self, model_args, fsdp=None):
        """What the host says of it."""
        if model_args == "broken":
            raise KeyError(model_args)
        return ["host", model_args, fsdp]


@pytest.fixture
def patches():
    patches = Patches()
    yield patches
    patches.undo()


def noting(log, name):
    def step(call):
        log.append(f"{name} before")
        try:
            yield
        finally:
            log.append(f"{name} after")

    return step


def test_steps_nest_in_the_order_of_the_table_whatever_the_order_in_which_they_were_added(patches):
    log = []
    for name in ("fsdp_tower", "tower_fp32", "native_settings"):
        add_step(LlavaMetaModel, INITIALIZE, name, noting(log, name), patches)
    add_step(LlavaMetaModel, INITIALIZE, "remember_tower", lambda call: log.append("remember_tower"), patches)
    model = LlavaMetaModel(3)
    assert model.initialize_vision_modules("a", fsdp=1) == ["host", "a", 1]
    order = ["tower_fp32 before", "remember_tower", "native_settings before", "fsdp_tower before"]
    order += ["fsdp_tower after", "native_settings after", "tower_fp32 after"]
    assert log == order
    log.clear()
    with pytest.raises(KeyError, match="broken"):
        model.initialize_vision_modules("broken")
    assert log == order


def test_there_is_one_wrapper_which_looks_like_the_host(patches):
    own = LlavaMetaModel.initialize_vision_modules
    for name in STEPS[INITIALIZE]:
        add_step(LlavaMetaModel, INITIALIZE, name, lambda call: None, patches)
    wrapper = LlavaMetaModel.initialize_vision_modules
    assert wrapper.__wrapped__ is own and wrapper.__doc__ == own.__doc__ and wrapper.__qualname__ == own.__qualname__
    assert inspect.signature(wrapper) == inspect.signature(own)
    patches.undo()
    assert LlavaMetaModel.initialize_vision_modules is own


def test_a_step_changes_what_is_given_and_what_comes_back(patches):
    def step(call):
        assert call.arguments == {"model_args": "a"} and call.self.size == 3
        call.arguments["fsdp"] = "changed"
        yield
        call.result = [*call.result, "seen"]

    add_step(LlavaMetaModel, INITIALIZE, "native_settings", step, patches)
    assert LlavaMetaModel(3).initialize_vision_modules("a") == ["host", "a", "changed", "seen"]


@pytest.mark.parametrize("generator", [False, True])
def test_a_step_that_has_the_result_takes_the_place_of_the_host_and_of_the_steps_inside(patches, generator):
    log = []

    def plain(call):
        call.result = None

    def suspended(call):
        call.result = None
        yield
        log.append("after")

    add_step(LlavaMetaModel, INITIALIZE, "tower_fp32", noting(log, "outer"), patches)
    add_step(LlavaMetaModel, INITIALIZE, "remember_tower", suspended if generator else plain, patches)
    add_step(LlavaMetaModel, INITIALIZE, "fsdp_tower", noting(log, "inner"), patches)
    assert LlavaMetaModel(3).initialize_vision_modules("broken") is None
    assert log == ["outer before", *(["after"] if generator else []), "outer after"]


def test_arguments_are_passed_on_as_they_were_given(patches):
    def load_pretrained_model(model_path, model_base, model_name, *rest, **options):
        return model_path, model_base, model_name, rest, options

    builder = ModuleType("builder")
    builder.load_pretrained_model = load_pretrained_model
    seen = []
    add_step(builder, LOAD, "check_loaded", lambda call: seen.append((dict(call.arguments), call.extra)), patches)
    assert builder.load_pretrained_model("p", "b", "n", 1, 2, device="cpu") == (
        "p",
        "b",
        "n",
        (1, 2),
        {"device": "cpu"},
    )
    assert builder.load_pretrained_model("p", model_name="n", model_base=None) == ("p", None, "n", (), {})
    assert seen[0] == ({"model_path": "p", "model_base": "b", "model_name": "n", "device": "cpu"}, (1, 2))
    with pytest.raises(TypeError, match="model_name"):
        builder.load_pretrained_model("p", "b")
    with pytest.raises(TypeError, match="multiple values for argument 'model_path'"):
        builder.load_pretrained_model("p", "b", "n", model_path="q")


@pytest.mark.parametrize(("args", "kwargs"), [(("m",), {}), ((), {"model": "m"})])
def test_an_argument_that_the_host_does_not_take_is_taken_away(patches, args, kwargs):
    class LLaVATrainer:
        def create_optimizer(self):
            return "optimizer"

    taken = []
    step = lambda call: taken.append(call.take("model"))  # noqa: E731
    add_step(LLaVATrainer, "LLaVATrainer.create_optimizer", "optimizer_model", step, patches)
    assert LLaVATrainer().create_optimizer(*args, **kwargs) == "optimizer" and taken == ["m"]
    assert LLaVATrainer().create_optimizer() == "optimizer" and taken[1] is None


def test_an_inherited_method_is_that_of_the_base_class_when_it_is_called(patches, monkeypatch):
    add_step(LlavaMetaModel, "LlavaMetaModel.__init__", "know_model", lambda call: None, patches)
    assert vars(LlavaMetaModel(4, colour="blue")) == {"size": 4, "colour": "blue"}
    monkeypatch.setattr(Base, "__init__", lambda self, size: setattr(self, "other", size))
    assert vars(LlavaMetaModel(4)) == {"other": 4}
    patches.undo()
    assert "__init__" not in vars(LlavaMetaModel)


def test_a_step_that_is_not_in_the_table_is_refused(patches):
    with pytest.raises(ValueError, match=r"no step 'tower_fp64' of LlavaMetaModel.init.*tower_fp32, remember_tower"):
        add_step(LlavaMetaModel, INITIALIZE, "tower_fp64", print, patches)
    with pytest.raises(ValueError, match=r"no step 'x' of Nobody\.does, but nothing"):
        add_step(LlavaMetaModel, "Nobody.does", "x", print, patches)
    with pytest.raises(AttributeError, match="encode_images"):
        add_step(LlavaMetaModel, "LlavaMetaForCausalLM.encode_images", "native_features", print, patches)
    assert not hasattr(LlavaMetaModel.initialize_vision_modules, methods._STEPS)


def test_a_step_replaces_the_one_of_its_name_and_goes_with_its_patches(patches):
    add_step(LlavaMetaModel, INITIALIZE, "native_settings", lambda call: 1 / 0, patches)
    log, others = [], Patches()
    add_step(LlavaMetaModel, INITIALIZE, "native_settings", lambda call: log.append("second"), patches)
    add_step(LlavaMetaModel, INITIALIZE, "fsdp_tower", lambda call: log.append("other"), others)
    model = LlavaMetaModel(3)
    model.initialize_vision_modules("a")
    others.undo()
    model.initialize_vision_modules("a")
    assert log == ["second", "other", "second"]
