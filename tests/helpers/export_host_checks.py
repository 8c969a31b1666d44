"""Run by tests/hosts/test_export.py in a process of its own for each LLaVA: exports beside the LLaVA they come from.

``python export_host_checks.py FOLDER`` takes the cases that every run of the tests has, ``... FOLDER long`` those of
:data:`LONG_CASES`. With transformers before 4.57, which the exported classes do not run on, what LLaVA says is written
beside each export; a process with a newer one compares, ``... FOLDER compare``.
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
OF_VLM = {  # MoonViT's: a norm in front
    "mm_projector_type": "checkpoint",
    "mm_packing_projector": {
        "merge": [2, 2],
        "vision_size": 64,
        "inner_size": 48,
        "text_size": 32,
        "norm": "rms_norm",
        "norm_eps": 1e-5,
        "input_norm_eps": 1e-5,
    },
}
# family, image_aspect_ratio, decoder, and what else. Every run of the tests has each family, mode and projector.
CASES: list[tuple[str, str, str, dict]] = [
    ("llava_vit", "anyres", "Llama", {"image_grid_pinpoints": "[(16, 32), (32, 16), (32, 32)]"}),
    ("llava_vit", "native", "Llama", {**CLIP, **FOUR}),
    ("siglip2", "native", "Llama", {"mm_projector_type": "patch_merger", "mm_patch_merge_type": "flat"}),
    ("siglip2", "square", "Mistral", {}),
    ("aimv2", "pad", "Llama", FOUR),
    ("aimv2", "anyres", "Llama", {**FOUR, "mm_patch_merge_type": "spatial"}),
    ("dinov3", "native", "Llama", {"mm_packing_video_max_patches": 60, "mm_spatial_pool_mode": "average"}),
    ("qwen3_vl", "native", "Llama", {**CLIP, **OF_VLM}),
    ("radio", "anyres", "Llama", {**MLP, "mm_vision_select_layer": -2}),
    ("qwen2_5_vl", "native", "Llama", {**CLIP, "mm_patch_merge_type": "flat"}),
    ("moonvit", "native", "Llama", {**CLIP, **FOUR}),
    ("onevision2", "native", "Llama", {**CLIP, "mm_projector_type": "patch_merger"}),
    ("perception_encoder", "pad", "Llama", MLP),
]
NEXT_CASES: list[tuple[str, str, str, dict]] = [
    ("siglip2", "anyres_max_2", "Qwen", {**MLP, "image_grid_pinpoints": [(64, 64), (16, 48), (48, 16)]}),
    ("llava_vit", "anyres", "Qwen", {"mm_newline_position": "grid", "mm_spatial_pool_mode": "max"}),
    ("dinov3", "native", "Qwen", FOUR),
    ("aimv2", "pad", "Qwen", {"mm_projector_type": "mlp2x_res1x_gelu", "mm_patch_merge_type": "spatial_unpad"}),
]
# What is left of every family in three modes, and of the decoders: tests marked long.
LONG_CASES: list[tuple[str, str, str, dict]] = [
    ("llava_vit", "pad", "Llama", MLP),
    ("siglip2", "pad", "Llama", {"mm_patch_merge_type": "spatial_unpad"}),
    ("siglip2", "anyres", "Llama", {**MLP, "mm_patch_merge_type": "flat"}),
    ("aimv2", "native", "Llama", {**MLP, "mm_newline_position": "frame"}),
    ("dinov3", "pad", "Llama", {"mm_projector_type": "mlp3x_gelu"}),
    ("dinov3", "anyres", "Llama", {"mm_vision_select_layer": -2}),
    ("qwen3_vl", "pad", "Llama", FOUR),
    ("qwen3_vl", "anyres", "Mistral", MLP),
    ("qwen3_vl", "native", "Llama", {**MLP, "mm_packing_video": "frames"}),
    ("radio", "pad", "Llama", {}),
    ("radio", "native", "Llama", {"mm_projector_type": "spatial_merge_3x3"}),
    ("qwen2_5_vl", "pad", "Llama", MLP),
    ("qwen2_5_vl", "anyres", "Llama", OF_VLM),
    ("moonvit", "pad", "Llama", OF_VLM),
    ("moonvit", "anyres", "Llama", FOUR),
    ("moonvit", "native", "Llama", {**OF_VLM, "mm_packing_video": "frames"}),
    ("onevision2", "pad", "Llama", MLP),
    ("onevision2", "anyres", "Llama", FOUR),
    ("perception_encoder", "anyres", "Mistral", MLP),
    ("perception_encoder", "native", "Llama", {**MLP, "mm_newline_position": "frame"}),
]
LONG_NEXT_CASES: list[tuple[str, str, str, dict]] = [
    ("qwen3_vl", "anyres", "Gemma", MLP),
    ("radio", "native", "QwenMoe", FOUR),
    ("moonvit", "pad", "Mixtral", MLP),
]


def make(folder: Path, cases: list[tuple[str, str, str, dict]]) -> None:
    """Checkpoints, what they say, and their exports, each in a folder of ``folder``; and back again, bit by bit."""
    import export_checks as checks
    import torch

    from llava_packing_tower.checkpoint.weights import WeightFiles
    from llava_packing_tower.export.restore import restore
    from llava_packing_tower.export.writer import export

    for number, (family, ratio, decoder, more) in enumerate(cases):
        checkpoint = checks.make_checkpoint(folder, family, ratio, decoder, **more)
        said = checks.says_all(checkpoint)
        export(checkpoint, folder / f"case_{number}")
        checks.save_says(folder / f"case_{number}.npz", said)
        again = WeightFiles(restore(folder / f"case_{number}", folder / f"again_{number}").folder)
        original = WeightFiles(checkpoint)
        assert again.shapes() == original.shapes()
        assert all(
            torch.equal(again[n], original[n]) and again[n].dtype == original[n].dtype for n in original.shapes()
        )
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
        cases, of_next = (LONG_CASES, LONG_NEXT_CASES) if sys.argv[2:] == ["long"] else (CASES, NEXT_CASES)
        make(target, [*cases, *(of_next if IS_NEXT else [])])
    if CAN_LOAD:
        compare(target)
