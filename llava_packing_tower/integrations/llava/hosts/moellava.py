"""MoE-LLaVA: Video-LLaVA's towers, and decoders with experts. Those have loading code of their own, for DeepSpeed."""

from __future__ import annotations

from pathlib import Path

from ..host import Host, Part, TowerBuilder


def recognises(root: Path) -> bool:
    return (root / "model" / "llava_arch.py").is_file()


HOST = Host(
    name="moellava",
    title="MoE-LLaVA",
    package="moellava",
    recognises=recognises,
    install="git clone https://github.com/PKU-YuanGroup/MoE-LLaVA and set LLAVA_DIR to the clone",
    get_tower="get_image_tower",
    tower_builders=(
        TowerBuilder(
            "model.multimodal_encoder.builder",
            "build_image_tower",
            config="image_tower_cfg",
            settings=("mm_image_tower", "image_tower"),
        ),
    ),
    sorts_images=True,
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
    trainers=(),
)
