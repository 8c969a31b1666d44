"""The LLaVA tower over the standard (unpacked) LlavaViT, to compare packing with inside LLaVA."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..checkpoint.pretrained import StrictPreTrainedModel
from ..data.native_config import NativeSettings
from ..data.positions import interpolate_frame_indices
from ..models.llava_vit.standard import LlavaViTModel, OneVisionEncoderModel
from ..models.llava_vit.standard_positions import clip_in_context
from .packing_tower import HEVCViTPackingVisionTower

STANDARD_MODELS: dict[str, type[LlavaViTModel]] = {
    "llava_vit": LlavaViTModel,
    "onevision_encoder": OneVisionEncoderModel,
    "llava_vit_packing": LlavaViTModel,
}


class HEVCViTVisionTower(HEVCViTPackingVisionTower):
    """LLaVA vision tower over the standard LlavaViT: one size per pass, images of a list one after the other.

    Arguments, loading rules and properties are those of :class:`HEVCViTPackingVisionTower`; loads ``llava_vit``,
    ``onevision_encoder`` and (converted in memory) ``llava_vit_packing`` checkpoints. Attention is always torch's own
    (``sdpa``). Features are cast back to the dtype of the images, unlike those of the packing tower.
    """

    @property
    def attention(self) -> str:
        return "auto"

    @attention.setter
    def attention(self, name: str) -> None:
        """The packing tower's setting (``mm_packing_attention``) does not concern this one."""

    def _model_class(self, model_type: str | None) -> type[StrictPreTrainedModel]:
        if not isinstance(model_type, str) or model_type not in STANDARD_MODELS:
            known = ", ".join(STANDARD_MODELS)
            raise ValueError(f"the standard tower has no model for model_type {model_type!r}; known: {known}")
        return STANDARD_MODELS[model_type]

    def set_native(self, settings: NativeSettings | None) -> None:
        """Raises ``ValueError`` for native resolution, which needs the packing tower."""
        if settings is not None:
            raise ValueError(
                f"image_aspect_ratio: native needs the packing tower, but {self.vision_tower_name!r} selects the "
                f"standard one: use a packing checkpoint, or the prefix 'packing:'"
            )

    def _encode_square(self, pixels: torch.Tensor) -> torch.Tensor:
        """``[B, C, H, W]`` or ``[B, C, T, H, W]`` to ``[B, tokens, hidden_size]`` in the dtype of the pixels (for uint8
        ones, in the tower's)."""
        model, visible = self.vision_tower, None
        pixels = pixels.to(self.device)
        if not pixels.is_floating_point():
            pixels = self.image_processor.pixel_scale(pixels, 1).to(self.dtype)
        inputs = pixels.to(self.dtype)
        if pixels.dim() == 5:
            batch, _, frames = pixels.shape[:3]
            context = getattr(model.config, "rope_temporal_size", None) or 64
            places = interpolate_frame_indices(
                torch.arange(frames).expand(batch, -1), torch.full((batch,), frames), context
            )
            inputs, visible = clip_in_context(inputs, places, model.config.patch_size, context)
        states = model(inputs, visible_indices=visible, feature_layers=self.feature_layers)
        return torch.cat(states, dim=-1).to(pixels.dtype)

    def forward(  # type: ignore[override]  # it takes no patch_positions
        self, images: torch.Tensor | Sequence[torch.Tensor], return_spatial_dims: bool = False
    ) -> torch.Tensor | list[torch.Tensor] | tuple[torch.Tensor | list[torch.Tensor], int, int]:
        """Features of images or clips.

        Args:
            images: ``[B, C, H, W]``, clips ``[B, C, T, H, W]`` (T up to 64 frames, which stand at their interpolated
                places in a context of 64), or a list of ``[C, H, W]`` and ``[C, T, H, W]``.
            return_spatial_dims: also return rows and columns, in patches, of the first entry.

        uint8 images are normalized here, as in the packing tower.

        Returns:
            ``[B, tokens, hidden_size]`` for a tensor, a list of ``[1, tokens_i, hidden_size]`` for a list, in the
            dtype of the images.

        Raises:
            ValueError: not loaded, no images, or images that :class:`LlavaViTModel` refuses.
        """
        self._require_weights()
        if len(images) == 0:
            raise ValueError("no images: the batch is empty")
        if isinstance(images, torch.Tensor):
            features: torch.Tensor | list[torch.Tensor] = self._encode_square(images)
        else:
            features = [self._encode_square(image.unsqueeze(0)) for image in images]
        if not return_spatial_dims:
            return features
        patch = self.vision_tower.config.patch_size
        height, width = images[0].shape[-2:]
        return features, height // patch, width // patch
