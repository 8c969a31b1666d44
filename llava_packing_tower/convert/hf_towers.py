"""transformers' vision towers of VLMs: loaded without the rest, run on one image or clip, block by block."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import nn

from ..checkpoint.weights import WeightFiles
from ..data.patches import PatchLayout, batch_images_to_packing_input
from ..data.segments import Grid
from ..utils.files import CONFIG_NAME, read_json


def load_tower(cls: Any, folder: Path, prefix: str, dtype: torch.dtype) -> nn.Module:
    """A tower of transformers with its tensors of a checkpoint (names without what ``prefix`` matches), all of them."""
    raw = read_json(folder / CONFIG_NAME)
    fields = dict(raw.get("vision_config", raw))
    fields.pop("model_type", None)
    files = WeightFiles(folder, part=prefix)
    tensors = {re.sub(f"^({prefix})", "", name): files[name] for name in files.shapes()}
    new = Version(transformers.__version__) >= Version("4.56")
    options = {"state_dict": tensors, "output_loading_info": True, "dtype" if new else "torch_dtype": dtype}
    model, info = cls.from_pretrained(None, config=cls.config_class(**fields), **options)
    wrong = [*info["missing_keys"], *info["unexpected_keys"]]
    if wrong := [key for key in wrong if "layer_scale" not in key]:  # of RADIO, which are ones where there are none
        raise ValueError(f"transformers' {cls.__name__} does not fit {folder}: {', '.join(sorted(wrong)[:4])}")
    return model


def in_cells(grid: Grid, merge: int) -> torch.Tensor:
    """The order in which Qwen's towers take patches: cell by cell of ``merge`` x ``merge``, int64 ``[t*h*w]``.

    ``rows[in_cells(...)]`` are rows in that order. Raises ``ValueError`` for a grid that has no whole cells.
    """
    t, h, w = grid
    if h % merge or w % merge:
        raise ValueError(f"transformers' tower takes whole cells of {merge} x {merge} patches, not {h} x {w}")
    cells = torch.arange(t * h * w).view(t, h // merge, merge, w // merge, merge)
    return cells.permute(0, 1, 3, 2, 4).flatten()


def in_windows(model: Any, grid: torch.Tensor) -> torch.Tensor:
    """The order in which transformers' tower holds what it was given in cells: window by window, where it has any."""
    if not hasattr(model, "fullatt_block_indexes"):
        return torch.arange(int(grid.prod(-1).sum()))
    unit = model.spatial_merge_unit
    if hasattr(model, "get_window_index"):
        index = torch.as_tensor(model.get_window_index(grid)[0])
    else:
        from transformers.vision_utils import get_vision_window_index

        index, _ = get_vision_window_index(grid, model.spatial_merge_size, model.window_size, model.patch_size)
    return (index[:, None] * unit + torch.arange(unit)).flatten()


def block_states(model: Any, image: torch.Tensor) -> list[torch.Tensor]:
    """The input of the first block and the output of each, ``[t*h*w, hidden]`` in raster order, of one image
    ``[C, H, W]`` or clip ``[C, T, H, W]``; prefix tokens taken out."""
    if type(model).__name__ == "RadioModel":
        states = model(image[None].to(next(model.parameters())), output_hidden_states=True).hidden_states
        return [state[0, model.config.num_summary_tokens :] for state in states]
    if type(model).__name__ == "Kimi_K25VisionModel":
        return _states_of_kimi(model, image)
    return _states_of_qwen(model, image)


def _between(blocks: Any, run: Callable[[], object]) -> list[torch.Tensor]:
    """The input of the first block and the output of each, while ``run`` runs them."""
    states: list[torch.Tensor] = []

    def first(module: nn.Module, given: tuple) -> None:
        states.append(given[0])

    def after(module: nn.Module, given: tuple, output: Any) -> None:
        states.append(output[0] if isinstance(output, tuple) else output)

    hooks = [blocks[0].register_forward_pre_hook(first), *(block.register_forward_hook(after) for block in blocks)]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return states


def _states_of_kimi(model: Any, image: torch.Tensor) -> list[torch.Tensor]:
    weight, patch = next(model.parameters()), model.config.patch_size
    rows, grid = batch_images_to_packing_input([image.to(weight.device, weight.dtype)], patch)
    pixels = rows.view(len(rows), 3, patch, patch)
    return _between(model.layers, lambda: model(pixels, grid.to(weight.device)))


def _states_of_qwen(model: Any, image: torch.Tensor) -> list[torch.Tensor]:
    config, weight = model.config, next(model.parameters())
    rows, grid = batch_images_to_packing_input(
        [image.to(weight.device, weight.dtype)],
        config.patch_size,
        PatchLayout.CHANNEL_FIRST,
        frames_per_patch=config.temporal_patch_size,
    )
    order = in_cells(tuple(grid[0].tolist()), config.spatial_merge_size)
    held = order[in_windows(model, grid)].to(weight.device)
    states = _between(model.blocks, lambda: model(rows[order.to(weight.device)], grid.to(weight.device)))
    return [torch.empty_like(state).index_copy(0, held, state) for state in states]
