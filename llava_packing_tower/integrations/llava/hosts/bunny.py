"""Bunny: small decoders, of which it has copies of its own. Its loader asks for the kind of the decoder."""

from __future__ import annotations

from ..host import Host, Part, TowerBuilder

HOST = Host(
    name="bunny",
    title="Bunny",
    package="bunny",
    install="git clone https://github.com/BAAI-DCAI/Bunny and set LLAVA_DIR to the clone",
    arch="model.bunny_arch",
    meta_model="BunnyMetaModel",
    mixin="BunnyMetaForCausalLM",
    tower_builders=(
        TowerBuilder(
            "model.multimodal_encoder.builder", "build_vision_tower", defaults=(("mm_vision_select_layer", -2),)
        ),
    ),
    class_prefix="Bunny",
    decoders=(
        ("llama", "Llama"),
        ("qwen2", "Qwen2"),
        ("phi", "Phi"),
        ("phi3", "Phi3"),
        ("minicpm", "MiniCPM"),
        ("stablelm_epoch", "StableLM"),
    ),
    loader_arguments=(
        ("BunnyLlamaForCausalLM", "model_type", "llama3-8b"),
        ("BunnyQwen2ForCausalLM", "model_type", "qwen1.5-1.8b"),
        ("BunnyPhiForCausalLM", "model_type", "phi-2"),
        ("BunnyPhi3ForCausalLM", "model_type", "phi-3"),
        ("BunnyMiniCPMForCausalLM", "model_type", "minicpm"),
        ("BunnyStableLMForCausalLM", "model_type", "stablelm-2"),
    ),
    mm_utils="util.mm_utils",
    data="util.data_utils",
    trainer=Part("train.bunny_trainer", "BunnyTrainer"),
    trainers=(),
)
