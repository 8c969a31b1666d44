"""MoE-LLaVA: Video-LLaVA's towers, and decoders with experts. Those have loading code of their own, for DeepSpeed."""

from __future__ import annotations

from dataclasses import replace

from ..host import Part
from .videollava import HOST as VIDEO_LLAVA

HOST = replace(
    VIDEO_LLAVA,
    name="moellava",
    title="MoE-LLaVA",
    package="moellava",
    install="git clone https://github.com/PKU-YuanGroup/MoE-LLaVA and set LLAVA_DIR to the clone",
    image_projector="image_spatial_proj",
    projector_builder=Part("model.multimodal_projector.builder", "build_image_projector"),
    decoders=(
        ("llama", "Llama"),
        ("qwen2", "Qwen1_5"),
        ("qwen", "QWen"),
        ("mistral", "Mistral"),
        ("phi", "Phi"),
        ("minicpm", "MiniCPM"),
        ("stablelm_epoch", "Stablelm"),
    ),
    loader_names=(("LlavaQwen1_5ForCausalLM", "llava_qwen1.5"), ("LlavaMiniCPMForCausalLM", "llava_minicpm")),
)
