"""What a training step's operations are counted as, against torch's own counter and by hand."""

from types import SimpleNamespace

import pytest
import torch
from families import TINY, tiny
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from llava_packing_tower import LlavaViTPackingModel
from llava_packing_tower.models.aimv2 import AIMv2Packing
from llava_packing_tower.multimodal.flops import Flops, decoder_flops, encoder_flops, head_flops, step_flops

pytestmark = pytest.mark.newest
GRIDS = torch.tensor([[1, 3, 5], [1, 2, 1], [1, 4, 6]])
LENGTHS = (15, 2, 24)


def counted(run):
    """Operations that torch counts, by operator."""
    with FlopCounterMode(display=False) as counter:
        run()
    by_operator = {str(name): count for name, count in counter.get_flop_counts()["Global"].items()}
    attention = sum(n for name, n in by_operator.items() if "attention" in name or "bmm" in name)
    return sum(by_operator.values()) - attention, attention


def eager_encoder(model, **config):
    encoder = model(model.config_class(num_hidden_layers=3, num_attention_heads=2, **config)).eval()
    encoder.set_attention_backend("eager")
    return encoder


@pytest.mark.parametrize(
    "model, config",
    [
        (LlavaViTPackingModel, dict(hidden_size=64, intermediate_size=80, use_head=False)),
        (AIMv2Packing, dict(hidden_size=64, intermediate_size=56, is_native=True, use_head=False)),
    ],
)
def test_an_encoder_has_what_torch_counts(model, config):
    encoder = eager_encoder(model, patch_size=2, **config)
    rows = torch.randn(sum(LENGTHS), 3 * 2 * 2)

    def run(layers):
        with torch.no_grad():
            encoder(hidden_states=rows, grid_thw=GRIDS, feature_layers=(layers,))

    # Between two numbers of layers lies what a layer costs: the patch embedding is not counted.
    more, fewer = counted(lambda: run(3)), counted(lambda: run(1))
    ours = encoder_flops(encoder.config, LENGTHS, layers=2)
    assert (ours.linear, ours.attention) == (more[0] - fewer[0], more[1] - fewer[1])
    assert encoder_flops(encoder.config, LENGTHS).forward == pytest.approx(1.5 * ours.forward)


@pytest.mark.parametrize("name", [name for name in TINY if not tiny(name).image_only])
def test_windows_and_slices_of_clips_are_counted_as_they_are_attended(name):
    """Blocks that differ among each other too; the first two and all three."""
    encoder = tiny(name, num_hidden_layers=3)
    encoder.set_attention_backend("eager")
    grids = [(5, 3, 7), (1, 2, 1), (1, 9, 6)]
    lengths = [t * h * w for t, h, w in grids]
    rows = torch.randn(sum(lengths), encoder.patch_dim)

    def run(layers):
        with torch.no_grad():
            encoder(hidden_states=rows, grid_thw=torch.tensor(grids), feature_layers=(layers,))

    nothing = counted(lambda: run(0))
    for layers in (2, 3):
        found = counted(lambda: run(layers))  # noqa: B023
        ours = encoder_flops(encoder.config, lengths, layers, grids)
        assert (ours.linear, ours.attention) == (found[0] - nothing[0], found[1] - nothing[1])


SIZES = dict(vocab_size=53, hidden_size=48, intermediate_size=40, num_hidden_layers=3, num_attention_heads=6)


@pytest.mark.parametrize("key_heads", [1, 3, 6])
@pytest.mark.parametrize("kinds", [(Qwen2Config, Qwen2ForCausalLM), (LlamaConfig, LlamaForCausalLM)])
def test_a_decoder_has_what_torch_counts(kinds, key_heads):
    model = kinds[1](kinds[0](**SIZES, num_key_value_heads=key_heads, attn_implementation="eager"))
    linear = attention = 0
    for length in LENGTHS:
        embeds = torch.randn(1, length, SIZES["hidden_size"], requires_grad=True)
        found = counted(lambda embeds=embeds: model(inputs_embeds=embeds, use_cache=False).logits.sum().backward())
        linear, attention = linear + found[0], attention + found[1]
    decoder, head = decoder_flops(model.config, LENGTHS), head_flops(model.config, sum(LENGTHS))
    # Eager attention computes the whole square, of which a causal decoder asks for half; the angles of the rotary
    # embedding are a product too, in some versions of each layer.
    angles = 8 // 2 * sum(LENGTHS) * 2 * SIZES["num_hidden_layers"]
    assert 3 * (decoder + head).linear == pytest.approx(linear, abs=angles)
    assert 3 * decoder.attention * 2 == pytest.approx(attention, abs=angles)
    assert step_flops(Flops(), decoder, head) == 3 * (decoder + head).forward


def test_a_decoder_whose_heads_are_wider_than_its_hidden_size():
    config = SimpleNamespace(**{**SIZES, "head_dim": 16}, num_key_value_heads=2)
    weights = 48 * 96 + 2 * 48 * 32 + 96 * 48 + 3 * 48 * 40
    assert decoder_flops(config, (5, 2)) == Flops(2 * 7 * weights * 3, 2 * 96 * (25 + 4) * 3)


@pytest.mark.parametrize("tower", [True, False])
@pytest.mark.parametrize("projector", [True, False])
@pytest.mark.parametrize("decoder", [True, False])
def test_frozen_parts_against_torch(tower, projector, decoder):
    """Linear layers in a row, as tower, projector and decoder with its head are: what is frozen has no gradients."""
    parts = [torch.nn.Linear(8, 12, bias=False), torch.nn.Linear(12, 12, bias=False)]
    parts += [torch.nn.Linear(12, 20, bias=False), torch.nn.Linear(20, 7, bias=False)]
    for part, trained in zip(parts, (tower, projector, decoder, decoder)):
        part.requires_grad_(trained)
    if not (tower or projector or decoder):
        return

    def count(layer):
        return Flops(2.0 * layer.in_features * layer.out_features * 11)

    def run():
        torch.nn.Sequential(*parts)(torch.randn(11, 8)).sum().backward()

    flags = dict(tower_trained=tower, projector_trained=projector, decoder_trained=decoder)
    ours = step_flops(count(parts[0]), count(parts[2]), count(parts[3]), **flags)
    # torch counts the projector too; the first layer's input, the pixels, needs no gradient.
    middle = count(parts[1]).step(projector, tower)
    pixels = count(parts[0]).forward if tower else 0
    # The first trained layer behind frozen ones passes no gradient on.
    first = 0 if tower or projector else count(parts[2]).forward if decoder else 0
    first += count(parts[1]).forward if projector and not tower else 0
    assert counted(run)[0] == ours + middle - pixels - first


def test_attention_of_a_frozen_decoder_is_differentiated_in_full():
    part = Flops(linear=100, attention=10)
    assert part.step(True) == 330 and part.step(False) == 230 and part.step(False, differentiated=False) == 110
