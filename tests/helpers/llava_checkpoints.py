"""Tiny LLaVA checkpoints of any decoder, as training leaves them."""

from __future__ import annotations

import inspect
import json
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import builder_patch  # noqa: F401

# isort: split
import torch
import transformers
from native_host import WORDS, make_prompts
from safetensors.torch import load_file, save_file

from llava_packing_tower.integrations.llava.hosts.llava_next import HOST
from llava_packing_tower.tools.demo.tiny_models import make_tokenizer

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
DECODERS = {
    "Llama": "Llama",
    "Qwen": "Qwen2",
    "Mistral": "Mistral",
    "QwenMoe": "Qwen2Moe",
    "Mixtral": "Mixtral",
    "Gemma": "Gemma",
}
OWN_SIZES: dict[str, dict[str, object]] = {
    "QwenMoe": {
        "num_experts": 3,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
    },
    "Mixtral": {"num_local_experts": 3},
    "Gemma": {"head_dim": 8, "tie_word_embeddings": True},
}


def make_decoder(folder: Path, word: str, **sizes: int) -> Path:
    """A plain decoder with its tokenizer, every tensor another value (also the biases, which start as zeros)."""
    tokenizer = make_tokenizer(folder, make_prompts(), WORDS)
    kind = DECODERS[word]
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=2, **{**SIZES, **OWN_SIZES.get(word, {}), **sizes}
    )
    torch.manual_seed(5)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(folder)
    return folder


def make_llava(decoder: Path, tower: Path, word: str, **arguments: object) -> torch.nn.Module:
    """A LLaVA on a plain decoder with a new projector, as train.py makes it."""
    name = f"Llava{word}ForCausalLM"
    cls = getattr(import_module(f"llava.model.language_model.{HOST.loader_name(name)}"), name)
    # LLaVA-NeXT reads the config by AutoConfig, so that the checkpoint says model_type qwen2.
    model = cls.from_pretrained(decoder, config=transformers.AutoConfig.from_pretrained(decoder))
    if (projector := arguments.pop("mm_packing_projector", None)) is not None:
        model.config.mm_packing_projector = projector
    wanted = {
        "vision_tower": str(tower),
        "mm_vision_select_layer": -1,
        "mm_vision_select_feature": "patch",
        "pretrain_mm_mlp_adapter": None,
        "mm_patch_merge_type": "flat",
        "mm_projector_type": "linear",
        "mm_resampler_type": None,
        "add_faster_video": False,
        **arguments,
    }
    model.get_model().initialize_vision_modules(SimpleNamespace(**wanted))
    model.config.mm_use_im_start_end = model.config.mm_use_im_patch_token = False
    return model


def save_full(model: torch.nn.Module, decoder: Path, folder: Path) -> Path:
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(decoder, use_fast=False).save_pretrained(folder)
    return folder


def save_lora(
    model: torch.nn.Module, decoder: Path, folder: Path, *trained: torch.nn.Module
) -> tuple[Path, dict[str, torch.Tensor]]:
    """A LoRA of the decoder, saved as train.py does it, with the projector and what else is ``trained``; and the
    tensors of the merged model."""
    from peft import LoraConfig, get_peft_model

    train = import_module("llava.train.train")
    model.requires_grad_(False)
    config = LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    config.base_model_name_or_path = str(decoder)
    adapted = get_peft_model(model, config)
    for module in (model.get_model().mm_projector, *trained):
        module.requires_grad_(True)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    state = train.get_peft_state_maybe_zero_3(adapted.named_parameters(), "none")
    extras = train.get_peft_state_non_lora_maybe_zero_3(adapted.named_parameters())
    adapted.config.save_pretrained(folder)
    adapted.save_pretrained(folder, state_dict=state)
    torch.save(extras, folder / "non_lora_trainables.bin")
    merged = adapted.merge_and_unload()
    return folder, {name: p.detach().clone() for name, p in merged.named_parameters()}


def edit(folder: Path, change) -> None:
    """Apply ``change(tensors)`` to a checkpoint of one safetensors file."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    content = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def load(path: str, base: str | None = None, name: str | None = None) -> torch.nn.Module:
    """As the host's scripts do it, on the CPU."""
    builder, utilities = import_module("llava.model.builder"), import_module("llava.mm_utils")
    v1 = "device" in inspect.signature(builder.load_pretrained_model).parameters
    how = {"device": "cpu", "device_map": "cpu"} if v1 else {"attn_implementation": "sdpa", "device_map": {"": "cpu"}}
    name = name or utilities.get_model_name_from_path(path)
    tokenizer, model, processor, _ = builder.load_pretrained_model(path, base, name, **how)
    assert processor is not None and len(tokenizer)
    return model
