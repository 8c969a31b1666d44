"""What is saved, and what a checkpoint says of its tower, follows ``requires_grad`` and not the arguments."""

from __future__ import annotations

import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import warm
from host_runs import HOSTS, environment
from torch import nn

from llava_packing_tower.integrations.llava import saving, trainable_parts
from llava_packing_tower.integrations.llava.patcher import Patches
from llava_packing_tower.integrations.llava.restore_frozen import is_cast_of
from llava_packing_tower.tools.demo.tiny_models import make_tower
from llava_packing_tower.towers.packing_tower import HEVCViTPackingVisionTower

HELPERS = Path(__file__).parents[1] / "helpers"


@pytest.mark.skipif(find_spec("llava") is None, reason="no LLaVA is installed")
@pytest.mark.timeout(900)
@pytest.mark.parametrize("next_dir", HOSTS)
def test_what_is_reloaded_is_what_was_trained(tmp_path, next_dir):
    env = {**environment(next_dir), "PYTHONPATH": f"{HELPERS.parents[1]}"}
    result = warm.execute([sys.executable, str(HELPERS / "saving_checks.py"), str(tmp_path)], env)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-5000:]
    assert {"full", "config alone", "unmarked", "lora", "elsewhere"} <= set(result.stdout.split("\n"))


class Model(nn.Module):
    def __init__(self, **trained):
        super().__init__()
        self.embed_tokens = nn.Linear(1, 1)
        self.layers = nn.Linear(1, 1)
        self.mm_projector = nn.Linear(1, 1)
        self.vision_tower = nn.ModuleDict({"vision_tower": nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1)])})
        self.requires_grad_(False)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(any(word.replace("_0", ".0") in name for word in trained))


def trainer_of(model, **arguments):
    return SimpleNamespace(model=model, args=SimpleNamespace(**arguments))


PROJECTOR = {"tune_mm_mlp_adapter": True, "mm_tunable_parts": "mm_mlp_adapter", "use_im_start_end": False}


@pytest.mark.parametrize(
    ("trained", "arguments", "whole"),
    [
        ({"mm_projector": 1}, PROJECTOR, False),
        ({"mm_projector": 1, "vision_tower_0": 1}, PROJECTOR, True),
        ({"mm_projector": 1, "layers": 1}, {**PROJECTOR, "tune_mm_mlp_adapter": False}, True),
        ({"mm_projector": 1, "embed_tokens": 1}, PROJECTOR, True),
        ({"mm_projector": 1, "embed_tokens": 1}, {**PROJECTOR, "use_im_start_end": True}, False),
        ({"mm_projector": 1, "layers": 1}, {**PROJECTOR, "lora_enable": True}, False),
    ],
)
def test_the_projector_alone_is_saved_only_if_nothing_else_is_trained(trained, arguments, whole):
    trainer = trainer_of(Model(**trained), **arguments)
    with saving.saves_what_is_trained(trainer):
        assert trainer.args.tune_mm_mlp_adapter is (arguments["tune_mm_mlp_adapter"] and not whole)
        assert (trainer.args.mm_tunable_parts == "mm_mlp_adapter") is not whole
    assert vars(trainer.args) == arguments


def test_beside_a_lora_the_tower_is_whole_or_absent():
    names = lambda **trained: [name for name, _ in saving.complete_tower(Model(**trained).named_parameters())]  # noqa: E731
    assert names(mm_projector=1) == ["mm_projector.weight", "mm_projector.bias"]
    assert len(names(mm_projector=1, vision_tower_0=1)) == 2 + 4


def test_a_lora_without_deepspeed_goes_on_with_its_projector(tmp_path):
    class Trainer:
        is_deepspeed_enabled = False

        def __init__(self):
            self.model, self.state = Model(mm_projector=1), SimpleNamespace(global_step=4)
            self.args = SimpleNamespace(lora_enable=True, fsdp="", should_save=True, output_dir=str(tmp_path))

        def _save_checkpoint(self, model, trial):
            (tmp_path / "checkpoint-4").mkdir()

        def _load_from_checkpoint(self, resume_from_checkpoint):
            return "loaded"

    patches = Patches()
    saving.resume_extras(Trainer, patches)
    first, second = Trainer(), Trainer()
    first._save_checkpoint(None, None)
    assert second._load_from_checkpoint(str(tmp_path / "checkpoint-4")) == "loaded"
    assert torch.equal(first.model.mm_projector.weight, second.model.mm_projector.weight)
    assert not torch.equal(first.model.layers.weight, second.model.layers.weight)
    second.model.layers.requires_grad_(True)
    with pytest.raises(ValueError, match="2 other trained tensors, for example layers"):
        second._load_from_checkpoint(str(tmp_path / "checkpoint-4"))
    patches.undo()


def test_a_rounded_tensor_is_the_same_one():
    exact = torch.randn(50)
    assert is_cast_of(exact.half(), exact) and is_cast_of(exact.bfloat16().float(), exact)
    assert not is_cast_of(exact + 1e-3, exact) and not is_cast_of(exact[:7], exact)


def test_a_tower_that_the_host_would_not_load_is_said(tmp_path, caplog):
    """LLaVA keeps the tower of the checkpoint that training starts from, whatever the arguments ask for."""
    for name, seed in (("a_packing", 1), ("b_packing", 2)):
        make_tower(tmp_path / name, seed)
    shutil.copytree(tmp_path / "a_packing", tmp_path / "moved_packing")
    first, other, moved = (str(tmp_path / name) for name in ("a_packing", "b_packing", "moved_packing"))
    tower = HEVCViTPackingVisionTower(first, SimpleNamespace(mm_vision_select_layer=-1))
    config = SimpleNamespace(mm_packing_config=tower.packing_config("folder"))
    assert not trainable_parts.is_another_tower(tower, config, f"packing:{first}/")
    assert not trainable_parts.is_another_tower(tower, config, moved)
    assert trainable_parts.is_another_tower(tower, config, other) and f"{other} is not loaded" in caplog.text
    with pytest.raises(ValueError, match="has a Linear, which LLaVA would keep"):
        trainable_parts.is_another_tower(nn.Linear(1, 1), config, first)
    assert not trainable_parts.is_another_tower(nn.Linear(1, 1), config, "openai/clip-vit-large-patch14-336")
