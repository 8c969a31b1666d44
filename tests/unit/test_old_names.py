"""Names of before 0.2 still import from where they were, with a warning: all of 34c8e29 but those that are gone."""

import importlib
import json
import sys
from importlib.util import find_spec
from pathlib import Path

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


# ---------------------------------------------------------------- every public name of 34c8e29

NAMES = json.loads((Path(__file__).parents[1] / "made_before" / "public_names.json").read_text())
GONE: dict[str, tuple[str, str]] = {
    "compiling": ("*", "blocks compiled by torch.compile"),
    "linears": ("*", "the compiled path"),
    "rotation_kernel": ("*", "the compiled path"),
    "activations": ("normal_cdf fast_gelu Gelu GeluTanh", "the compiled path"),
    "recording": ("*", "one mechanism of CUDA graphs"),
    "graphs": ("CAPTURE_AT suspended graphs_wanted run_graphed capturing shared_pool", "one mechanism of CUDA graphs"),
    "fused": ("FUSED_KINDS can_be_fused fused_wanted", "decided by models.runtime.execution.make_plan"),
    "attention.recorded_launches": ("*", "flash-attn 4 is called by its public function"),
    "attention.plain": ("*", "attention.flash_attn_functions"),
    "attention.flash_attention_4": ("MOST_SEGMENTS Attention", "flash-attn 4 is called by its public function"),
    "attention.flash_attention_3": ("Attention", "flash-attn 3 is called by its public function"),
    "attention.cudnn": ("Attention", "scaled_dot_product_attention"),
    "cli": ("Command COMMANDS UsageError main", "a package now: cli.main; the command is `llava-packing`"),
    "bench.breakdown": ("kind_of", "renamed in a tool"),
    "commands.eval": ("OURS", "renamed in a tool"),
    "hosts.builder_hook": ("FUNCTION", "tower_builders, a field of Host"),
    "hosts.native_data": ("SKIPS", "no sample takes the place of another"),
    "hosts.inference": ("model_name", "the class is that of `architectures`"),
    "module_state": ("ADAPTERS", "whatever is not plainly ours is foreign"),
}
EVERY_BACKEND = "why_not"  # unsupported_reason now, in all of them


@pytest.mark.parametrize("module", sorted(NAMES))
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_every_public_name_of_before(module):
    if module.startswith("fused.") and module not in ("fused.reference", "fused.functions") and not find_spec("triton"):
        pytest.skip("needs Triton")
    gone = GONE.get(module, ("", ""))[0].split()
    if gone == ["*"]:
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module(f"{PACKAGE}.{module}")
        return
    found = importlib.import_module(f"{PACKAGE}.{module}" if module else PACKAGE)
    if module.startswith("attention."):
        gone.append(EVERY_BACKEND)
    missing = [name for name in NAMES[module].split() if not hasattr(found, name)]
    assert set(missing) <= set(gone), missing
