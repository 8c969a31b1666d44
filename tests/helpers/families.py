"""What the tests of the families share: the golden checkpoints and ragged batches for them."""

import torch

from llava_packing_tower import (
    AIMv2Packing,
    DINOv3ViTPacking,
    LlavaViTPackingModel,
    MoonViTPacking,
    OneVision2Packing,
    PerceptionEncoderPacking,
    Qwen2_5_VLVisionPacking,
    Qwen3VLVisionPacking,
    RadioPacking,
    Siglip2NaflexPacking,
)
from llava_packing_tower.data.patches import batch_images_to_packing_input, split_packed
from llava_packing_tower.data.segments import read_grid

GOLDEN_FAMILIES = {
    "siglip2": Siglip2NaflexPacking,
    "aimv2_native": AIMv2Packing,
    "aimv2_learned": AIMv2Packing,
    "dinov3": DINOv3ViTPacking,
}

# Whole VLMs in three shards (make_vlm_golden.py); of each the tower, and the first words of its tensors' names.
VLM_FAMILIES = {
    "qwen3_vl": Qwen3VLVisionPacking,
    "radio": RadioPacking,
    "qwen2_5_vl": Qwen2_5_VLVisionPacking,
    "moonvit": MoonViTPacking,
    "onevision2": OneVision2Packing,
    "perception_encoder": PerceptionEncoderPacking,
}
ALL_FAMILIES = {**GOLDEN_FAMILIES, **VLM_FAMILIES}

# What a block may be made of: bench preset, and fields of its config.
BLOCK_VARIANTS = [
    ("llava_vit", {}),
    ("llava_vit", {"layer_norm_type": "rms_norm"}),
    ("siglip2", {}),
    ("aimv2", {}),
    ("dinov3", {}),
    ("dinov3", {"use_gated_mlp": True, "hidden_act": "silu"}),
    ("qwen3_vl", {}),
    ("qwen2_5_vl", {}),
    ("perception_encoder", {}),
    ("radio", {"use_swiglu_ffn": True, "layer_scale": True}),
]


# Small models with random weights: every family, and fields of its config.
TINY = {
    "llava_vit": (LlavaViTPackingModel, {}),
    "siglip2": (Siglip2NaflexPacking, {"num_patches": 16}),
    "aimv2": (AIMv2Packing, {"is_native": True}),
    "dinov3": (DINOv3ViTPacking, {"num_register_tokens": 2}),
    "qwen3_vl": (Qwen3VLVisionPacking, {"num_position_embeddings": 9}),
    "radio": (RadioPacking, {"max_img_size": 24, "num_registers": 1}),
    "qwen2_5_vl": (Qwen2_5_VLVisionPacking, {"window_size": 16, "fullatt_block_indexes": [1]}),
    "moonvit": (MoonViTPacking, {"pos_emb_height": 3, "pos_emb_width": 5, "pos_emb_time": 4}),
    "onevision2": (OneVision2Packing, {}),
    "perception_encoder": (PerceptionEncoderPacking, {"layer_scale": True}),
}


def tiny(name: str, seed: int = 0, **fields):
    """A model of :data:`TINY`, two blocks of width 64."""
    cls, own = TINY[name]
    torch.manual_seed(seed)
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    return cls(cls.config_class(**{**shape, "patch_size": 4, "image_size": 16, **own, **fields})).eval()


def ragged(model, grids=((3, 5), (1, 7), (5, 3), (4, 4), (3, 5)), seed=0):
    """Images of different shapes (all of the one that it takes, for learned positions), some sizes twice."""
    patch, side = model.config.patch_size, getattr(model, "fixed_side", None)
    if side:
        grids = ((side, side),) * 3
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, h * patch, w * patch, generator=generator) for h, w in grids]


def pack(model, images):
    frames = model.frames_per_patch
    return batch_images_to_packing_input(images, model.config.patch_size, model.patch_layout, frames_per_patch=frames)


def per_image(model, images, **options):
    """Final tokens of each image, from one packed pass."""
    rows, grid = pack(model, images)
    return split_packed(model(rows, grid, **options), read_grid(grid))
