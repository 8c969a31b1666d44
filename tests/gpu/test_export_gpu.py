"""Exports on a GPU: flash attention, quantised weights, a compiled decoder. ``pytest tests/gpu/test_export_gpu.py``.

No LLaVA is needed. The packed tower is fused there, and reads no quantised weights around their layers.
"""

import export_samples as samples
import export_tiny as checks
import pytest
import torch
import transformers

from llava_packing_tower.hf.auto import is_supported

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.skipif(not is_supported(transformers.__version__), reason="exports need transformers 4.57"),
]
DEVICE = "cuda"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return checks.make_export(tmp_path_factory.mktemp("exported"))


def logits_and_grads(model, inputs):
    """Logits at the places of text and images, and the gradients of a training step, float32."""
    mask = inputs["attention_mask"].bool()
    with torch.no_grad():
        logits = model(**inputs).logits[mask].float()
    _, grads = checks.a_step(model, inputs)
    return logits, {name: grad.float() for name, grad in grads.items()}


@pytest.mark.parametrize("family", ["llava_vit", "qwen2_5_vl"])
def test_flash_attention_is_as_good_as_sdpa_in_bfloat16(tmp_path, family):
    """A padded batch: one image, several, none, a video. Twice sdpa's own error against float32."""
    pytest.importorskip("flash_attn")
    folder = checks.make_export(tmp_path, family)
    exact, processor = samples.load(folder)
    inputs = checks.inputs_on(DEVICE, processor, *samples.samples(True))
    wanted, wanted_grads = logits_and_grads(exact.to(DEVICE), inputs)
    made = {}
    for kind in ("sdpa", "flash_attention_2"):
        model = samples.load(folder, attn_implementation=kind, dtype=torch.bfloat16)[0].to(DEVICE)
        logits, grads = logits_and_grads(model, inputs)
        errors = {name: (grads[name] - grad).norm().item() for name, grad in wanted_grads.items()}
        made[kind] = (logits - wanted).norm().item(), errors
        assert len(samples.answers(model, inputs)) == len(samples.samples(True))
    (plain, plain_grads), (flash, flash_grads) = made["sdpa"], made["flash_attention_2"]
    assert 0 < flash <= 2 * plain
    floor = {name: 1e-3 * grad.norm().item() for name, grad in wanted_grads.items()}
    assert [n for n in flash_grads if flash_grads[n] > 2 * plain_grads[n] + floor[n]] == []


def test_a_compiled_decoder(folder):
    checks.check_compiled(folder, DEVICE, "inductor", 1e-4)


def test_generation_compiles_by_itself_with_a_static_cache(folder):
    """transformers compiles the steps of decoding on a GPU; the images are encoded in the first, which is not."""
    model, processor = samples.load(folder)
    model = model.to(DEVICE)
    for sample in samples.samples(True)[:2]:  # each length of a cache is compiled
        inputs = checks.inputs_on(DEVICE, processor, sample)
        assert samples.answers(model, inputs, cache_implementation="static") == samples.answers(model, inputs)


@pytest.mark.parametrize(("bits", "tolerance"), [(4, 0.05), (8, 0.2)])  # with 8 bits activations are rounded, too
def test_bitsandbytes(folder, bits, tolerance):
    pytest.importorskip("bitsandbytes")
    config = transformers.BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    checks.check_quantised(folder, DEVICE, config, checks.of_bitsandbytes, tolerance, checks.BITSANDBYTES_KEEPS)


def test_torchao(folder):
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig

    config = transformers.TorchAoConfig(Int8WeightOnlyConfig())
    checks.check_quantised(folder, DEVICE, config, checks.of_torchao, 1e-3)


def test_device_map_auto_puts_it_on_the_gpu(folder):
    model, processor = samples.load(folder, device_map="auto")
    assert {p.device.type for p in model.parameters()} == {"cuda"}
    inputs = checks.inputs_on(DEVICE, processor, *samples.samples(True))
    plain = samples.load(folder)[0].to(DEVICE)
    assert samples.answers(model, inputs) == samples.answers(plain, inputs)
