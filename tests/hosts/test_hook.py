"""The builder hook: which tower is built, and that the hook takes effect however and whenever it is applied."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import warm
from compat_modules import stand_in_host
from conftest import FIVE
from host_runs import HOSTS

from llava_packing_tower.integrations.llava import methods, tower_builder
from llava_packing_tower.integrations.llava.patcher import Patches
from llava_packing_tower.integrations.llava.registry import find_host
from llava_packing_tower.towers.packing_tower import HEVCViTPackingVisionTower
from llava_packing_tower.utils.import_hooks import ImportHooks

BUILDER = """
import os
class CLIPVisionTower:
    def __init__(self, name, args, **kwargs): self.name, self.kwargs = name, kwargs
def build_vision_tower(vision_tower_cfg, **kwargs):
    name = getattr(vision_tower_cfg, "mm_vision_tower", getattr(vision_tower_cfg, "vision_tower", None))
    if os.path.exists(name) or name.startswith("openai"):
        return CLIPVisionTower(name, vision_tower_cfg, **kwargs)
    raise ValueError(f"Unknown vision tower: {name}")
"""


class StubTower:
    def __init__(self, name, args, delay_load=False):
        self.name, self.delay_load = name, delay_load


@pytest.fixture
def host(tmp_path, monkeypatch, request):
    """A package laid out like LLaVA: its model/__init__.py swallows whatever goes wrong below it."""
    name = "fakellava_" + "".join(c for c in request.node.name if c.isalnum())
    root = tmp_path / name
    files = {
        "__init__.py": "from .model import Model",
        "model/__init__.py": "try:\n    from .llava_arch import Model\nexcept:\n    Model = None",
        "model/llava_arch.py": (
            "from .multimodal_encoder.builder import build_vision_tower\nclass Model:\n    build = build_vision_tower"
        ),
        "model/multimodal_encoder/__init__.py": "",
        "model/multimodal_encoder/builder.py": BUILDER,
    }
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    towers = (("packing", __name__, "StubTower"), ("hevc_vit", "no_such_module", "X"))
    monkeypatch.setattr(tower_builder, "TOWERS", towers)
    hooks, patches = ImportHooks(), Patches()
    hooks.install()
    yield SimpleNamespace(name=name, root=root, hooks=hooks, patches=patches)
    hooks.remove()
    for module in [m for m in sys.modules if m.split(".")[0] == name]:
        del sys.modules[module]


def modules(host):
    importlib.import_module(host.name)
    return (
        sys.modules[f"{host.name}.model.multimodal_encoder.builder"],
        sys.modules[f"{host.name}.model.llava_arch"],
    )


def config(name):
    return SimpleNamespace(mm_vision_tower=name)


@pytest.mark.parametrize("late", [False, True])
def test_both_copies_are_hooked_in_either_order_and_undone(host, late):
    if late:
        originals = [m.build_vision_tower for m in modules(host)]
    tower_builder.install(stand_in_host(host.name), host.hooks, host.patches)
    tower_builder.install(stand_in_host(host.name), host.hooks, host.patches)  # twice is as good as once
    builder, arch = modules(host)
    assert builder.build_vision_tower is arch.build_vision_tower
    for module in (builder, arch):
        assert type(module.build_vision_tower(config("A_Packing_B"))) is StubTower
    host.hooks.remove()
    host.patches.undo()
    for module in (builder, arch):
        function = module.build_vision_tower
        assert not hasattr(function, "_llava_packing_original") and function.__module__ == builder.__name__
    if late:
        assert [builder.build_vision_tower, arch.build_vision_tower] == originals


def test_a_reloaded_builder_is_hooked_again(host):
    tower_builder.install(stand_in_host(host.name), host.hooks, host.patches)
    builder, _ = modules(host)
    importlib.reload(builder)
    assert type(builder.build_vision_tower(config("packing:x"))) is StubTower


@pytest.mark.parametrize("name", ["x_packing", "org/Model-PACKING-l", "packing:org/model", "hevc_vit_packing"])
def test_packing_in_any_case_selects_the_packing_tower(host, name):
    tower_builder.install(stand_in_host(host.name), host.hooks, host.patches)
    _, arch = modules(host)
    tower = arch.build_vision_tower(config(name), delay_load=True)
    assert type(tower) is StubTower and tower.name == name and tower.delay_load is True


def test_a_local_folder_does_not_fall_to_the_rule_that_a_path_means_clip(host, tmp_path):
    tower_builder.install(stand_in_host(host.name), host.hooks, host.patches)
    builder, _ = modules(host)
    folder = tmp_path / "My_Packing_Tower"
    folder.mkdir()
    assert type(builder.build_vision_tower(SimpleNamespace(vision_tower=str(folder)))) is StubTower
    other = folder.rename(tmp_path.parent / "plain_tower_folder")
    if "packing" not in str(other).lower():
        assert type(builder.build_vision_tower(config(str(other)))) is builder.CLIPVisionTower


def test_every_other_name_is_left_to_the_host(host):
    tower_builder.install(stand_in_host(host.name), host.hooks, host.patches)
    builder, _ = modules(host)
    tower = builder.build_vision_tower(config("openai/clip"), delay_load=True)
    assert type(tower) is builder.CLIPVisionTower and tower.kwargs == {"delay_load": True}
    with pytest.raises(ValueError, match="Unknown vision tower: siglip"):
        builder.build_vision_tower(config("siglip"))


def test_a_tower_that_this_version_lacks_is_named_with_what_to_use(host):
    tower_builder.install(stand_in_host(host.name), host.hooks, host.patches)
    builder, _ = modules(host)
    with pytest.raises(ValueError, match="packing:a/HEVC_ViT"):
        builder.build_vision_tower(config("a/HEVC_ViT"))


def test_weights_in_the_checkpoint_are_never_delayed(host):
    tower_builder.install(stand_in_host(host.name), host.hooks, host.patches)
    builder, _ = modules(host)
    cfg = SimpleNamespace(mm_vision_tower="x_packing", mm_packing_config={"weights": "checkpoint"})
    assert builder.build_vision_tower(cfg, delay_load=True).delay_load is False
    cfg.mm_packing_config = {"weights": "folder"}
    assert builder.build_vision_tower(cfg, delay_load=True).delay_load is True


def test_a_failure_of_the_hook_is_seen_although_the_host_swallows_it(host):
    (host.root / "model" / "multimodal_encoder" / "builder.py").write_text("def build_tower(): pass")
    (host.root / "model" / "llava_arch.py").write_text("from .multimodal_encoder import builder\nModel = 1")
    tower_builder.install(stand_in_host(host.name), host.hooks, host.patches)
    with pytest.raises(AttributeError, match="does not have the expected layout"):
        importlib.import_module(host.name)


def test_to_import_the_hook_is_cheap():
    """It is imported by launchers, too: neither torch nor transformers is loaded."""
    code = "import builder_patch, sys; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout.strip() == "[]"


def test_the_table_of_towers_resolves():
    assert tower_builder.tower_class("X/Packing") is HEVCViTPackingVisionTower
    assert tower_builder.tower_class("openai/clip-vit-large-patch14") is None
    assert tower_builder.tower_class(None) is None
    for word, module, cls in tower_builder.TOWERS:
        assert isinstance(getattr(importlib.import_module(module), cls), type), word


# ---------------------------------------------------------------- the real hosts, each in a process of its own

SCRIPT = """
import sys
if {late}:
    import llava.model.llava_arch, llava.train.train, llava.model.builder
    def state():
        arch, train = sys.modules["llava.model.llava_arch"], sys.modules["llava.train.train"]
        builder = sys.modules["llava.model.multimodal_encoder.builder"]
        return {{
            "builder": builder.build_vision_tower,
            "arch": arch.build_vision_tower,
            "initialize": arch.LlavaMetaModel.__dict__["initialize_vision_modules"],
            "arguments": (train.ModelArguments, train.TrainingArguments),
            "trainer": dict(vars(train.LLaVATrainer)),
            "save": train.safe_save_model_for_hf_trainer,
            "load": sys.modules["llava.model.builder"].load_pretrained_model,
            "forward": sys.modules["llava.model"].LlavaLlamaForCausalLM.__dict__["forward"],
        }}
    before = state()
