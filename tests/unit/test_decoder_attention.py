"""A decoder of transformers on packed rows: what it makes of them besides attention."""

from __future__ import annotations

import contextlib
from importlib.util import find_spec
from unittest import mock

import pytest
import torch
from transformers import LlamaConfig, LlamaModel, MistralConfig, MistralModel, Qwen2Config, Qwen2Model

from llava_packing_tower.integrations.llava.decoder_attention import read_rows, without_mask
from llava_packing_tower.integrations.llava.patcher import Patches
from llava_packing_tower.multimodal.packed_decoder import pack_batch

pytestmark = pytest.mark.newest
SIZES = {"vocab_size": 20, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
LENGTHS = (5, 2, 4)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    ("cls", "config"), [(LlamaModel, LlamaConfig), (Qwen2Model, Qwen2Config), (MistralModel, MistralConfig)]
)
def test_no_mask_is_made_and_none_is_missing(cls, config, attention):
    """transformers 5 looks on the device for samples in one row, before it makes a mask of all by all."""
    model = cls(config(**SIZES, **HEADS, attn_implementation=attention)).train()
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    row = pack_batch(mask, torch.full(mask.shape, -100))
    embeds = torch.randn(1, sum(LENGTHS), 32, generator=torch.Generator().manual_seed(3))
    patches, looks = Patches(), contextlib.nullcontext()
    if find_spec("transformers.masking_utils"):
        name = "transformers.masking_utils.find_packed_sequence_indices"
        looks = mock.patch(name, side_effect=AssertionError, create=True)  # 4.53.0 has none
    read_rows(type(model.layers[0].self_attn), patches)
    try:
        with without_mask(model), looks:
            found = model(inputs_embeds=embeds, position_ids=row.position_ids, use_cache=False)[0][0]
    finally:
        patches.undo()
    assert model.config._attn_implementation == attention
    each = [model(inputs_embeds=part, use_cache=False)[0][0] for part in embeds.split(LENGTHS, dim=1)]
    torch.testing.assert_close(found, torch.cat(each), rtol=1e-4, atol=1e-5)
