"""transformers' own tests of a model (``ModelTesterMixin``), run on every family from a checkout of transformers.

``TRANSFORMERS_DIR`` names the checkout; it must be of the installed version. What fails, and why, is listed in
``docs/transformers_tests.md``: those tests are expected to fail here, and one that passes unexpectedly is an error.
"""

import os
import sys
import unittest
from pathlib import Path

import pytest
import torch
from families import TINY, pack, ragged, tiny

pytestmark = pytest.mark.newest
CHECKOUT = os.environ.get("TRANSFORMERS_DIR")
if not CHECKOUT:
    pytest.skip("TRANSFORMERS_DIR names no checkout of transformers", allow_module_level=True)
if not (Path(CHECKOUT) / "tests/test_modeling_common.py").is_file():
    pytest.skip(f"{CHECKOUT} has no tests/test_modeling_common.py", allow_module_level=True)
sys.path.insert(0, CHECKOUT)
common = pytest.importorskip("tests.test_modeling_common")


PLAIN = "the families but LlavaViT return tensors, not a ModelOutput"
STRICT = "loading is strict: a file without all tensors, or a state_dict in place of a file, is refused"
FAILS = {
    "test_batching_equivalence": "a packed batch has no batch dimension that a sample could be cut from",
    "test_hidden_states_output": PLAIN,
    "test_retain_grad_hidden_states_attentions": PLAIN,
    "test_model_outputs_equivalence": PLAIN,
    "test_from_pretrained_no_checkpoint": STRICT,
    "test_model_weights_reload_no_missing_tied_weights": STRICT,
    "test_cannot_load_with_meta_device_context_manager": "it can: weights go where device= or device_map= says",
    "test_gradient_checkpointing_enable_disable": "the encoder checkpoints its blocks itself, without the base class",
}
"""What fails, and why: the list of ``docs/transformers_tests.md``."""


class Tester:
    """What the mixin asks for: small configs and inputs, here a packed batch of ragged images."""

    num_hidden_layers = 2
    hidden_size = 64
    num_attention_heads = 2
    is_training = False  # an encoder has no loss of its own; it is trained in other tests

    def __init__(self, name: str) -> None:
        self.name = name

    def get_config(self):
        return tiny(self.name).config

    def prepare_config_and_inputs_for_common(self):
        model = tiny(self.name)
        rows, grid = pack(model, ragged(model))
        self.batch_size, self.seq_length = len(grid), len(rows)
        return model.config, {"hidden_states": rows, "grid_thw": grid}


class Common:
    """Tests of every family. (Inside of a class, so that the mixin is not collected on its own.)"""

    class OfFamily(common.ModelTesterMixin):
        family = ""
        test_resize_embeddings = False
        has_attentions = False  # no map of attention weights is ever made

        def setUp(self) -> None:
            self.model_tester = Tester(self.family)
            self.all_model_classes = (TINY[self.family][0],)

        def test_model_get_set_embeddings(self) -> None:
            model = tiny(self.family)  # as transformers' own vision models have it: no Embedding, no output
            self.assertIs(model.get_input_embeddings(), model.patch_embed)
            self.assertIsNone(model.get_output_embeddings())

        def test_config(self) -> None:
            configuration = pytest.importorskip("tests.test_configuration_common")
            cls = self.all_model_classes[0].config_class
            configuration.ConfigTester(self, config_class=cls, has_text_modality=False).run_common_tests()

        def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
            return {key: value.clone() if torch.is_tensor(value) else value for key, value in inputs_dict.items()}


def _expected(name: str):
    """A test of the mixin, marked with the reason for which it fails."""

    def test(self):
        getattr(common.ModelTesterMixin, name)(self)

    test.__name__ = name
    return pytest.mark.xfail(reason=FAILS[name], strict=True)(test)


for _family in TINY:
    _names = [n for n in FAILS if not (_family == "llava_vit" and FAILS[n] == PLAIN)]
    _methods = {n: _expected(n) for n in _names}
    _own = {"family": _family, "all_model_classes": (TINY[_family][0],), **_methods}
    globals()[f"Test_{_family}"] = type(f"Test_{_family}", (Common.OfFamily, unittest.TestCase), _own)
