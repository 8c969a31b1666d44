"""Every trained weight gets a gradient, or the run stops by its name."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import host_runs
import pytest
import torch
from conftest import assert_close
from families import ALL_FAMILIES, pack, ragged
from torch import nn
from torch.utils.checkpoint import checkpoint

from llava_packing_tower.integrations.llava.gradients import GradientWatch, idle_names, plain_name, refuse_without
from llava_packing_tower.models.llava_vit.standard import LlavaViTModel
from llava_packing_tower.tools.demo.tiny_models import make_tower
from llava_packing_tower.towers.packing_tower import HEVCViTPackingVisionTower

HELPERS = Path(__file__).parents[1] / "helpers"
needs_host = pytest.mark.skipif(
    find_spec("llava") is None or torch.cuda.is_available(), reason="needs a LLaVA and a machine without a GPU"
)

# ---------------------------------------------------------------- checkpoints of blocks


def gradients(model, inputs, wanted, **checkpointing) -> dict[str, torch.Tensor]:
    """Of the weights whose names begin with one of ``wanted``; the others are frozen."""
    model.zero_grad(set_to_none=True)
    model.train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(wanted))
    if checkpointing:
        model.gradient_checkpointing_enable(checkpointing)
    else:
        model.gradient_checkpointing_disable()
    out = model(*inputs)
    out = getattr(out, "last_hidden_state", out)
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.newest
@pytest.mark.parametrize("family", [*ALL_FAMILIES, "llava_vit"])
@pytest.mark.parametrize("wanted", [("encoder.layers.1.",), ("encoder.layers.0.", "encoder.layers.1.")])
def test_blocks_above_frozen_ones_get_their_gradients(golden, family, wanted):
    """The default of transformers 4 is reentrant: its checkpoints gave none, without a word."""
    if family == "llava_vit":
        model = LlavaViTModel.from_pretrained(golden / family)
        inputs = (torch.randn(2, 3, model.config.image_size, model.config.image_size),)
    else:
        model = ALL_FAMILIES[family].from_pretrained(golden / family)
        inputs = pack(model, ragged(model))
    plain = gradients(model, inputs, wanted)
    assert plain and all(gradient is not None and gradient.abs().max() > 0 for gradient in plain.values())
    for reentrant in (True, False):
        again = gradients(model, inputs, wanted, use_reentrant=reentrant)
        assert again.keys() == plain.keys()
        for name, gradient in plain.items():
            assert again[name] is not None, f"{name}, reentrant: {reentrant}"
            assert_close(again[name] / gradient.abs().max(), gradient / gradient.abs().max())


# ---------------------------------------------------------------- the watch


class Branches(nn.Module):
    """A trained block above a frozen one, one that is cut off, experts of which one is asked."""

    def __init__(self):
        super().__init__()
        self.frozen, self.upper, self.cut, self.head = (nn.Linear(3, 3) for _ in range(4))
        self.mlp = nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])})
        self.frozen.requires_grad_(False)

    def forward(self, x, reentrant):
        x = checkpoint(self.upper, self.frozen(x), use_reentrant=reentrant)
        return self.head(x) + self.cut(x).detach() + self.mlp["experts"][0](x)


def test_what_got_no_gradient_is_named():
    torch.manual_seed(0)
    model = Branches()
    watch = GradientWatch(model)
    with pytest.warns(UserWarning, match="None of the inputs"):
        model(torch.randn(2, 3), reentrant=True).sum().backward()
    names = watch.without(model)
    assert names == ["upper.weight", "upper.bias", "cut.weight", "cut.bias"]
    with pytest.raises(RuntimeError, match=r"4 trained tensors got no gradient in the first step: upper.weight, .*fr"):
        refuse_without(names)
    watch = GradientWatch(model)
    model.zero_grad(set_to_none=True)
    model(torch.randn(2, 3), reentrant=False).sum().backward()
    assert watch.without(model) == ["cut.weight", "cut.bias"]
    assert not model.upper.weight._backward_hooks  # nothing stays behind


def test_zeros_are_gradients():
    """Those of a text-only batch, and of the A of a new LoRA."""
    model = nn.Linear(3, 3)
    watch = GradientWatch(model)
    (0 * model(torch.ones(2, 3))).sum().backward()
    assert watch.without(model) == []
    refuse_without([])


def test_blocks_above_the_selected_layer_may_stay_without(tmp_path):
    make_tower(tmp_path / "vit_packing", seed=2)
    model = nn.Module()
    model.vision_tower = HEVCViTPackingVisionTower(str(tmp_path / "vit_packing"), Arguments(-3))
    names = idle_names(model)
    blocks = {int(name.split("layers.")[1][0]) for name in names if "encoder" in name}
    assert blocks == {1, 2} and not any("patch_embed" in name for name in names)
    model.vision_tower = HEVCViTPackingVisionTower(str(tmp_path / "vit_packing"), Arguments(-1))
    assert not any("encoder" in name for name in idle_names(model))
    assert plain_name("a._fsdp_wrapped_module.b") == "a.b"


class Arguments(SimpleNamespace):
    def __init__(self, layer):
        super().__init__(mm_vision_select_layer=layer, mm_projector_type="linear")


# ---------------------------------------------------------------- real trainings

ENGINES = {
    "ddp": [],
    "zero2": ["--deepspeed", "configs/zero2.json"],
    "zero3": ["--deepspeed", "configs/zero3.json"],
    "fsdp": ["--fsdp", "full_shard auto_wrap"],
}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gradients")
    host_runs.make_workspace(folder)
    return folder


def run(workspace, output, words):
    """Two processes as the launcher starts them, with a tower that is cut off from the loss."""
    from llava_packing_tower.train import launcher

    config = workspace / "config.yaml"
    plan = launcher.make_plan(config, [*words, "--output_dir", str(output)], num_processes=2)
    start = plan.command.index(launcher.ENTRY)
    command = [*plan.command[:start], "gradient_worker", *plan.command[start + 1 :]]
    env = {**os.environ, **plan.environment, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return host_runs.execute(command, {**env, "PYTHONPATH": f"{host_runs.REPOSITORY}:{HELPERS}"})


@needs_host
@pytest.mark.timeout(900)
@pytest.mark.parametrize("engine", [pytest.param(e, marks=[pytest.mark.long] * (e != "zero3")) for e in ENGINES])
def test_a_tower_that_gets_no_gradient_stops_the_run(workspace, tmp_path, engine):
    parts = "mm_vision_tower,mm_mlp_adapter,mm_language_model"
    result = run(workspace, tmp_path / "llava_out", [*ENGINES[engine], "--mm_tunable_parts", parts])
    assert result.returncode != 0, result.stdout[-3000:]
    assert "trained tensors got no gradient in the first step: model.vision_tower" in result.stderr
    assert "step 1/" not in result.stdout


@needs_host
@pytest.mark.timeout(900)
@pytest.mark.long
@pytest.mark.parametrize("engine", ["zero3", "fsdp"])
def test_blocks_that_are_not_run_do_not_stop_it(workspace, tmp_path, engine):
    """Where weights are partitioned, those above the selected layer are not tied to the features.

    test_distributed.py has idle blocks under every engine.
    """
    words = ["--mm_vision_select_layer", "-2", "--max_steps", "1", *ENGINES[engine]]
    assert "step 1/1" in host_runs.train(workspace / "config.yaml", tmp_path / "llava_out", "", *words)
