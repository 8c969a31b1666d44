"""LLaVA-NeXT (git only). Same package name as LLaVA 1.x; it alone has resamplers."""

from __future__ import annotations

from pathlib import Path

from ..host import Host, Part


def recognises(root: Path) -> bool:
    return (root / "model" / "llava_arch.py").is_file() and (root / "model" / "multimodal_resampler").is_dir()


HOST = Host(
    name="llava_next",
    title="LLaVA-NeXT",
    package="llava",
    recognises=recognises,
    install="git clone https://github.com/LLaVA-VL/LLaVA-NeXT and set LLAVA_DIR to the clone",
    reads_videos=True,
    joins_on_host=True,
    late_models=("model.language_model.llava_gemma", "model.language_model.llava_qwen_moe"),
    own_arguments=(
        "image_grid_pinpoints",
        "image_crop_resolution",
        "image_split_resolution",
        "video_folder",
        "video_fps",
        "frames_upbound",
        "mm_newline_position",
        "mm_spatial_pool_stride",
        "mm_spatial_pool_mode",
        "mm_resampler_type",
        "rope_scaling_factor",
        "group_by_varlen",
    ),
    refused=(
        (
            "train.train_dpo",
            "start it by `llava-packing train` with `trainer: dpo` in the configuration: its repository lacks a module "
            "that it imports, and without DeepSpeed it fails",
        ),
    ),
    trainers=("sft", "dpo"),
    of_trainer=(
        (
            "dpo",
            (
                ("train", "train.train_dpo"),
                ("dataset", "DPODataset"),
                ("trainer", Part("train.llava_trainer", "LLaVADPOTrainer")),
                ("refused", ()),
            ),
        ),
    ),
)
