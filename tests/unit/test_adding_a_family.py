"""A fifth family, from outside the package: the code on the page docs/adding_a_family.md, as it stands there."""

import importlib
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import assert_close
from families import pack, per_image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from toy_vit import HEADS, PATCH, WIDTH, publish

from llava_packing_tower import HEVCViTPackingVisionTower, models, register_family
from llava_packing_tower.cli.main import main
from llava_packing_tower.models import registry
from llava_packing_tower.models.registry import FAMILIES, family_for

pytestmark = pytest.mark.newest
PAGE = Path(__file__).parents[2] / "docs" / "adding_a_family.md"
MODULE, D, P = "a_users_toy_vit", WIDTH, PATCH
GRIDS = ((3, 5), (1, 7), (5, 3), (3, 5))


@pytest.fixture
def module(tmp_path, monkeypatch):
    """The page's first block of Python as a module of the user's; nothing of the package is changed."""
    code = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL).group(1)
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / f"{MODULE}.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setattr(registry, "FAMILIES", dict(FAMILIES))
    yield MODULE
    sys.modules.pop(MODULE, None)


@pytest.fixture
def toy(module):
    for model_type in ("toy_vit", "toy_vit_packing"):
        register_family(model_type, f"{module}:ToyViTPacking")
    return importlib.import_module(module).ToyViTPacking


def test_every_public_name_of_models_is_there():
    for name in models.__all__:
        assert getattr(models, name).__name__ == name


@pytest.fixture
def published(tmp_path):
    return publish(tmp_path / "published")


def plain(w, image):
    """The same network for one image, without anything of this package."""

    def linear(name, x):
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(name, x):
        return F.layer_norm(x, (D,), w[f"{name}.weight"], w[f"{name}.bias"], eps=1e-6)

    x = F.conv2d(image[None], w["stem.weight"], w["stem.bias"], stride=P)[0]
    rows, columns = w["rows.weight"][: x.shape[1]], w["columns.weight"][: x.shape[2]]
    x = (x.permute(1, 2, 0) + rows[:, None] + columns[None]).flatten(0, 1)
    for block in ("blocks.0", "blocks.1"):
        y = norm(f"{block}.norm1", x)
        q, k, v = (linear(f"{block}.attn.{part}", y).unflatten(-1, (HEADS, -1)).transpose(0, 1) for part in "qkv")
        y = (torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1) @ v).transpose(0, 1).flatten(1)
        x = x + linear(f"{block}.attn.out", y)
        x = x + linear(f"{block}.mlp.fc2", linear(f"{block}.mlp.fc1", norm(f"{block}.norm2", x)).relu())
    return norm("norm", x)


def images():
    return [torch.randn(3, h * P, w * P) for h, w in GRIDS]


def test_packed_equals_the_plain_network_and_trains(toy, published):
    model, weights = toy.from_pretrained(published), load_file(published / "model.safetensors")
    batch = images()
    outputs = per_image(model, batch)
    for image, out in zip(batch, outputs):
        assert_close(out, plain(weights, image))
    sum(out.square().sum() for out in outputs).backward()
    assert all(p.grad.abs().max() > 0 for name, p in model.named_parameters())


def test_one_file_brings_the_rest(toy, published, tmp_path):
    """Strict loading, errors, saving, checkpointing, the tower in LLaVA's hands: nothing of it is the family's."""
    model = toy(ckpt=published, device="cpu")
    batch = images()
    rows, grid = pack(model, batch)
    expected = model(rows, grid, output_hidden_states=True)[1]
    with pytest.raises(ValueError, match=r"images only \(t = 1\)"):
        model(rows, torch.tensor([[2, len(rows) // 2, 1]]))
    with pytest.raises(ValueError, match="image 1 has 1 x 9 patches, this model knows 8 x 8"):
        per_image(model, [batch[0], torch.zeros(3, P, 9 * P)])
    model.train().gradient_checkpointing_enable()
    assert torch.equal(model(rows, grid), model.eval()(rows, grid))

    model.save_pretrained(tmp_path / "toy_packing")
    for where in (f"packing:{published}", str(tmp_path / "toy_packing")):
        tower = HEVCViTPackingVisionTower(where, SimpleNamespace(mm_vision_select_layer=-2))
        assert type(tower.vision_tower) is toy
        assert (tower.hidden_size, tower.num_patches_per_side, tower.image_size) == (D, 8, 32)
        assert torch.equal(torch.cat(tower(batch)), expected[-2])
    saved = json.loads(json.dumps(tower.packing_config()))
    rebuilt = HEVCViTPackingVisionTower("gone", SimpleNamespace(mm_vision_select_layer=-2, mm_packing_config=saved))
    rebuilt.load_state_dict(tower.state_dict())
    assert torch.equal(torch.cat(rebuilt(batch)), expected[-2])

    weights = load_file(published / "model.safetensors")
    del weights["blocks.1.attn.k.bias"]
    save_file(weights, published / "model.safetensors")
    with pytest.raises(ValueError, match=r"(?s)1 missing.*blocks\.1\.attn\.k\.bias"):
        toy.from_pretrained(published)


def test_align_says_what_is_missing(toy, published, capsys):
    assert main(["align", "--ckpt", str(published), "--device", "cpu"]) == 2
    assert "transformers has no model to compare toy_vit_packing with" in capsys.readouterr().err


def test_entry_point_of_an_installed_package(module, published, tmp_path, monkeypatch):
    """A package of the user's names its family in its metadata; the package's own names are not replaced."""
    with pytest.raises(ValueError, match="no packed encoder for model_type 'toy_vit'; known: llava_vit_packing"):
        family_for("toy_vit")
    info = tmp_path / "site" / "a_users_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: a-users-package\nVersion: 1.0\n")
    lines = [f"toy_vit = {module}:ToyViTPacking", "siglip2 = nowhere:X"]
    (info / "entry_points.txt").write_text("\n".join(["[llava_packing_tower.families]", *lines]))
    importlib.invalidate_caches()
    registry.add_installed()
    assert family_for("toy_vit").from_pretrained(published).config.hidden_size == D
    assert family_for("siglip2").__name__ == "Siglip2NaflexPacking"
