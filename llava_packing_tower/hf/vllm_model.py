"""Exports in vLLM: its Transformers modeling backend, with four differences.

The packed tower and the projector stay as they are (vLLM would take their layers for parts of the decoder). The tokens
of images may lie beyond the vocabulary. An image's tiles depend on whether it is alone in its prompt, and so does what
is cached of it. A mixture of experts is refused by name.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn
from vllm.model_executor.models.transformers import TransformersMultiModalForCausalLM
from vllm.model_executor.models.transformers.multimodal import (
    MultiModalDummyInputsBuilder,
    MultiModalProcessingInfo,
    MultiModalProcessor,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from .processing import IMAGE, VIDEO

OWN = ("vision_tower", "mm_projector")
EXPERTS = ("num_experts", "num_local_experts")


class LlavaPackingVllmProcessor(MultiModalProcessor):
    """vLLM processes images one by one and keeps what comes out: the option ``alone`` is part of what it is kept by."""

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        if not self.info.get_hf_processor().image_processor.settings.is_native:
            count = sum(len(items) for items in inputs.mm_data_items.values())
            inputs = replace(inputs, hf_processor_mm_kwargs={**inputs.hf_processor_mm_kwargs, "alone": count == 1})
        return super().apply(inputs, timing_ctx)


@MULTIMODAL_REGISTRY.register_processor(
    LlavaPackingVllmProcessor, info=MultiModalProcessingInfo, dummy_inputs=MultiModalDummyInputsBuilder
)
class LlavaPackingForVllm(TransformersMultiModalForCausalLM):
    """The export's own classes, with vLLM's attention and layers in the decoder."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        config = vllm_config.model_config.hf_config
        if any(getattr(config.text_config, name, None) for name in EXPERTS):
            raise ValueError(f"a decoder with experts ({config.text_config.model_type}) is not served")
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        visual = [config.image_token_id, config.video_token_id]
        self.configure_mm_token_handling(config.text_config.vocab_size, visual)

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        return {"image": IMAGE, "video": VIDEO}.get(modality)

    def recursive_replace(self) -> None:
        kept = {name: getattr(self.model, name) for name in OWN}
        for name in OWN:
            setattr(self.model, name, nn.Identity())
        try:
            super().recursive_replace()
        finally:
            for name, module in kept.items():
                setattr(self.model, name, module)
