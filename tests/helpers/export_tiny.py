"""A small folder as `llava-packing export` writes one, without a LLaVA, and what a good model of transformers does."""

from __future__ import annotations

from pathlib import Path

import export_samples as samples
import torch
from families import tiny
from native_host import WORDS, make_prompts
from torch import nn

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}USER: {% for p in m.content %}"
    "{% if p.type == 'text' %}{{ p.text }}{% else %}<{{ p.type }}>\n{% endif %}{% endfor %} ASSISTANT:{% endfor %}"
)
NATIVE = {
    "image_aspect_ratio": "native",
    "mm_packing_min_patches": 4,
    "mm_packing_max_patches": 40,
    "mm_newline_position": "grid",
    "mm_patch_merge_type": "spatial_unpad",
    "mm_projector_type": "mlp2x_gelu",
    "mm_reads_videos": True,
}


def make_export(folder: Path, family: str = "llava_vit", width: int = 128) -> Path:
    """Weights are random, and large enough for answers to depend on images. Heads of the decoder are 64 wide, and all
    widths multiples of 64: bitsandbytes takes no others on a CPU."""
    import transformers

    from llava_packing_tower.export.tokenizer import make_tokenizer as with_visual_tokens
    from llava_packing_tower.export.tokenizer import write_tokenizer
    from llava_packing_tower.hf.configuration import LlavaPackingConfig
    from llava_packing_tower.hf.image_processing import LlavaPackingImageProcessor
    from llava_packing_tower.hf.modeling import LlavaPackingForConditionalGeneration
    from llava_packing_tower.tools.demo.tiny_models import make_tokenizer
    from llava_packing_tower.utils.files import write_json

    tower = tiny(family, intermediate_size=128)
    keys = {**NATIVE, "mm_packing_video": "frames" if tower.image_only else "clip"}
    slow = make_tokenizer(folder / "words", make_prompts(), WORDS)
    backend, content, ids = with_visual_tokens(slow, len(slow))
    owner = {"processor_class": "LlavaPackingProcessor"}
    write_tokenizer(folder, backend, {**content, **owner})
    text = transformers.LlamaConfig(
        vocab_size=len(slow),
        hidden_size=width,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=width // 64,
        num_key_value_heads=1,
        bos_token_id=1,
        eos_token_id=2,
    )
    config = LlavaPackingConfig(text.to_dict(), tower.config.to_dict(), *ids, tie_word_embeddings=False, **keys)
    torch.manual_seed(3)
    model = LlavaPackingForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(tower.state_dict())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "vision_tower." not in name and parameter.ndim > 1:
                nn.init.normal_(parameter, std=1.0 if "embed" in name else 0.1)
    model.generation_config.pad_token_id = 0
    model.save_pretrained(folder)
    layout = tower.patch_layout.name.lower()
    time = (tower.frames_per_patch, tower.stretches_clips)
    processor = LlavaPackingImageProcessor(4, 16, layout, *time, size=16, **keys)
    write_json({**processor.to_dict(), **owner}, folder / "preprocessor_config.json")
    write_json(owner, folder / "processor_config.json")
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return folder


# ---------------------------------------------------------------- checks, on any device


def inputs_on(device: str, processor: object, *asked: tuple) -> dict:
    return dict(samples.inputs_of(processor, *asked).to(device))


def a_step(model: nn.Module, inputs: dict) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one training step."""
    model.zero_grad()
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    loss = model(**inputs, labels=labels).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def check_compiled(folder: Path, device: str, backend: str, atol: float) -> None:
    """`model.get_decoder().compile()`: the same answers and gradients, and no graph per size of image."""
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    plain, processor = samples.load(folder)
    compiled, _ = samples.load(folder)
    plain, compiled = plain.to(device), compiled.to(device)
    asked = samples.samples(True)
    compiled.get_decoder().compile(backend=backend, dynamic=True)
    graphs = []
    for sample in (asked[0], asked[1], asked[3], *asked[:2], asked[4], (samples.photographs((12, 55)), "Which?")):
        inputs = inputs_on(device, processor, sample)
        assert samples.answers(compiled, inputs) == samples.answers(plain, inputs), sample
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] > 0 and graphs[-1] == graphs[1], f"graphs after each request: {graphs}"
    graphs = []
    for batch in (asked[:3], asked[3:], asked[1:4]):
        inputs = inputs_on(device, processor, *batch)
        (loss, grads), (expected, wanted) = (a_step(model.train(), inputs) for model in (compiled, plain))
        assert abs(loss - expected) < atol and grads.keys() == wanted.keys() and len(grads) > 40
        for name, grad in grads.items():
            assert (grad - wanted[name]).abs().max() <= atol * max(1, wanted[name].abs().max()), name
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[-1] == graphs[1], f"graphs after each step: {graphs}"


def quantised_layers(model: nn.Module, dequantised) -> dict[str, torch.Tensor]:
    """The weights of quantised linear layers by name, as plain tensors. dequantised: of a layer, or None."""
    found = ((name, dequantised(m)) for name, m in model.named_modules() if isinstance(m, nn.Linear))
    return {name: weight for name, weight in found if weight is not None}


def check_quantised(
    folder: Path, device: str, config: object, dequantised, tolerance: float, kept: tuple[str, ...] = ("lm_head",)
) -> None:
    """Every linear layer of tower, projector and decoder but those ``kept`` is quantised, and what the model says is
    what the values of these weights say: each layer is called, and no block reads plain weights around it."""
    model, processor = samples.load(folder, quantization_config=config, device_map={"": device})
    weights = quantised_layers(model, dequantised)
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert {name.rpartition(".")[2] for name in linear - weights.keys()} == set(kept)
    assert {name.split(".")[1] for name in weights} == {"vision_tower", "mm_projector", "language_model"}
    reference, _ = samples.load(folder)
    reference = reference.float().to(device)
    changed = 0
    for name, weight in weights.items():
        own = reference.get_submodule(name).weight
        changed += not torch.equal(own, weight.float())
        own.data = weight.float().to(device)
    assert changed == len(weights)
    inputs = inputs_on(device, processor, *samples.samples(True))
    with torch.inference_mode():
        wanted, got = reference(**inputs).logits, model(**inputs).logits.float()
    mask = inputs["attention_mask"].bool()
    error = ((got - wanted)[mask].abs().max() / wanted[mask].abs().max()).item()
    assert error <= tolerance, error
    assert len(samples.answers(model, inputs)) == len(samples.samples(True))


def of_torchao(layer: nn.Linear) -> torch.Tensor | None:
    own = type(layer.weight) is not nn.Parameter  # a tensor class of torchao
    return layer.weight.dequantize() if own else None


BITSANDBYTES_KEEPS = ("lm_head", "qkv")
"""By transformers it quantises what is an ``nn.Linear`` and no class that inherits from it."""


def of_bitsandbytes(layer: nn.Linear) -> torch.Tensor | None:
    import bitsandbytes

    if isinstance(layer, bitsandbytes.nn.Linear4bit):
        return bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    if isinstance(layer, bitsandbytes.nn.Linear8bitLt):
        scale = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
        return layer.weight.data.float() * scale[:, None] / 127
    return None
