"""Configuration of an exported LLaVA: ``model_type: llava_packing``."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import AutoConfig, PretrainedConfig

from ..models.registry import family_for
from .visual_settings import VisualSettings, fields_of


class LlavaPackingConfig(PretrainedConfig):
    """A decoder, a packed vision tower, and how LLaVA puts the tokens of one into the other.

    Args:
        text_config, vision_config: of the decoder and of the tower, as configs or dicts with a ``model_type``.
        image_token_id, video_token_id: of ``<image>`` and ``<video>``; they may lie beyond the decoder's vocabulary.
        mm_vision_select_layer, mm_vision_select_feature: LLaVA's, see :mod:`..towers.feature_select`.
        kwargs: the keys of :data:`.visual_settings.FIELDS`, and those of transformers.
    """

    model_type = "llava_packing"
    sub_configs: ClassVar[dict[str, type]] = {"text_config": AutoConfig, "vision_config": AutoConfig}
    has_no_defaults_at_init = True

    def __init__(
        self,
        text_config: dict[str, Any] | PretrainedConfig | None = None,
        vision_config: dict[str, Any] | PretrainedConfig | None = None,
        image_token_id: int = 0,
        video_token_id: int = 1,
        mm_vision_select_layer: int = -1,
        mm_vision_select_feature: str = "patch",
        **kwargs: Any,
    ) -> None:
        if isinstance(text_config, dict):
            text_config = AutoConfig.for_model(**text_config)
        if isinstance(vision_config, dict):
            vision_config = family_for(vision_config.get("model_type")).config_class.from_dict(vision_config)
        self.text_config, self.vision_config = text_config, vision_config
        self.image_token_id, self.video_token_id = image_token_id, video_token_id
        self.mm_vision_select_layer = mm_vision_select_layer
        self.mm_vision_select_feature = mm_vision_select_feature
        for name, value in fields_of(kwargs).items():
            kwargs.pop(name, None)
            setattr(self, name, value)
        if text_config is not None:
            kwargs.setdefault("tie_word_embeddings", text_config.tie_word_embeddings)
        super().__init__(**kwargs)

    @property
    def settings(self) -> VisualSettings:
        """How images become tokens. Raises ``ValueError`` for keys that do not fit."""
        return VisualSettings.read(self, self.vision_config.patch_size, self.vision_config.image_size)


AutoConfig.register(LlavaPackingConfig.model_type, LlavaPackingConfig, exist_ok=True)
