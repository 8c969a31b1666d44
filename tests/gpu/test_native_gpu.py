"""Native resolution on a GPU: the memory of a long clip. ``python -m pytest tests/gpu/test_native_gpu.py -s``."""

import pytest
import torch

from llava_packing_tower import HEVCViTPackingVisionTower, LlavaViTPackingConfig, LlavaViTPackingModel
from llava_packing_tower.native.projectors import make_projector
from llava_packing_tower.native.tokens import TokenLayout, encode_visuals
from llava_packing_tower.native.visuals import Visual

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    folder = tmp_path_factory.mktemp("large") / "packing"
    config = LlavaViTPackingConfig(**LARGE, patch_size=14, image_size=224, use_head=False)
    LlavaViTPackingModel(config).to(torch.bfloat16).save_pretrained(folder)
    args = type("Args", (), {"mm_vision_select_layer": -1})
    return HEVCViTPackingVisionTower(str(folder), args).to("cuda", torch.bfloat16)


@pytest.mark.parametrize("training", [False, True])
def test_a_clip_of_64_frames_at_224_fits(tower, training):
    """16,384 patches see each other; with gradients of tower and projector, and no gradient checkpointing."""
    tower.requires_grad_(training)
    projector = make_projector("spatial_merge", 1024, 3584).to("cuda", torch.bfloat16).requires_grad_(training)
    clip = Visual(torch.randn(64, 3, 224, 224, device="cuda", dtype=torch.bfloat16), is_video=True)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.set_grad_enabled(training):
        tokens = encode_visuals(tower, projector, [clip], TokenLayout(clips=True))[0]
        if training:
            tokens.float().square().mean().backward()
    assert tokens.shape == (64 * 4 * 4, 3584) and tokens.isfinite().all()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**30
    print(f"64 frames at 224, {'training' if training else 'inference'}: {peak:.1f} GiB beside the weights")
    assert torch.cuda.max_memory_allocated() < 80e9
