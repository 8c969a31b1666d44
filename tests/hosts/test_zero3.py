"""Under ZeRO-3 the layers of known decoders are leaves of DeepSpeed, and nothing is elsewhere."""

from types import SimpleNamespace

import pytest
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from llava_packing_tower.integrations.llava import zero3
from llava_packing_tower.integrations.llava.patcher import Patches

pytestmark = pytest.mark.newest
deepspeed = pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")


SIZES = {"hidden_size": 16, "num_attention_heads": 2, "vocab_size": 11}


def llama():
    return LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=24, num_hidden_layers=3))


def opt():
    return OPTForCausalLM(OPTConfig(**SIZES, ffn_dim=24, num_hidden_layers=2, word_embed_proj_dim=16))


class Wrapped(nn.Module):  # as PEFT does it
    def __init__(self, model):
        super().__init__()
        self.base_model = model

    def get_base_model(self):
        return self.base_model


@pytest.mark.parametrize(
    ("model", "stage", "count"),
    [(llama, 3, 3), (lambda: Wrapped(llama()), 3, 3), (llama, 2, 0), (llama, None, 0), (opt, 3, 0)],
)
def test_the_layers_are_leaves(monkeypatch, model, stage, count):
    from deepspeed.utils import get_z3_leaf_modules

    class LLaVATrainer:
        def __init__(self):
            self.model = model()
            plugin = None if stage is None else SimpleNamespace(zero_stage=stage)
            self.accelerator = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin))

        def train(self):
            return len(get_z3_leaf_modules(self.model))

    monkeypatch.setattr(zero3, "trainer_class", lambda train: LLaVATrainer)
    patches = Patches()
    zero3.gather_by_layer(SimpleNamespace(), patches)
    assert LLaVATrainer().train() == count
    patches.undo()
    assert LLaVATrainer().train() == 0
