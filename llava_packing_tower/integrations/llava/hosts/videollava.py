"""Video-LLaVA: a tower for images and one for videos, which it keeps. A packing tower is that for images."""

from __future__ import annotations

from ..host import Host, TowerBuilder

HOST = Host(
    name="videollava",
    title="Video-LLaVA",
    package="videollava",
    install="git clone https://github.com/PKU-YuanGroup/Video-LLaVA and set LLAVA_DIR to the clone",
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
    trainers=(),
)
