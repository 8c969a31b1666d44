"""The LlavaViT of the training code (``llava_vit_large_ln`` ...), with its arguments and its output.

The network is that of :class:`LlavaViTModel` but for two eps: LayerNorms have 1e-5, and the head's RMSNorm that of
float32. Its state dict has the names of the standard model; checkpoints of the training code are loaded whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ...checkpoint.weights import describe_problems, plan_problems
from .config import LlavaViTConfig
from .key_map import SOURCE_TYPE, plan_standard
from .presets import SOURCE, preset
from .standard import LlavaViTModel
from .standard_positions import residual_indices

SOURCE_EPS = 1e-5
SOURCE_RESIDUAL_PATCHES = 1536


class LlavaViTSourceModel(LlavaViTModel):
    """The source model: ``model(x, visible_indices, mask_ratio)`` gives a dict, and a ``backbone.pt`` loads into it."""

    def __init__(self, config: LlavaViTConfig) -> None:
        if not config.use_head:
            raise ValueError("the training code has no LlavaViT without a head, use_head must be true")
        super().__init__(config)
        assert self.head is not None
        self.head.norm.eps = torch.finfo(torch.float32).eps

    def forward(  # type: ignore[override]
        self,
        x: torch.Tensor,
        visible_indices: torch.Tensor | None = None,
        mask_ratio: float | None = 0.5,
        patch_positions: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Encode images or clips of one size.

        Args:
            x: ``[B, C, H, W]`` or ``[B, C, T, H, W]``.
            visible_indices: ``[B, K]`` flat indices into the (frames, rows, columns) grid of patches, or a residual map
                ``[B, 1, T, H, W]``, of which the 1536 patches with the largest sums are taken. Of one frame, all
                patches are taken, whatever is given.
            mask_ratio: of no effect, as in the training code: without indices every patch is visible.
            patch_positions: ``[patches, 3]`` (frame, row, column) of all patches in place of those of the grid.

        Returns:
            ``visible_embeddings [B, K, hidden]``, final-normed, and ``head_output [B, hidden]``.

        Raises:
            ValueError: shapes that are none of these.
        """
        frames = x.shape[2] if x.dim() == 5 else 1
        patch = self.config.patch_size
        rows, columns = x.shape[-2] // patch, x.shape[-1] // patch
        if frames == 1:
            visible_indices = None
        elif visible_indices is not None and visible_indices.dim() == 5:
            visible_indices = residual_indices(visible_indices, patch, SOURCE_RESIDUAL_PATCHES)
        positions = None
        if patch_positions is not None:
            count = frames * rows * columns
            if patch_positions.shape != (count, 3):
                raise ValueError(f"patch_positions must be [{count}, 3], got {list(patch_positions.shape)}")
            taken = torch.arange(count, device=x.device).expand(len(x), -1)
            positions = patch_positions.to(x.device)[taken if visible_indices is None else visible_indices.long()]
        last, pooled, _ = super().forward(x, visible_indices, positions, return_dict=False)
        return {"visible_embeddings": last, "head_output": pooled}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load tensors of this model, or of a checkpoint of the training code (bare, or in ``model`` or
        ``state_dict``).

        A checkpoint of the training code fits whole, ``strict`` or not: raises ``ValueError`` with the tensors that are
        missing, unexpected or mis-shaped.
        """
        inner = next((state_dict[key] for key in ("model", "state_dict") if key in state_dict), state_dict)
        if not any(name.startswith("transformer.layers.") or name == "conv1.weight" for name in inner):
            return super().load_state_dict(state_dict, strict=strict, assign=assign)
        shapes = {name: tuple(tensor.shape) for name, tensor in inner.items()}
        plan = plan_standard(SOURCE_TYPE, shapes)
        targets = {name: tuple(tensor.shape) for name, tensor in self.state_dict().items()}
        if problems := plan_problems(plan, shapes, targets):
            raise ValueError(f"the checkpoint does not fit {type(self).__name__}: {describe_problems(problems)}")
        made = {name: recipe.build(*(inner[key] for key in recipe.sources)) for name, recipe in plan.recipes.items()}
        return super().load_state_dict(made, strict=True, assign=assign)


def create_source_model(name: str, pretrained: bool = False, **fields: object) -> LlavaViTSourceModel:
    """A randomly initialized source model of a named size (``llava_vit_*_ln``, ``llava_vit_base_rms``), in training
    mode.

    Raises ``ValueError`` for another name, or ``pretrained``.
    """
    chosen = preset(name)
    if chosen.form != SOURCE:
        raise ValueError(f"{name} is no name of the training code")
    if pretrained:
        raise ValueError(f"no weights are published under the name {name!r}: load a checkpoint with load_state_dict")
    sizes: dict[str, Any] = {"layer_norm_eps": SOURCE_EPS, **chosen.fields, **fields}
    return LlavaViTSourceModel(LlavaViTConfig(**sizes))
