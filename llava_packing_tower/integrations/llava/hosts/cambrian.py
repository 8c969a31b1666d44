"""Cambrian-1: a list of towers, each with a number of tokens that its images are resized for."""

from __future__ import annotations

from ..host import Host, Part, TowerBuilder

HOST = Host(
    name="cambrian",
    title="Cambrian-1",
    package="cambrian",
    install="git clone https://github.com/cambrian-mllm/cambrian and set LLAVA_DIR to the clone",
    arch="model.cambrian_arch",
    meta_model="CambrianMetaModel",
    mixin="CambrianMetaForCausalLM",
    class_prefix="Cambrian",
    tower_builders=(
        TowerBuilder(
            "model.multimodal_encoder.builder",
            "build_vision_tower_aux_list",
            settings=("mm_vision_tower_aux_list", "vision_tower_aux_list"),
            lengths=("mm_vision_tower_aux_token_len_list", "vision_tower_aux_token_len_list"),
        ),
    ),
    native_reason="its images are one batch for each of several towers, on square grids",
    train="train.train_fsdp",
    trainer=Part("train.cambrian_trainer", "CambrianTrainer"),
    trainers=(),
)
