"""The JSON of an export: config.json, preprocessor_config.json, processor_config.json, generation_config.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import CONFIG_MAPPING

from ..data.images import reading_of
from ..hf import ARCHITECTURE, MODEL_TYPE
from ..hf.visual_settings import fields_of
from ..integrations.llava.batched_inference import reads_videos
from ..integrations.llava.inference import trains_with_lists

CLASSES = {
    "AutoConfig": "configuration:LlavaPackingConfig",
    "AutoModel": "modeling:LlavaPackingModel",
    "AutoModelForImageTextToText": "modeling:LlavaPackingForConditionalGeneration",
    "AutoProcessor": "processing:LlavaPackingProcessor",
    "AutoImageProcessor": "image_processing:LlavaPackingImageProcessor",
}
"""Auto class -> module of ``hf`` and class."""
# Names that transformers 5 gave to what older versions read under another.
_NOT_WRITTEN = ("transformers_version", "torch_dtype", "dtype", "architectures", "_name_or_path", "rope_parameters")


def text_config(config: object, model_type: str, vocabulary: int) -> dict[str, Any]:
    """The decoder's part of a LLaVA's config, in the words that every version of transformers reads.

    config: of the loaded LLaVA. vocabulary: rows of its embeddings.
    """
    plain = CONFIG_MAPPING[model_type]()
    known = {*plain.to_dict(), *vars(plain)}
    values = {key: value for key, value in config.to_dict().items() if key in known and key not in _NOT_WRITTEN}
    values.update(model_type=model_type, vocab_size=vocabulary)
    values.update(rope_of(config))
    return {key: value for key, value in values.items() if not key.startswith("_")}


def rope_of(config: object) -> dict[str, Any]:
    """``rope_theta`` and ``rope_scaling``, which transformers 5 has as ``rope_parameters``."""
    together = getattr(config, "rope_parameters", None)
    if not isinstance(together, Mapping):
        return {
            "rope_theta": getattr(config, "rope_theta", 10000.0),
            "rope_scaling": getattr(config, "rope_scaling", None),
        }
    scaling = {key: value for key, value in together.items() if key != "rope_theta"}
    is_plain = scaling.get("rope_type", "default") == "default"
    return {"rope_theta": together.get("rope_theta", 10000.0), "rope_scaling": None if is_plain else scaling}


def model_config(model: torch.nn.Module, text: Mapping[str, Any], ids: Sequence[int], dtype: str) -> dict[str, Any]:
    """config.json. model: the loaded LLaVA; ids: of ``<image>`` and ``<video>``."""
    tower = model.get_vision_tower()
    return {
        "model_type": MODEL_TYPE,
        "architectures": [ARCHITECTURE],
        "dtype": dtype,
        "tie_word_embeddings": bool(text.get("tie_word_embeddings", False)),
        "image_token_id": ids[0],
        "video_token_id": ids[1],
        "text_config": {**text, "dtype": dtype},
        "vision_config": tower_config(tower),
        "mm_vision_select_layer": tower.select_layer,
        "mm_vision_select_feature": tower.select_feature,
        **visual_keys(model),
    }


def tower_config(tower: object) -> dict[str, Any]:
    """The tower's own configuration, without what transformers gives to every config."""
    from ..checkpoint.pretrained import config_content

    model = tower.vision_tower
    content = config_content(type(model), model.config, tower.dtype)
    return {
        key: value for key, value in content.items() if key not in ("transformers_version", "architectures", "dtype")
    }


def visual_keys(model: torch.nn.Module) -> dict[str, Any]:
    """The keys that say how images become tokens; two of them depend on the LLaVA."""
    values = fields_of(vars(model.config))
    return {**values, "mm_newline_after_image": trains_with_lists(model), "mm_reads_videos": reads_videos(model)}


def processor_content(model: torch.nn.Module) -> dict[str, Any]:
    """preprocessor_config.json."""
    tower = model.get_vision_tower()
    processor = tower.image_processor
    base = {key: value for key, value in processor.to_dict().items() if key != "patch_size"}
    return {
        **base,
        "size": dict(base["size"]),
        "image_processor_type": "LlavaPackingImageProcessor",
        "processor_class": "LlavaPackingProcessor",
        "tower_patch_size": tower.config.patch_size,
        "tower_image_size": tower.config.image_size,
        "patch_layout": tower.vision_tower.patch_layout.name.lower(),
        "tower_frames_per_patch": tower.vision_tower.frames_per_patch,
        "tower_stretches_clips": tower.vision_tower.stretches_clips,
        **visual_keys(model),
        **reading_of(model.config, is_checkpoint=True).items(),
    }


def auto_map(prefix: str) -> dict[str, str]:
    """For folders that bring their code: Auto class -> file and class."""
    return {auto: f"{prefix}hf_{place.replace(':', '.')}" for auto, place in CLASSES.items()}


def generation_content(model: object, pad: int | None) -> dict[str, Any]:
    """generation_config.json, as the LLaVA has it, without defaults: they are not the same in every transformers."""
    content = model.generation_config.to_diff_dict()
    dropped = ("transformers_version", "_from_model_config")
    content = {key: value for key, value in content.items() if key not in dropped and value is not None}
    return {**content, **({} if pad is None else {"pad_token_id": pad})}
