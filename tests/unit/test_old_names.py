"""Names of modules before 0.2 that the documentation told users to import: they work, with a warning."""

import importlib
import sys

import pytest

from llava_packing_tower._renamed import MOVED, PACKAGE, RENAMED
from llava_packing_tower.models.layers import BlockConfig

# The imports of the page on adding a family, and of the examples in README.
DOCUMENTED = (
    ("encoder", "PackedEncoder"),
    ("families", "register_family"),
    ("families.key_maps", "KeyMap"),
    ("families.key_maps", "carried"),
    ("hosts", "apply"),
    ("hosts", "find_host"),
    ("layers", "BlockConfig"),
    ("layers", "PatchEmbed"),
    ("modeling", "PackedVisionModel"),
    ("packing", "PatchLayout"),
    ("packing", "batch_images_to_packing_input"),
    ("packing", "kept"),
    ("packing", "to_device"),
    ("positions", "grid_positions"),
    ("positions", "prefix_indices"),
    ("tower", "HEVCViTPackingVisionTower"),
    ("variants", "create_model"),
)


@pytest.mark.parametrize(("module", "name"), DOCUMENTED)
def test_documented_names_still_import(module, name, monkeypatch):
    monkeypatch.delitem(sys.modules, f"{PACKAGE}.{module}", raising=False)
    with pytest.warns(DeprecationWarning, match=f"{module} is now"):
        old = importlib.import_module(f"{PACKAGE}.{module}")
    assert callable(getattr(old, name))


def test_names_that_moved_out_of_their_module_lead_to_the_new_ones():
    for module, names in MOVED.items():
        assert module in RENAMED
        old = importlib.import_module(f"{PACKAGE}.{module}")
        for name, place in names.items():
            new, _, attribute = place.partition(":")
            assert getattr(old, name) is getattr(importlib.import_module(f"{PACKAGE}.{new}"), attribute)
        with pytest.raises(AttributeError):
            old.no_such_name  # noqa: B018


def test_old_words_for_the_rotary_form():
    assert BlockConfig(32, 64, 4, "gelu", rotary="pairs") == BlockConfig(32, 64, 4, "gelu", rotary="interleaved")
    assert BlockConfig(32, 64, 4, "gelu", rotary="halves").rotary == "half"
    with pytest.raises(ValueError, match=r"unknown rotary 'quarters'; choose one of interleaved, half"):
        BlockConfig(32, 64, 4, "gelu", rotary="quarters")
