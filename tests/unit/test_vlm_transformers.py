"""The vision towers of VLMs against transformers' own classes, over the switches of their configs.

Needs a transformers that has the classes; `make test` runs this file a second time, in an environment that does.
"""

import pytest
import torch
import transformers
from conftest import assert_close
from families import pack
from make_vlm_golden import pixels, randomize

from llava_packing_tower.convert.hf_reference import IN_TRANSFORMERS
from llava_packing_tower.convert.hf_towers import block_states
from llava_packing_tower.models.registry import family_for
from llava_packing_tower.tools.bench.systems import InMemory

QWEN3 = dict(depth=2, hidden_size=48, intermediate_size=56, num_heads=3, patch_size=4, num_position_embeddings=36)
QWEN3 |= dict(out_hidden_size=24, deepstack_visual_indexes=[0])

RADIO = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=3, patch_size=4, image_size=16, max_img_size=20)

QWEN2_5 = dict(depth=3, hidden_size=48, intermediate_size=52, num_heads=3, patch_size=4, window_size=32)
QWEN2_5 |= dict(out_hidden_size=24, fullatt_block_indexes=[1])

KIMI = dict(num_hidden_layers=2, hidden_size=48, intermediate_size=56, num_attention_heads=3, patch_size=4)
KIMI |= dict(pos_emb_height=6, pos_emb_width=6, pos_emb_time=5)

# our family, fields of transformers' vision config
VARIANTS = {
    "qwen3_vl": ("qwen3_vl_packing", QWEN3),
    "qwen3_vl, one head, one frame": ("qwen3_vl_packing", {**QWEN3, "num_heads": 1, "temporal_patch_size": 1}),
    "qwen3_vl, three frames, merge 3": (
        "qwen3_vl_packing",
        {**QWEN3, "temporal_patch_size": 3, "spatial_merge_size": 3, "patch_size": 5},
    ),
    "qwen3_vl, other positions": (
        "qwen3_vl_packing",
        {
            **{**QWEN3, "num_position_embeddings": 4, "spatial_merge_size": 1, "hidden_act": "silu"},
            **{"rope_parameters": {"rope_type": "axial", "rope_theta": 50.0}},
        },
    ),
    "qwen2_5_vl": ("qwen2_5_vl_packing", QWEN2_5),
    "qwen2_5_vl, windows of a cell": ("qwen2_5_vl_packing", {**QWEN2_5, "window_size": 8, "num_heads": 1}),
    "qwen2_5_vl, merge 3, no whole block": (
        "qwen2_5_vl_packing",
        {**QWEN2_5, "spatial_merge_size": 3, "window_size": 30, "fullatt_block_indexes": [], "temporal_patch_size": 1},
    ),
    "qwen2_5_vl, other switches": (
        "qwen2_5_vl_packing",
        {
            **{**QWEN2_5, "spatial_merge_size": 1, "hidden_act": "gelu", "fullatt_block_indexes": [0, 2]},
            **{"rope_parameters": {"rope_type": "axial", "rope_theta": 50.0}},
        },
    ),
    "kimi": ("moonvit_packing", KIMI),
    "kimi, other positions": (
        "moonvit_packing",
        {
            **{**KIMI, "pos_emb_height": 2, "pos_emb_width": 2, "num_attention_heads": 1, "hidden_act": "silu"},
            **{"rope_parameters": {"rope_type": "axial", "rope_theta": 50.0}},
        },
    ),
    "kimi, table of 7 x 7, five blocks": (
        "moonvit_packing",
        {**KIMI, "pos_emb_height": 7, "pos_emb_width": 7, "num_hidden_layers": 5, "merge_kernel_size": [1, 1]},
    ),
    "kimi, all frames apart": ("moonvit_packing", {**KIMI, "pos_emb_time": 1, "patch_size": 3}),
    "qwen3_vl, five blocks, patch 7": (
        "qwen3_vl_packing",
        {**QWEN3, "depth": 5, "deepstack_visual_indexes": [0, 2, 4], "patch_size": 7, "num_position_embeddings": 1},
    ),
    "qwen2_5_vl, windows that divide nothing": (
        "qwen2_5_vl_packing",
        {**QWEN2_5, "depth": 5, "window_size": 47, "fullatt_block_indexes": [0, 3, 9], "num_heads": 2},
    ),
    "qwen2_5_vl, one window for all": ("qwen2_5_vl_packing", {**QWEN2_5, "window_size": 4000, "patch_size": 7}),
    "radio, patch 5, five blocks": (
        "radio_packing",
        {**RADIO, "num_hidden_layers": 5, "patch_size": 5, "max_img_size": 40, "mlp_ratio": 1.5, "hidden_act": "relu"},
    ),
    "radio": ("radio_packing", RADIO),
    "radio, gated, no bias": (
        "radio_packing",
        {**RADIO, "use_swiglu_ffn": True, "qkv_bias": False, "mlp_ratio": 2.5, "num_registers": 0, "num_cls_tokens": 1}
        | {"summary_idxs": [0]},
    ),
    "radio, small table, other pixels": (
        "radio_packing",
        {
            **{**RADIO, "max_img_size": 8, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-3},
            **dict(norm_mean=[0.1, 0.2, 0.3], norm_std=[0.5, 0.7, 0.9], video_temporal_patch_size=2),
        },
    ),
}


