"""transformers' own vision towers of VLMs as other systems: packed with flash-attn, and image by image.

Their projectors are left out, and their rows are cut and ordered outside of the measured time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from ...convert.hf_towers import in_cells
from ...data.patches import PatchLayout, batch_images_to_packing_input
from .baselines import Peer, has_flash_attention, initialized, transformers_class
from .systems import Images, Setting, Step, System, per_image_shapes


def in_both_ways(setting: Setting, model: nn.Module, run: Callable[[Sequence[torch.Tensor]], Step]) -> list[System]:
    """The packed system and the one that runs image by image; ``run``: images to a step for all of them at once."""

    def prepare_each(images: Images) -> Step:
        steps = [run([image]) for image in images]
        shapes = per_image_shapes(list(images), setting.config.patch_size, setting.config.hidden_size)
        return Step(
            lambda: [step.run() for step in steps],
            shapes,
            lambda outputs: [step.features(output)[0] for step, output in zip(steps, outputs, strict=True)],
        )

    # Its attention is flash-attn's: without it the comparison would be another one.
    kind = "" if has_flash_attention(setting) or setting.device.type == "cpu" else ", sdpa"
    return [
        System(f"transformers, packed{kind}", model, lambda images: run(list(images)), same_weights=True),
        System(f"transformers, image by image{kind}", model, prepare_each, same_weights=True),
    ]


def qwen3_vl(setting: Setting, train: bool) -> Peer:
    positions = setting.config.num_position_embeddings
    return _qwen(setting, "Qwen3VLVisionModel", train, num_position_embeddings=positions, deepstack_visual_indexes=[])


def qwen2_5_vl(setting: Setting, train: bool) -> Peer:
    own = {name: getattr(setting.config, name) for name in ("window_size", "fullatt_block_indexes")}
    return _qwen(setting, "Qwen2_5_VisionTransformerPretrainedModel", train, **own)


def _qwen(setting: Setting, name: str, train: bool, **own: object) -> Peer:
    c = setting.config
    cls = transformers_class(name)
    config = cls.config_class(
        depth=c.num_hidden_layers,
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_heads=c.num_attention_heads,
        patch_size=c.patch_size,
        **own,
    )
    config._attn_implementation = "flash_attention_2" if has_flash_attention(setting) else "sdpa"
    model = initialized(lambda: cls(config), setting, train)
    model.merger = nn.Identity()

    def run(images: Sequence[torch.Tensor]) -> Step:
        rows, grid = batch_images_to_packing_input(
            images, c.patch_size, PatchLayout.CHANNEL_FIRST, frames_per_patch=c.temporal_patch_size
        )
        grids = [tuple(g) for g in grid.tolist()]
        starts = [sum(t * h * w for t, h, w in grids[:i]) for i in range(len(grids))]
        orders = [start + in_cells(g, c.spatial_merge_size) for start, g in zip(starts, grids)]
        order = torch.cat(orders).to(setting.device)
        rows, grid = rows[order], grid.to(setting.device)
        lengths = [t * h * w for t, h, w in grids]
        if hasattr(c, "window_size"):  # transformers gives the rows of Qwen2.5-VL window by window
            from transformers.vision_utils import get_vision_window_index

            cells = get_vision_window_index(grid, c.spatial_merge_size, c.window_size, c.patch_size)[0]
            order = order.unflatten(0, (-1, c.spatial_merge_size**2))[cells.to(order.device)].flatten()

        def features(output: torch.Tensor) -> list[torch.Tensor]:
            return list(torch.empty_like(output).index_copy(0, order, output).split(lengths))

        return Step(lambda: model(rows, grid).last_hidden_state, ((len(rows), c.hidden_size),), features)

    return in_both_ways(setting, model, run), (config.to_dict(), model.state_dict())


def radio(setting: Setting, train: bool) -> Peer:
    c = setting.config
    cls = transformers_class("RadioModel")
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "patch_size", "image_size", "max_img_size")
    more = ("num_cls_tokens", "num_registers", "use_swiglu_ffn")
    config = cls.config_class(
        mlp_ratio=c.intermediate_size / c.hidden_size, **{name: getattr(c, name) for name in (*names, *more)}
    )
    config._attn_implementation = "flash_attention_2" if has_flash_attention(setting) else "sdpa"
    model = initialized(lambda: cls(config), setting, train)

    def run(images: Sequence[torch.Tensor]) -> Step:
        rows, grid = batch_images_to_packing_input(images, c.patch_size, PatchLayout.CHANNEL_FIRST)
        lengths = grid.prod(1).tolist()
        sides = grid[:, 1:].to(setting.device)
        shape = (len(rows), c.hidden_size)
        return Step(
            lambda: model(rows, image_grid_hw=sides).features.view(shape),
            (shape,),
            lambda out: list(out.split(lengths)),
        )

    return in_both_ways(setting, model, run), (config.to_dict(), model.state_dict())


VISION_TOWERS: dict[str, Callable[[Setting, bool], Peer]] = {
    "qwen3_vl": qwen3_vl,
    "qwen2_5_vl": qwen2_5_vl,
    "radio": radio,
}
