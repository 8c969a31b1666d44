"""The model's side of native resolution: its settings when training starts, and its images when it is called.

LLaVA's ``prepare_inputs_labels_for_multimodal`` encodes images and then puts their tokens between those of the text.
Only the first half is replaced: the second, with its labels, masks and positions, stays LLaVA's own.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from contextvars import ContextVar
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
from ...multimodal.visual_inputs import blank_like, fill_slots, read_visuals, with_positions
from ...multimodal.visual_tokens import TokenLayout, encode_visuals
from .arguments import current_arguments
from .host import PREPARE
from .methods import Call, add_step
from .patcher import Patches
from .registry import host_of, host_of_model, meta_model, mixin
from .trainable_parts import is_packing_tower

logger = logging.getLogger(__name__)

OPTIONS = ("mm_projector_type", "mm_patch_merge_type", "mm_newline_position", "mm_spatial_pool_mode")


_encoded: ContextVar[Features | None] = ContextVar("what encode_images answers", default=None)


class Features(list):
    """The visual tokens ``[tokens, hidden]`` of each image: what ``encode_images`` returns for a batch of pixels."""

    def to(self, *args: object, **kwargs: object) -> Features:
        return Features(tokens.to(*args, **kwargs) for tokens in self)


class Encoded:
    """Images whose tokens are there already: LLaVA's code takes this for a batch of pixels ``[B, C, H, W]``."""

    ndim = 4


def into_model(arch: ModuleType, patches: Patches) -> None:
    """Add what native resolution does in the three methods of LLaVA's mixins that have to do with images."""
    owner, host = mixin(arch), host_of(arch)
    takes = inspect.signature(getattr(owner, PREPARE)).parameters
    truncations = Truncations()

    def native_images(call: Call) -> Iterator[None]:
        self, given = call.self, call.arguments
        ids, images = given["input_ids"], given.get("images")
        tower = self.get_vision_tower()
        if images is None or not is_packing_tower(tower) or not asks_for_native(self.config) or ids.shape[1] == 1:
            yield
            return
        features = Features(_encode(self, tower, given, arch.IMAGE_TOKEN_INDEX, truncations))
        given["images"] = [torch.empty(1, 1, 1)] * len(features) if host.sorts_images else Encoded()
        # What is left of them has been read; LLaVA-NeXT drops samples beyond the number of modalities.
        unread = {"image_sizes": None, "grid_thw": None, "patch_positions": None, "modalities": ["image"] * len(ids)}
        given.update({name: value for name, value in unread.items() if name in takes})
        if given.get("attention_mask") is None and len(ids) > 1:
            # Samples may differ in length now, and without a mask LLaVA would let them see their padding.
            given["attention_mask"] = torch.ones_like(ids)
        token = _encoded.set(features)
        try:
            yield
        finally:
            _encoded.reset(token)

    def native_features(call: Call) -> None:
        if (features := _encoded.get()) is not None:
            call.result = features

    initialize = "LlavaMetaModel.initialize_vision_modules"
    add_step(meta_model(arch), initialize, "native_settings", native_settings, patches)
    add_step(owner, f"LlavaMetaForCausalLM.{PREPARE}", "native_images", native_images, patches)
    add_step(owner, "LlavaMetaForCausalLM.encode_images", "native_features", native_features, patches)


def into_generate(models: ModuleType, patches: Patches) -> None:
    """Have the models of a host's ``model`` package generate behind left padding.

    LLaVA pads at the side that training used, mostly the right: samples of a batch that differ in their images would
    then go on behind their padding.
    """
    for cls in {id(c): c for c in vars(models).values() if isinstance(c, type)}.values():
        if not (hasattr(cls, PREPARE) and "generate" in vars(cls)):
            continue
        add_step(cls, "LlavaForCausalLM.generate", "pad_left", pad_left, patches)


def pad_left(call: Call) -> Iterator[None]:
    """See :func:`into_generate`."""
    config = call.self.config
    if not asks_for_native(config):
        yield
        return
    side = getattr(config, "tokenizer_padding_side", "right")
    config.tokenizer_padding_side = "left"
    try:
        yield
    finally:
        config.tokenizer_padding_side = side


def _encode(
    model: object, tower: torch.nn.Module, given: dict, image_token: int, truncations: Truncations
) -> list[torch.Tensor]:
    """One ``[tokens, hidden]`` for each place that LLaVA fills: every ``<image>``, and every sample without one."""
    ids, mask = given["input_ids"], given.get("attention_mask")
    seen = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    marks = (ids == image_token) & seen
    per_sample = marks.sum(1).tolist()
    visuals = read_visuals(given["images"], given.get("modalities"), given.get("image_sizes"), per_sample)
    visuals = with_positions(visuals, given.get("patch_positions"), tower.config.patch_size)
    if not visuals:
        if any(per_sample):
            raise ValueError(f"no images, but the {len(per_sample)} samples of the batch have {per_sample} <image>")
        # The tower and the projector take part in every step: other ranks, and ZeRO, wait for them.
        visuals = [blank_like(None, tower.image_processor.rule.unit, tower.device)] * len(per_sample)
    inner = model.get_model()
    newline = getattr(inner, "image_newline", None)
    layout = token_layout(model.config, settings_of(model.config))
    part = host_of_model(model).image_projector
    projector = inner.mm_projector if part is None else getattr(inner.mm_projector, part)
    features = encode_visuals(tower, projector, visuals, layout, newline)
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


def native_settings(call: Call) -> Iterator[None]:
    """After ``initialize_vision_modules``: settle what native resolution means for a run, and note it in the config."""
    yield
    config, tower, model_args = call.self.config, call.self.get_vision_tower(), call.arguments["model_args"]
    data = current_arguments("DataArguments")
    if not asks_for_native(model_args if data is None else data):
        if is_packing_tower(tower):
            tower.set_native(None)
            for name in KEYS:
                vars(config).pop(PREFIX + name, None)
        return
    if not is_packing_tower(tower):
        raise ValueError("image_aspect_ratio: native needs a packing tower: its name must contain 'packing'")
    check_settings({name: getattr(model_args, name, None) for name in (*OPTIONS, "add_faster_video")})
    nominal = (tower.image_size // tower.config.patch_size) ** 2
    settings = make_settings(model_args, config, nominal, getattr(tower.vision_tower, "image_only", False), tower.merge)
    tower.set_native(settings)
    for name, value in settings.items().items():
        setattr(config, name, value)
    if (mode := getattr(model_args, "mm_spatial_pool_mode", None)) is not None:
        config.mm_spatial_pool_mode = mode
    logger.info("native resolution: %s", tower.image_processor.rule)