# Other VLMs with the same tower: our family, transformers' class.
SAME = {
    "qwen3_vl_moe": ("qwen3_vl_packing", "Qwen3VLMoeVisionModel"),
    "qwen3_5": ("qwen3_vl_packing", "Qwen3_5VisionModel"),
    "qwen3_5_moe": ("qwen3_vl_packing", "Qwen3_5MoeVisionModel"),
}
for _type, (_family, _) in SAME.items():
    _of_it = {key: value for key, value in QWEN3.items() if key != "deepstack_visual_indexes" or "vl" in _type}
    VARIANTS[_type] = (_family, {**_of_it, "depth": 3})


def pair(name):
    """Our encoder and transformers', with the same random weights."""
    family, fields = VARIANTS[name]
    vision = IN_TRANSFORMERS[family].vision if family in IN_TRANSFORMERS else "Kimi_K25VisionModel"
    vision = SAME[name][1] if name in SAME else vision
    if not hasattr(transformers, vision):
        pytest.skip(f"transformers {transformers.__version__} has no {vision}")
    cls = getattr(transformers, vision)
    theirs = cls(cls.config_class(**fields))
    randomize(theirs, 3)
    source, tensors = theirs.config.to_dict(), InMemory(theirs.state_dict())
    ours = family_for(family)
    config, plan = ours.plan(source, tensors.shapes())
    model = ours.from_weights(config, plan, tensors, torch.float32)
    return model, theirs.eval(), plan


@pytest.mark.newest
@pytest.mark.parametrize("name", VARIANTS)
def test_hidden_states_and_gradients(name):
    model, theirs, plan = pair(name)
    side = getattr(model.config, "spatial_merge_size", 1)
    shapes = [(2, 3), (3, 1), (7, 5), (1, 1)]
    if not model.image_only:
        shapes += [(5, 2, 3), (4, 1, 2)]
    shapes = [(*shape[:-2], shape[-2] * side, shape[-1] * side) for shape in shapes]
    images = pixels(model.config.patch_size, shapes, seed=5)
    rows, grid = pack(model, images)
    states = model(rows, grid, output_hidden_states=True)[1]
    each = [block_states(theirs, image) for image in images]
    for ours, reference in zip(states, zip(*each, strict=True), strict=True):
        assert_close(ours, torch.cat(reference))
    upstream = torch.randn(states[0].shape)
    (states[-1] * upstream).sum().backward()
    (torch.cat([parts[-1] for parts in each]) * upstream).sum().backward()
    named, compared = dict(theirs.named_parameters()), 0
    for key, parameter in model.named_parameters():
        grads = [named[source].grad for source in plan.recipes[key].sources]
        # (of q, k and v from three tensors, or of one)
        if any(grad is None for grad in grads):
            assert parameter.grad is None
            continue
        reference = plan.recipes[key].build(*grads)
        assert_close(parameter.grad, reference, atol=2e-5 * max(1.0, reference.abs().max().item()))
        compared += 1
    assert compared >= 10 * model.num_layers
