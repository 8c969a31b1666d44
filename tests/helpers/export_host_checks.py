"""Run by tests/hosts/test_export.py in a process of its own for each LLaVA: exports beside the LLaVA they come from.

With transformers before 4.57, which the exported classes do not run on, what LLaVA says is written beside each export:
``python export_host_checks.py FOLDER``; a process with a newer one compares, ``... FOLDER compare``.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import transformers

IS_NEXT = bool(os.environ.get("LLAVA_NEXT_DIR"))
CAN_LOAD = tuple(int(n) for n in transformers.__version__.split(".")[:2]) >= (4, 57)
ATOL = 1e-5
CLIP = {"mm_packing_video": "clip", "mm_newline_position": "grid"}
MLP = {"mm_projector_type": "mlp2x_gelu"}
FOUR = {"mm_projector_type": "spatial_merge"}
# family, image_aspect_ratio, decoder, and what else: every family in three modes, every projector, every decoder
CASES: list[tuple[str, str, str, dict]] = [
    ("llava_vit", "pad", "Llama", MLP),
    ("llava_vit", "anyres", "Llama", {"image_grid_pinpoints": "[(16, 32), (32, 16), (32, 32)]"}),
    ("llava_vit", "native", "Llama", {**CLIP, **FOUR}),
    ("siglip2", "pad", "Llama", {"mm_patch_merge_type": "spatial_unpad"}),
    ("siglip2", "anyres", "Llama", {**MLP, "mm_patch_merge_type": "flat"}),
    ("siglip2", "native", "Llama", {"mm_projector_type": "patch_merger", "mm_patch_merge_type": "flat"}),
    ("aimv2", "pad", "Llama", FOUR),
    ("aimv2", "anyres", "Llama", {**FOUR, "mm_patch_merge_type": "spatial"}),
    ("aimv2", "native", "Llama", {**MLP, "mm_newline_position": "frame"}),
    ("dinov3", "pad", "Llama", {"mm_projector_type": "mlp3x_gelu"}),
    ("dinov3", "anyres", "Llama", {"mm_vision_select_layer": -2}),
    ("dinov3", "native", "Llama", {"mm_packing_video_max_patches": 60, "mm_spatial_pool_mode": "average"}),
    ("siglip2", "square", "Mistral", {}),
]
NEXT_CASES: list[tuple[str, str, str, dict]] = [
    ("siglip2", "anyres_max_2", "Qwen", {**MLP, "image_grid_pinpoints": [(64, 64), (16, 48), (48, 16)]}),
    ("llava_vit", "anyres", "Qwen", {"mm_newline_position": "grid", "mm_spatial_pool_mode": "max"}),
    ("dinov3", "native", "Qwen", FOUR),
    ("aimv2", "pad", "Qwen", {"mm_projector_type": "mlp2x_res1x_gelu", "mm_patch_merge_type": "spatial_unpad"}),
]
# Vision towers of VLMs, in LLaVA 1.x: temporal patches, clips without positions or with those of the frames, and the
# projector that the VLM brings.
MERGER = {"merge": [2, 2], "vision_size": 64, "inner_size": 96, "text_size": 32, "norm": "rms_norm", "norm_eps": 1e-6}
OWN = {"mm_projector_type": "checkpoint", "mm_packing_projector": MERGER}
VLM_CASES: list[tuple[str, str, str, dict]] = [
    ("qwen3_vl", "native", "Llama", {**CLIP, "mm_projector_type": "spatial_merge_3x3"}),
    ("qwen3_vl", "pad", "Llama", MLP),
    ("qwen2_5_vl", "native", "Llama", {**CLIP, **OWN}),
    ("radio", "native", "Llama", {**FOUR, "mm_newline_position": "frame"}),
    ("moonvit", "native", "Llama", {**CLIP, **MLP}),
    ("onevision2", "native", "Llama", {**CLIP, **FOUR}),
    ("perception_encoder", "anyres", "Llama", {"mm_vision_select_layer": -2}),
]


def make(folder: Path) -> None:
    """Checkpoints, what they say, and their exports, each in a folder of ``folder``."""
    import export_checks as checks

    from llava_packing_tower.export.writer import export

    for number, (family, ratio, decoder, more) in enumerate([*CASES, *(NEXT_CASES if IS_NEXT else VLM_CASES)]):
        checkpoint = checks.make_checkpoint(folder, family, ratio, decoder, **more)
        said = checks.says_all(checkpoint)
        export(checkpoint, folder / f"case_{number}")
        checks.save_says(folder / f"case_{number}.npz", said)
        first, other = (logits[-1] for logits, _ in (said[0], said[3]))
        assert np.abs(first - other).max() > 0.01, "the image changes nothing"


def compare(folder: Path) -> None:
    import export_samples as samples

    for file in sorted(folder.glob("case_*.npz")):
        samples.compare(file, ATOL)
        print(f"compared {file.stem}")


if __name__ == "__main__":
    target = Path(sys.argv[1])
    if sys.argv[2:] != ["compare"]:
        make(target)
    if CAN_LOAD:
        compare(target)
