"""LLaVA-NeXT (git only). Same package name as LLaVA 1.x; it alone has resamplers."""

from __future__ import annotations

from pathlib import Path

from ..host import Host


def recognises(root: Path) -> bool:
    return (root / "model" / "llava_arch.py").is_file() and (root / "model" / "multimodal_resampler").is_dir()


HOST = Host(
    name="llava_next",
    title="LLaVA-NeXT",
    package="llava",
    recognises=recognises,
    install="git clone https://github.com/LLaVA-VL/LLaVA-NeXT and set LLAVA_DIR to the clone",
    reads_videos=True,
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
            "LLaVA-NeXT's train_dpo does not work with a packing tower (and its repository lacks data_processing, "
            "which it imports). Fine-tune with `llava-packing train`; to train by DPO with another tower, start it "
            "without llava-packing",
        ),
    ),
)
