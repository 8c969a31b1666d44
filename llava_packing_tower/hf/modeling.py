"""An exported LLaVA as a model of transformers: packed tower, projector, decoder."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast

from ..data.positions import compute_patch_positions_with_interpolated_temporal
from ..data.segments import Grid, read_grid
from ..models.registry import family_for
from ..multimodal.projectors import MergingProjector
from ..towers.feature_select import selected_layers
from .configuration import LlavaPackingConfig
from .layout import arrange_visuals, video_tokens
from .penalty import KnownTokensPenalty
from .projectors import build_projector

IGNORE = -100
VISUALS = (
    "pixel_values",
    "image_grid_thw",
    "image_sizes",
    "pixel_values_videos",
    "video_grid_thw",
    "video_frame_positions",
)
TIED = {"lm_head.weight": "model.language_model.embed_tokens.weight"}


class LlavaPackingPreTrainedModel(PreTrainedModel):
    """What both models below share."""

    config_class = LlavaPackingConfig
    base_model_prefix = "model"
    input_modalities = ("image", "video", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["EncoderBlock"]  # noqa: RUF012 (as in transformers)
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_flash_attn_2 = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _supports_static_cache = True
    _supports_cache_class = True

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, LlavaPackingModel) and module.image_newline is not None:
            nn.init.normal_(module.image_newline, std=1 / math.sqrt(len(module.image_newline)))


class LlavaPackingModel(LlavaPackingPreTrainedModel):
    """The model without its head. Names of weights below it are LLaVA's own."""

    def __init__(self, config: LlavaPackingConfig) -> None:
        super().__init__(config)
        width = config.text_config.hidden_size
        layers = selected_layers(
            config.mm_vision_select_feature, config.mm_vision_select_layer, config.vision_config.num_hidden_layers
        )
        self.vision_tower = family_for(config.vision_config.model_type)(config.vision_config)
        self.mm_projector = build_projector(
            config.mm_projector_type,
            config.vision_config.hidden_size * len(layers),
            width,
            config.mm_packing_projector,
        )
        self.language_model = AutoModel.from_config(config.text_config)
        self.image_newline = nn.Parameter(torch.zeros(width)) if config.settings.has_newlines else None
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_decoder(self) -> nn.Module:
        return self.language_model

    def set_decoder(self, decoder: nn.Module) -> None:
        self.language_model = decoder

    # ---------------------------------------------------------------- images and videos

    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        image_grid_thw: torch.Tensor,
        image_sizes: Sequence[torch.Tensor] | torch.Tensor | None = None,
        **_: Any,
    ) -> BaseModelOutputWithPooling:
        """Visual tokens of images, from one packed pass through the tower.

        Args:
            pixel_values: ``[N, channels * patch ** 2]``, the rows of all images.
            image_grid_thw: ``[images, 3]`` (tiles, rows, columns of patches).
            image_sizes: (width, height) of each image as opened; needed for ``anyres``.

        Returns:
            ``last_hidden_state``: what the projector made, ``[tokens, hidden]``; ``pooler_output``: a list of the
            tokens ``[n, hidden]`` of each image.
        """
        grids = read_grid(image_grid_thw, len(pixel_values))
        sizes = None if image_sizes is None else [tuple(int(n) for n in size) for size in image_sizes]
        tiles = [(1, h, w) for t, h, w in grids for _ in range(t)]
        return self._features(pixel_values, tiles, grids, sizes, False, None)

    def get_video_features(
        self,
        pixel_values_videos: torch.Tensor,
        video_grid_thw: torch.Tensor,
        video_frame_positions: Sequence[torch.Tensor] | None = None,
        **_: Any,
    ) -> BaseModelOutputWithPooling:
        """As :meth:`get_image_features`, for videos: ``video_grid_thw`` (frames or temporal patches, rows, columns),
        and where the frames of a clip see each other their places in time, ``[frames]`` of each (not read by towers
        that have no use for them).
        """
        grids = read_grid(video_grid_thw, len(pixel_values_videos))
        native = self.config.settings.native
        if native is None or native.video != "clip":
            frames = [(1, h, w) for t, h, w in grids for _ in range(t)]
            return self._features(pixel_values_videos, frames, grids, None, True, None)
        if not self.vision_tower.takes_positions:
            return self._features(pixel_values_videos, grids, grids, None, True, None)
        if video_frame_positions is None or len(video_frame_positions) != len(grids):
            raise ValueError(f"{len(grids)} videos need the places of their frames (video_frame_positions)")
        positions = [
            compute_patch_positions_with_interpolated_temporal(places.cpu()[None], h, w)
            for places, (_, h, w) in zip(video_frame_positions, grids)
        ]
        return self._features(pixel_values_videos, grids, grids, None, True, torch.cat(positions).float())

    def _features(
        self,
        rows: torch.Tensor,
        segments: Sequence[Grid],
        grids: Sequence[Grid],
        sizes: Sequence[tuple[int, ...]] | None,
        is_video: bool,
        positions: torch.Tensor | None,
    ) -> BaseModelOutputWithPooling:
        """segments: the grids of what the tower sees at once. grids: those of the images or videos."""
        config, tower = self.config, self.vision_tower
        layers = selected_layers(
            config.mm_vision_select_feature, config.mm_vision_select_layer, config.vision_config.num_hidden_layers
        )
        given = {} if positions is None else {"patch_positions": positions}
        states = tower(
            hidden_states=rows.to(tower.dtype),
            grid_thw=torch.tensor(segments, dtype=torch.int64, device="cpu"),
            feature_layers=layers,
            **given,
        )
        features = states[0] if len(states) == 1 else torch.cat(states, dim=-1)
        merging = isinstance(self.mm_projector, MergingProjector)
        tokens = self.mm_projector(features, segments) if merging else self.mm_projector(features)
        parts = arrange_visuals(tokens, grids, sizes, is_video, config.settings, self.image_newline)
        return BaseModelOutputWithPooling(last_hidden_state=tokens, pooler_output=parts)

    def token_counts(self, image_grid_thw: Any, image_sizes: Any, video_grid_thw: Any) -> tuple[list[int], list[int]]:
        """The numbers of visual tokens of images and of videos."""
        settings = self.config.settings
        images = [] if image_grid_thw is None else read_grid(image_grid_thw)
        sizes = [None] * len(images) if image_sizes is None else [tuple(int(n) for n in s) for s in image_sizes]
        videos = [] if video_grid_thw is None else read_grid(video_grid_thw)
        return (
            [settings.image_tokens(grid, size) for grid, size in zip(images, sizes)],
            [video_tokens(grid, settings) for grid in videos],
        )

    # ---------------------------------------------------------------- forward

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Embeddings of ids, of which those of images and videos (without an embedding of their own) are replaced."""
        config = self.config
        visual = (input_ids == config.image_token_id) | (input_ids == config.video_token_id)
        return self.get_input_embeddings()(input_ids.masked_fill(visual, 0))

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        image_sizes: Sequence[torch.Tensor] | torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        video_grid_thw: torch.Tensor | None = None,
        video_frame_positions: Sequence[torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """The decoder's output, with the visual tokens in the places of theirs.

        ``kwargs`` (the cache, ``use_cache``, ``output_hidden_states`` ...) go to the decoder. Raises ``ValueError``
        where the ids have more or fewer places than the images have tokens.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed(input_ids)
        if pixel_values is not None:
            made = self.get_image_features(pixel_values, image_grid_thw, image_sizes)
            inputs_embeds = self._put(inputs_embeds, input_ids, self.config.image_token_id, made.pooler_output)
        if pixel_values_videos is not None:
            made = self.get_video_features(pixel_values_videos, video_grid_thw, video_frame_positions)
            inputs_embeds = self._put(inputs_embeds, input_ids, self.config.video_token_id, made.pooler_output)
        return self.language_model(
            attention_mask=attention_mask, position_ids=position_ids, inputs_embeds=inputs_embeds, **kwargs
        )

    @staticmethod
    def _put(
        embeddings: torch.Tensor, ids: torch.Tensor | None, token: int, parts: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        if ids is None:
            raise ValueError("images and videos need input_ids, which say where they are")
        mask, features = ids == token, torch.cat(list(parts))
        if (places := int(mask.sum())) != len(features):
            raise ValueError(
                f"the ids have {places} places (token {token}), but {len(parts)} images or videos have {len(features)} "
                f"tokens: prepare texts and images together, by the processor"
            )
        features = features.to(embeddings)
        return embeddings.masked_scatter(mask.unsqueeze(-1).expand_as(embeddings), features)


class LlavaPackingForConditionalGeneration(LlavaPackingPreTrainedModel, GenerationMixin):
    """The model with its head."""

    _tied_weights_keys = list(TIED) if transformers.__version__.startswith("4.") else TIED

    def __init__(self, config: LlavaPackingConfig) -> None:
        super().__init__(config)
        self.model = LlavaPackingModel(config)
        self.vocab_size = config.text_config.vocab_size
        self.lm_head = nn.Linear(config.text_config.hidden_size, self.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value

    def get_decoder(self) -> nn.Module:
        return self.model.get_decoder()

    def get_image_features(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPooling:
        return self.model.get_image_features(*args, **kwargs)

    def get_video_features(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPooling:
        return self.model.get_video_features(*args, **kwargs)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        image_sizes: Sequence[torch.Tensor] | torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        video_grid_thw: torch.Tensor | None = None,
        video_frame_positions: Sequence[torch.Tensor] | None = None,
        past_key_values: Any = None,
        cache: Any = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        return_dict: bool | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """Logits, and with ``labels`` the loss; see :meth:`LlavaPackingModel.forward`.

        past_key_values, cache: the cache, under the name that this version of transformers has for it.
        labels: ids to predict, -100 where none is; those at the places of images and videos never count.
        """
        caches = {"past_key_values": past_key_values, "cache": cache}
        kwargs.update({name: value for name, value in caches.items() if value is not None})
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            pixel_values=pixel_values,
            image_grid_thw=image_grid_thw,
            image_sizes=image_sizes,
            pixel_values_videos=pixel_values_videos,
            video_grid_thw=video_grid_thw,
            video_frame_positions=video_frame_positions,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else slice(None)
        kept = logits_to_keep if isinstance(logits_to_keep, torch.Tensor) else kept
        logits = self.lm_head(outputs[0][:, kept, :])
        loss = None
        if labels is not None:
            places = (labels == self.config.image_token_id) | (labels == self.config.video_token_id)
            loss = self.loss_function(
                logits=logits,
                labels=labels.masked_fill(places, IGNORE),
                vocab_size=self.vocab_size,
                num_items_in_batch=num_items_in_batch,
            )
        known = {field.name for field in fields(CausalLMOutputWithPast)}
        rest = {name: value for name, value in outputs.items() if name in known}
        result = CausalLMOutputWithPast(loss=loss, logits=logits, **rest)
        return result.to_tuple() if return_dict is False else result

    # ---------------------------------------------------------------- generate

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers does it, also with a ``repetition_penalty`` where ids of images are beyond the logits."""
        config = kwargs.get("generation_config") or self.generation_config
        penalty = kwargs.get("repetition_penalty", getattr(config, "repetition_penalty", None)) or 1.0
        if penalty != 1.0 and max(self.config.image_token_id, self.config.video_token_id) >= self.vocab_size:
            own = [*(kwargs.get("logits_processor") or ()), KnownTokensPenalty(penalty, self.vocab_size)]
            kwargs.update(repetition_penalty=1.0, logits_processor=LogitsProcessorList(own))
        return super().generate(*args, **kwargs)

    def prepare_inputs_for_generation(
        self, input_ids: torch.Tensor, *args: Any, inputs_embeds: torch.Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """As transformers does it; images are encoded with the prompt alone."""
        inputs = super().prepare_inputs_for_generation(input_ids, *args, inputs_embeds=inputs_embeds, **kwargs)
        cache = inputs.get("cache", inputs.get("past_key_values"))
        if cache is not None and cache.get_seq_length() > 0:
            for name in VISUALS:
                inputs.pop(name, None)
        return inputs

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.LongTensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.LongTensor | None, dict[str, Any]]:
        """Beams and several sequences: the images of a sample are repeated with it, not row by row."""
        visuals = {name: kwargs.pop(name) for name in VISUALS if kwargs.get(name) is not None}
        if visuals and expand_size > 1:
            visuals = self._repeated(visuals, input_ids, expand_size)
        input_ids, kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **kwargs
        )
        return input_ids, {**kwargs, **visuals}

    def _repeated(self, visuals: dict[str, Any], ids: torch.Tensor, times: int) -> dict[str, Any]:
        config, result = self.config, dict(visuals)
        counts = self.model.token_counts(*(visuals.get(n) for n in ("image_grid_thw", "image_sizes", "video_grid_thw")))
        kinds = (
            (config.image_token_id, counts[0], "pixel_values", "image_grid_thw", "image_sizes"),
            (config.video_token_id, counts[1], "pixel_values_videos", "video_grid_thw", "video_frame_positions"),
        )
        for token, tokens, pixels, grids, extra in kinds:
            if pixels not in visuals:
                continue
            order, first = [], 0
            for places in (ids == token).sum(1).tolist():
                last = first
                while places > 0:
                    places, last = places - tokens[last], last + 1
                order += list(range(first, last)) * times
                first = last
            rows = visuals[pixels].split(visuals[grids].prod(-1).tolist())
            result[pixels] = torch.cat([rows[index] for index in order])
            result[grids] = visuals[grids][order]
            if extra in visuals:
                result[extra] = [visuals[extra][index] for index in order]
        return result


AutoModel.register(LlavaPackingConfig, LlavaPackingModel, exist_ok=True)
AutoModelForImageTextToText.register(LlavaPackingConfig, LlavaPackingForConditionalGeneration, exist_ok=True)