# Only now: libraries that the host imports put finders of their own there, and this package one for its old names.
import llava_packing_tower
path, meta_path = list(sys.path), list(sys.meta_path)
import builder_patch
builder_patch.apply()
import importlib; importlib.reload(builder_patch)
import llava.model.llava_arch as arch, llava.model.multimodal_encoder.builder as builder
from llava_packing_tower.towers.packing_tower import HEVCViTPackingVisionTower
from types import SimpleNamespace
assert arch.build_vision_tower is builder.build_vision_tower
cfg = SimpleNamespace(mm_vision_tower={tower!r}, mm_vision_select_layer=-1)
tower = arch.build_vision_tower(cfg, delay_load=True)
assert type(tower) is HEVCViTPackingVisionTower and not tower.is_loaded, tower
builder_patch.undo()
assert not hasattr(arch.build_vision_tower, "_llava_packing_original")
if {late}:
    after = state()
    assert before == after, [k for k in before if before[k] != after[k]]
    assert sys.meta_path == meta_path
    assert sys.path == path
try:
    arch.build_vision_tower(cfg, delay_load=True)
except Exception as error:
    assert "HEVC" not in str(error), error
builder_patch.apply()
assert type(arch.build_vision_tower(cfg, delay_load=True)) is HEVCViTPackingVisionTower
print("passed")
"""


@pytest.mark.parametrize("next_dir", HOSTS)
@pytest.mark.parametrize("late", [False, True])
def test_real_host(next_dir, late, golden):
    if late and FIVE:
        pytest.skip("without the hook, LLaVA is not imported by transformers 5")
    script = textwrap.dedent(SCRIPT).format(late=late, tower=str(golden / "hevc_packing_tower"))
    environment = {**os.environ, "LLAVA_NEXT_DIR": next_dir}
    if late and next_dir:
        environment["PYTHONPATH"] = next_dir  # imported before the plugin can put it on the path
    result = warm.execute([sys.executable, "-c", script], environment)
    assert result.stdout.strip().endswith("passed"), result.stdout + result.stderr


LAYERS = """
import importlib, os, sys
from types import FunctionType, ModuleType
import builder_patch, llava_packing_tower
from llava_packing_tower.train import callbacks
from llava_packing_tower.integrations.llava import methods
from llava_packing_tower.integrations.llava.patcher import Patches
OURS = os.path.dirname(llava_packing_tower.__file__)
PARTS = ("model.llava_arch", "model", "model.builder", "mm_utils", "train.train", "train.llava_trainer")
sys.argv.append("--fsdp=full_shard")  # the compat patches of FSDP are looked for
builder_patch.apply()
for name in PARTS:
    importlib.import_module(f"llava.{{name}}")
