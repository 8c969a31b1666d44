"""Native resolution on a GPU: the memory of a long clip. ``python -m pytest tests/gpu/test_native_gpu.py``."""

import pytest
import torch

from llava_packing_tower import HEVCViTPackingVisionTower, LlavaViTPackingConfig, LlavaViTPackingModel
from llava_packing_tower.multimodal.projectors import make_projector
from llava_packing_tower.multimodal.visual_inputs import Visual
from llava_packing_tower.multimodal.visual_tokens import TokenLayout, encode_visuals

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
# GiB with the weights, without what other tests left; docs/native_resolution.md has what was measured.
LIMITS = {"inference": 1.2, "training": 9.5, "training with gradient checkpointing": 3.3}
FRAMES, SIDE, TEXT = 64, 224, 3584
DEVICE = "cuda"


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    folder = tmp_path_factory.mktemp("large") / "packing"
    config = LlavaViTPackingConfig(**LARGE, patch_size=14, image_size=SIDE, use_head=False)
    LlavaViTPackingModel(config).to(torch.bfloat16).save_pretrained(folder)
    args = type("Args", (), {"mm_vision_select_layer": -1})
    return HEVCViTPackingVisionTower(str(folder), args).to(DEVICE, torch.bfloat16)


@pytest.mark.parametrize("mode", list(LIMITS))
def test_a_clip_of_64_frames_at_224_fits(tower, mode, record_property, capsys):
    """16,384 patches see each other; in training, gradients of tower and projector (no optimizer)."""
    training = mode != "inference"
    tower.train(training).requires_grad_(training).zero_grad()
    if mode == "training with gradient checkpointing":
        tower.vision_tower.gradient_checkpointing_enable()
    else:
        tower.vision_tower.gradient_checkpointing_disable()
    projector = make_projector("spatial_merge", LARGE["hidden_size"], TEXT).to(DEVICE, torch.bfloat16)
    projector.requires_grad_(training)
    weights = [*tower.parameters(), *projector.parameters()]
    clip = Visual(torch.randn(FRAMES, 3, SIDE, SIDE, device=DEVICE, dtype=torch.bfloat16), is_video=True)

    def encode():
        with torch.set_grad_enabled(training):
            tokens = encode_visuals(tower, projector, [clip], TokenLayout(clips=True))[0]
            if training:
                tokens.float().square().mean().backward()
        return tokens.detach()

    encode()  # what compiling takes is not what a run takes
    for weight in weights:
        weight.grad = None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    tokens = encode()
    torch.cuda.synchronize()
    own = torch.cuda.max_memory_allocated() - before
    peak = own + sum(weight.nbytes for weight in weights)
    side = SIDE // 14 // 2 // 2  # 16 x 16 patches of a frame, merged to 8 x 8 tokens, pooled to 4 x 4
    assert tokens.shape == (FRAMES * side * side, TEXT) and tokens.isfinite().all()
    if training:
        missing = [name for name, weight in tower.named_parameters() if weight.grad is None]
        assert not missing, missing
    found = f"{peak / 2**30:.2f} GiB, {own / 2**30:.2f} of it beside the weights"
    record_property(mode, found)
    with capsys.disabled():
        print(f"\n64 frames at 224, {mode}: {found}")
    assert peak < LIMITS[mode] * 2**30
