"""The models of the benchmark, with random weights: stock LLaVA-NeXT, ours, and a decoder of a larger model's layers.

They are initialized where they run: on a CPU that takes most of a run's time.
"""

from __future__ import annotations

import contextlib
import importlib.util
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from ....data.image_processor import PackingImageProcessor
from ....models.llava_vit.packed import LlavaViTPackingModel
from ....utils import environment
from .photos import GRIDS, PATCH

FULL = {
    "tile": 336,
    "scale": 1.0,
    "words": (40, 60),
    "tower": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
    "decoder": {  # Qwen2-0.5B
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
    },
    "wide": {  # four layers of Qwen2-7B
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 4,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
    },
}
_TINY_DECODER = {
    "vocab_size": 200,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}
TINY = {
    "tile": 56,
    "scale": 1 / 6,
    "words": (5, 7),
    "tower": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2},
    "decoder": _TINY_DECODER,
    "wide": {**_TINY_DECODER, "hidden_size": 96, "intermediate_size": 160, "num_attention_heads": 4},
}


def host_classes() -> tuple[str, type, type]:
    """Name, config and model class of the host: LLaVA-NeXT, llavaction or LLaVA 1.x."""
    if environment.clone():
        from llava.model.language_model.llava_qwen import LlavaQwenConfig, LlavaQwenForCausalLM

        return "LLaVA-NeXT (LlavaQwenForCausalLM)", LlavaQwenConfig, LlavaQwenForCausalLM
    if importlib.util.find_spec("llavaction"):
        from llavaction.model.language_model.llava_qwen import LlavaQwenConfig, LlavaQwenForCausalLM

        return "llavaction (LlavaQwenForCausalLM)", LlavaQwenConfig, LlavaQwenForCausalLM
    from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM

    return "llava-torch (LlavaLlamaForCausalLM)", LlavaConfig, LlavaLlamaForCausalLM


def decoder_attention(device: torch.device) -> str:
    """What transformers computes a padded batch with: flash-attn 2 where it is installed."""
    from transformers.utils import is_flash_attn_2_available

    return "flash_attention_2" if device.type == "cuda" and is_flash_attn_2_available() else "sdpa"


@contextlib.contextmanager
def _built_on(device: torch.device) -> Iterator[Path]:
    """Within it, modules and their random weights are made on the device. Yields an empty folder."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder, torch.device(device):
        yield Path(folder)


def _llava(size: dict, part: str, tower: Path, layer: int, width: int, device: torch.device, **more: object):
    _, config_class, model_class = host_classes()
    tile = size["tile"]
    config = config_class(
        **size[part],
        attn_implementation=decoder_attention(device),
        mm_vision_tower=str(tower),
        mm_hidden_size=width,
        mm_vision_select_layer=layer,
        mm_vision_select_feature="patch",
        mm_projector_type="mlp2x_gelu",
        mm_patch_merge_type="spatial_unpad",
        unfreeze_mm_vision_tower=True,
        image_aspect_ratio="anyres",
        image_grid_pinpoints=[[w * tile, h * tile] for w, h in GRIDS],
        tokenizer_model_max_length=size[part]["max_position_embeddings"],
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        **more,
    )
    return model_class(config)


def _finished(model: nn.Module, device: torch.device) -> nn.Module:
    with torch.no_grad():
        model.get_model().image_newline.normal_(std=0.02)  # LLaVA leaves it uninitialized
    return model.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32).requires_grad_(True)


def build_stock(size: dict, device: torch.device) -> nn.Module:
    """LLaVA's class with its own CLIP tower."""
    tile, dtype = size["tile"], torch.bfloat16 if device.type == "cuda" else torch.float32
    with _built_on(device) as folder:
        tower = folder / "clip-vit-large-patch14-336"
        config = CLIPVisionConfig(**size["tower"], image_size=tile, patch_size=PATCH, projection_dim=768)
        CLIPVisionModel(config).to(dtype).save_pretrained(tower)
        sides = {"size": {"shortest_edge": tile}, "crop_size": {"height": tile, "width": tile}}
        CLIPImageProcessor(**sides).save_pretrained(tower)
        model = _llava(size, "decoder", tower, -2, size["tower"]["hidden_size"], device)
        if not model.get_vision_tower().is_loaded:
            model.get_vision_tower().load_model()
    return _finished(model, device)


def build_packed(size: dict, device: torch.device, part: str = "decoder") -> nn.Module:
    """LLaVA's class with a packing tower of the same size.

    part: ``decoder``, or ``wide`` for the layers of a larger one, whose tower is a tiny one that nobody runs.
    """
    fields = size["tower"] if part == "decoder" else TINY["tower"]
    with _built_on(device) as folder:
        tower = folder / "vit_packing"
        # Without a head: LLaVA reads hidden states before it.
        config = LlavaViTPackingModel.config_class(image_size=size["tile"], patch_size=PATCH, use_head=False, **fields)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        LlavaViTPackingModel(config).to(dtype).save_pretrained(tower)
        PackingImageProcessor(size=size["tile"]).save_pretrained(tower)
        model = _llava(size, part, tower, -1, fields["hidden_size"], device)
    return _finished(model, device)


def build_lora(size: dict, device: torch.device) -> nn.Module:
    """:func:`build_packed` with a LoRA on the decoder's layers, by peft, of the size in LLaVA's finetune_lora.sh."""
    from peft import LoraConfig, get_peft_model

    model = build_packed(size, device)
    torch.manual_seed(0)
    rank = 128 if size is FULL else 4
    layers = r"model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj"
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, lora_dropout=0.05, target_modules=layers, bias="none", task_type="CAUSAL_LM"
    )
    get_peft_model(model, config)  # changes the model itself; LLaVA's class goes on being called
    return model.to(device, model.dtype)


def set_checkpointing(model: nn.Module, on: bool) -> None:
    if on:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return
    model.gradient_checkpointing_disable()
    for module in model.modules():  # the tower is no submodule that transformers would reach in every version
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = False


PARTS = ("tower", "projector", "decoder")
ADAPTERS = "adapters"
"""What trains of a decoder with a LoRA, in place of its own weights."""


def train_parts(model: nn.Module, parts: tuple[str, ...]) -> None:
    """Let gradients be computed for these of PARTS, or for ADAPTERS, alone."""
    tower = {id(p) for p in model.get_vision_tower().parameters()}
    inner = model.get_model()
    projector = {id(p) for p in inner.mm_projector.parameters()} | {id(inner.image_newline)}
    adapters = {id(p) for name, p in model.named_parameters() if "lora_" in name}
    for parameter in model.parameters():
        part = "tower" if id(parameter) in tower else "projector" if id(parameter) in projector else "decoder"
        parameter.requires_grad_((ADAPTERS if id(parameter) in adapters else part) in parts)


def weight_bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())