others = Patches()
callbacks.install(sys.modules["llava.train.train"], others)

def functions():
    # Every function of the host's modules, of its classes and of their base classes in transformers.
    owners = {{}}
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == "llava" and isinstance(module, ModuleType):
            classes = [v for v in list(vars(module).values()) if isinstance(v, type)]
            for owner in (module, *classes, *(base for cls in classes for base in cls.__mro__)):
                owners[id(owner)] = owner
    for owner in owners.values():
        for name, value in list(vars(owner).items()):
            if isinstance(value, FunctionType):
                yield owner, name, value

def layers(function):
    count = 0
    while function is not None:
        count += function.__code__.co_filename.startswith(OURS) if isinstance(function, FunctionType) else 0
        function = getattr(function, "__wrapped__", None)
    return count

counts = [(layers(value), owner.__name__, name) for owner, name, value in functions()]
assert (double := [entry for entry in counts if entry[0] > 1]) == [], double
touched = {{name for count, _, name in counts if count}}
for expected in ("initialize_vision_modules", "prepare_inputs_labels_for_multimodal", "load_pretrained_model",
                 "safe_save_model_for_hf_trainer", "_save_checkpoint", "create_optimizer", "build_vision_tower"):
    assert expected in touched, expected
steps = {{name: list(value._llava_packing_steps) for _, name, value in functions()
          if hasattr(value, "_llava_packing_steps")}}
assert {{"remember_tower", "native_settings", "fsdp_tower"}} <= set(steps["initialize_vision_modules"]), steps
assert {{"mark_complete", "lora_extras", "save_what_is_trained"}} <= set(steps["_save_checkpoint"]), steps
others.undo()
builder_patch.undo()
left = [(owner.__name__, name) for owner, name, value in functions() if layers(value)]
assert left == [], left
print("passed")
"""


@pytest.mark.newest
@pytest.mark.parametrize("next_dir", HOSTS)
def test_no_method_of_a_host_is_wrapped_twice(next_dir):
    environment = {**os.environ, "LLAVA_NEXT_DIR": next_dir}
    result = warm.execute([sys.executable, "-c", LAYERS.format()], environment)
    assert result.stdout.strip().endswith("passed"), result.stdout + result.stderr


def test_the_table_of_steps_is_what_is_added():
    added = set()
    for file in Path(methods.__file__).parents[2].rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "add_step":
                added.add(node.args[2].value)
    assert added == {name for steps in methods.STEPS.values() for name in steps}


def test_find_host_names_what_to_install(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match=re.escape("llava-torch==1.2.2.post1")):
        find_host("no_llava_here")
    monkeypatch.setenv("LLAVA_NEXT_DIR", str(tmp_path))
    with pytest.raises(ValueError, match=r"there is no LLaVA that this package knows\. Known are:"):
        find_host()
