"""Have ZeRO-3 gather a decoder layer at once: gathering each of its dozen modules took a third of a step."""

from __future__ import annotations

from types import ModuleType

from torch import nn

from .methods import Call, add_step
from .packed_step import decoder_base
from .patcher import Patches
from .registry import trainer_class
from .trainable_parts import without_adapters


def layer_class(model: nn.Module) -> type[nn.Module] | None:
    """The class of a LLaVA's decoder layers, where transformers' decoders that are known here have them; else None."""
    model = without_adapters(model)
    layers = getattr(model.model, "layers", None) if decoder_base(type(model)) else None
    return type(layers[0]) if layers else None


def gather_by_layer(train: ModuleType, patches: Patches) -> None:
    """Have the host's trainer tell DeepSpeed so before its engine is made.

    The encoder blocks of a packing tower say it themselves (``models.layers.EncoderBlock``).
    """

    def leaves(call: Call) -> None:
        plugin = getattr(call.self.accelerator.state, "deepspeed_plugin", None)
        cls = layer_class(call.self.model) if plugin is not None and plugin.zero_stage == 3 else None
        if cls is not None:
            from deepspeed.utils import set_z3_leaf_modules

            set_z3_leaf_modules(call.self.model, [cls])

    add_step(trainer_class(train), "LLaVATrainer.train", "zero3_leaves", leaves, patches)
