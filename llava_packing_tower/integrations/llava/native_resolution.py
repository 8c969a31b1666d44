"""The model's side of native resolution: its settings when training starts, and its images when it is called.

LLaVA's ``prepare_inputs_labels_for_multimodal`` encodes images and then puts their tokens between those of the text.
Only the first half is replaced: the second, with its labels, masks and positions, stays LLaVA's own.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Sequence
from types import ModuleType

import torch

from ...data.native_config import (
    KEYS,
    PREFIX,
    NativeSettings,
    asks_for_native,
    check_settings,
    make_settings,
    settings_of,
)
from ...multimodal.truncation import Truncations
from ...multimodal.visual_inputs import blank_like, fill_slots, read_visuals
from ...multimodal.visual_tokens import TokenLayout, encode_visuals
from .arguments import current_arguments
from .patcher import Patches
from .trainable_parts import is_packing_tower

logger = logging.getLogger(__name__)

OPTIONS = ("mm_projector_type", "mm_patch_merge_type", "mm_newline_position", "mm_spatial_pool_mode")
PREPARE = "prepare_inputs_labels_for_multimodal"


class Encoded:
    """Visual tokens on their way through LLaVA's code, which takes it for a batch of pixels ``[B, C, H, W]``."""

    ndim = 4

    def __init__(self, features: Sequence[torch.Tensor]) -> None:
        self.features = list(features)


def into_model(arch: ModuleType, patches: Patches) -> None:
    """Wrap the three methods of LLaVA's mixins that have to do with images."""
    _wrap_initialize(arch, patches)
    mixin = arch.LlavaMetaForCausalLM
    prepare, encode = getattr(mixin, PREPARE), mixin.encode_images
    signature = inspect.signature(prepare)
    truncations = Truncations()

    @functools.wraps(prepare)
    def prepare_inputs_labels_for_multimodal(self, *args, **kwargs):
        call = signature.bind(self, *args, **kwargs)
        given = call.arguments
        ids, images = given["input_ids"], given["images"]
        tower = self.get_vision_tower()
        if images is None or not is_packing_tower(tower) or not asks_for_native(self.config) or ids.shape[1] == 1:
            return prepare(self, *args, **kwargs)
        features = _encode(self, tower, given, arch.IMAGE_TOKEN_INDEX, truncations)
        given["images"] = Encoded(features)
        given["image_sizes"] = None
        if "modalities" in signature.parameters:
            given["modalities"] = ["image"] * len(ids)  # LLaVA-NeXT drops samples beyond their number
        if given.get("attention_mask") is None and len(ids) > 1:
            # Samples may differ in length now, and without a mask LLaVA would let them see their padding.
            given["attention_mask"] = torch.ones_like(ids)
        return prepare(*call.args, **call.kwargs)

    @functools.wraps(encode)
    def encode_images(self, images, *args, **kwargs):
        return images.features if isinstance(images, Encoded) else encode(self, images, *args, **kwargs)

    patches.set(mixin, PREPARE, prepare_inputs_labels_for_multimodal)
    patches.set(mixin, "encode_images", encode_images)


def into_generate(models: ModuleType, patches: Patches) -> None:
    """Have the models of a host's ``model`` package generate behind left padding.

    LLaVA pads at the side that training used, mostly the right: samples of a batch that differ in their images would
    then go on behind their padding.
    """
    for cls in {id(c): c for c in vars(models).values() if isinstance(c, type)}.values():
        if not (hasattr(cls, PREPARE) and "generate" in vars(cls)):
            continue
        generate = cls.generate

        @functools.wraps(generate)
        def padded_left(self, *args, _generate=generate, **kwargs):
            if not asks_for_native(self.config):
                return _generate(self, *args, **kwargs)
            side = getattr(self.config, "tokenizer_padding_side", "right")
            self.config.tokenizer_padding_side = "left"
            try:
                return _generate(self, *args, **kwargs)
            finally:
                self.config.tokenizer_padding_side = side

        patches.set(cls, "generate", padded_left)


def _encode(
    model: object, tower: torch.nn.Module, given: dict, image_token: int, truncations: Truncations
) -> list[torch.Tensor]:
    """One ``[tokens, hidden]`` for each place that LLaVA fills: every ``<image>``, and every sample without one."""
    ids, mask = given["input_ids"], given.get("attention_mask")
    seen = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    marks = (ids == image_token) & seen
    per_sample = marks.sum(1).tolist()
    visuals = read_visuals(given["images"], given.get("modalities"), given.get("image_sizes"), per_sample)
    if not visuals:
        if any(per_sample):
            raise ValueError(f"no images, but the {len(per_sample)} samples of the batch have {per_sample} <image>")
        # The tower and the projector take part in every step: other ranks, and ZeRO, wait for them.
        visuals = [blank_like(None, tower.image_processor.rule.unit, tower.device)] * len(per_sample)
    inner = model.get_model()
    newline = getattr(inner, "image_newline", None)
    layout = token_layout(model.config, settings_of(model.config))
    features = encode_visuals(tower, inner.mm_projector, visuals, layout, newline)
    slots = fill_slots(features, per_sample)
    limit = getattr(model.config, "tokenizer_model_max_length", None)
    truncations.look(marks, seen, per_sample, [len(slot) for slot in slots], limit)
    return slots


def token_layout(config: object, settings: NativeSettings) -> TokenLayout:
    """How a model's config, or arguments, want its tokens.

    Raises ``ValueError`` for what native resolution cannot carry out.
    """
    check_settings({name: getattr(config, name, None) for name in (*OPTIONS, "add_faster_video")})

    def chosen(name: str, default: object) -> object:
        value = getattr(config, name, None)
        return default if value is None else value

    return TokenLayout(
        clips=settings.video == "clip",
        merge_type=chosen("mm_patch_merge_type", "flat"),
        newline_position=chosen("mm_newline_position", "one_token"),
        pool_stride=chosen("mm_spatial_pool_stride", 2),
        pool_mode=chosen("mm_spatial_pool_mode", "bilinear"),
    )


def _wrap_initialize(arch: ModuleType, patches: Patches) -> None:
    """Have ``initialize_vision_modules`` settle what native resolution means for a run, and note it in the config."""
    original = arch.LlavaMetaModel.initialize_vision_modules

    @functools.wraps(original)
    def initialize_vision_modules(self, model_args, fsdp=None):
        original(self, model_args, fsdp)
        tower = self.get_vision_tower()
        data = current_arguments("DataArguments")
        if not asks_for_native(model_args if data is None else data):
            if is_packing_tower(tower):
                tower.set_native(None)
                for name in KEYS:
                    vars(self.config).pop(PREFIX + name, None)
            return
        if not is_packing_tower(tower):
            raise ValueError("image_aspect_ratio: native needs a packing tower: its name must contain 'packing'")
        check_settings({name: getattr(model_args, name, None) for name in (*OPTIONS, "add_faster_video")})
        nominal = (tower.image_size // tower.config.patch_size) ** 2
        settings = make_settings(model_args, self.config, nominal, getattr(tower.vision_tower, "image_only", False))
        tower.set_native(settings)
        for name, value in settings.items().items():
            setattr(self.config, name, value)
        if (mode := getattr(model_args, "mm_spatial_pool_mode", None)) is not None:
            self.config.mm_spatial_pool_mode = mode
        logger.info("native resolution: %s", tower.image_processor.rule)

    patches.set(arch.LlavaMetaModel, "initialize_vision_modules", initialize_vision_modules)
