"""The checks of test_saving.py, in a process of one host: ``saving_checks.py FOLDER``. Prints a line for each."""

from __future__ import annotations

import copy
import json
import os
import shutil
import sys
from pathlib import Path

from llava_checkpoints import edit_config, load, make_decoder, make_llava, save_full, save_lora

# isort: split
import torch

from llava_packing_tower.tools.demo.tiny_models import make_tower

NEXT = bool(os.environ.get("LLAVA_NEXT_DIR"))
VALUE = 0.25


def note(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())["mm_packing_config"]


def tuned(decoder: Path, tower: Path) -> torch.nn.Module:
    """A model of which somebody trained the last block of the tower without saying so."""
    model = make_llava(decoder, tower, "Llama")
    block = model.get_vision_tower().vision_tower.encoder.layers[-1]
    block.requires_grad_(True)
    torch.nn.init.constant_(block.mlp.fc2.weight, VALUE)
    return model


def same_tower(model: torch.nn.Module, wanted: torch.nn.Module) -> None:
    here = dict(model.get_vision_tower().named_parameters())
    for name, value in wanted.named_parameters():
        assert torch.equal(here[name].float(), value.to(here[name].dtype).float()), name
    assert (here["vision_tower.encoder.layers.2.mlp.fc2.weight"] == VALUE).all()


def main() -> None:
    root = Path(sys.argv[1])
    decoder, tower = make_decoder(root / "decoder", "Llama"), root / "vit_packing"
    make_tower(tower, seed=2)

    model = tuned(decoder, tower)
    assert model.config.mm_packing_config["weights"] == "folder"  # that is all that the arguments say
    for number, each in enumerate((model, copy.deepcopy(model))):
        folder = save_full(each, decoder, root / f"llava_full_{number}")
        assert note(folder)["weights"] == "checkpoint" and "fingerprint" not in note(folder)
        same_tower(load(str(folder)), model.get_vision_tower())
    print("full")

    model = tuned(decoder, tower)
    model.config.save_pretrained(root / "config_alone")
    assert note(root / "config_alone")["weights"] == "checkpoint"
    model.get_vision_tower().requires_grad_(False)  # frozen again: its folder has not had these weights since
    model.config.save_pretrained(root / "config_alone")
    assert note(root / "config_alone")["weights"] == "checkpoint"
    print("config alone")

    model = make_llava(decoder, tower, "Llama")
    model.requires_grad_(False)
    folder = save_full(model, decoder, root / "llava_frozen")
    assert note(folder)["weights"] == "folder" and note(folder)["folder"] == str(tower.resolve())
    # Values without a mark: in what 34c8e29 wrote, or loaded into a frozen tower.
    model = tuned(decoder, tower)
    model.requires_grad_(False)
    folder = save_full(model, decoder, root / "llava_unmarked")
    assert note(folder)["weights"] == "folder"
    same_tower(load(str(folder)), model.get_vision_tower())
    print("unmarked")

    model = tuned(decoder, tower)
    wanted = copy.deepcopy(model.get_vision_tower())
    trained = model.get_vision_tower().vision_tower.encoder.layers[-1]
    folder, _ = save_lora(model, decoder, root / "runs" / "llava_lora", trained)
    assert note(folder)["weights"] == "checkpoint"
    moved = tower.rename(root / "moved_packing")  # not needed: the checkpoint has the whole tower
    same_tower(load(str(folder), str(decoder)), wanted)
    moved.rename(tower)
    print("lora")

    # A frozen tower of a relative name, as 34c8e29 noted it (without its folder) and as it is noted now.
    project = root / "project"
    shutil.copytree(tower, project / "models" / "tower")  # a packing folder, whatever its name
    os.chdir(project)
    model = make_llava(decoder, Path("models/tower"), "Llama")
    model.requires_grad_(False)
    new = save_full(model, decoder, project / "checkpoints" / "run1")
    old = project / "checkpoints" / "run0"
    shutil.copytree(new, old)
    edit_config(old, mm_packing_config={k: v for k, v in note(old).items() if k != "folder"})
    os.chdir(root)
    for folder in (new, old):
        same = load(str(folder)).get_vision_tower()
        for name, value in model.get_vision_tower().named_parameters():
            assert torch.equal(dict(same.named_parameters())[name].float(), value.to(same.dtype).float()), name
    # Another tower under the same relative name is not taken for it.
    make_tower(root / "models" / "tower", seed=9)
    for folder in (new, old):
        same = load(str(folder)).get_vision_tower()
        value = dict(model.get_vision_tower().named_parameters())["vision_tower.patch_embed.proj.weight"]
        assert torch.equal(same.vision_tower.patch_embed.proj.weight.float(), value.to(same.dtype).float())
    # The folder gone altogether: the checkpoint has the tower's tensors, in the precision in which they were saved.
    shutil.rmtree(root / "models")
    shutil.rmtree(project / "models")
    for folder in (new, old):
        assert load(str(folder)).get_vision_tower().is_loaded
    print("elsewhere")


if __name__ == "__main__":
    main()
