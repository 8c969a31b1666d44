"""Do the values of a config.json have the types that the encoder computes with?"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

from transformers import PretrainedConfig


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_float(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf


# By what the signature of a config says of a field; None beside a type allows null.
_RULES: dict[str, tuple[Callable[[object], bool], str]] = {
    "int": (_is_int, "a whole number, 0 or more"),
    "float": (_is_float, "a number, 0 or more"),
    "bool": (lambda value: isinstance(value, bool), "true or false"),
    "str": (lambda value: isinstance(value, str), "a text"),
}
_LARGEST = {
    "num_hidden_layers": 1024,
    "num_channels": 1024,
    "patch_size": 1024,
    "num_attention_heads": 8192,
    "hidden_size": 1 << 16,
    "image_size": 1 << 16,
    "num_register_tokens": 1 << 16,
    "intermediate_size": 1 << 20,
    "num_patches": 1 << 24,
}
"""Far beyond every published encoder: a larger value is a mistake, and would cost memory before anything notices."""
_NOT_ZERO = ("rope_theta", "image_size", "patch_size", "num_channels", "num_attention_heads", "hidden_size")


DROPOUTS = ("attention_dropout", "drop_path_rate")
"""Fields of transformers' configs for training, which the encoders here do not have: see :func:`check_rate`."""


def one_side(name: str, value: Any) -> Any:
    """A side in pixels, from a number or, as transformers also writes it, a list of equal ones.

    Raises ``ValueError`` for a list of different ones. Anything else is left to :func:`check_config`.
    """
    if not isinstance(value, (list, tuple)):
        return value
    if len(value) not in (1, 2) or len(set(value)) != 1:
        raise ValueError(f"{name} must be one number of pixels or two equal ones, got {list(value)}")
    return value[0]


def check_rate(name: str, rate: Any) -> None:
    """Raises ``ValueError`` for a dropout that is not a probability below 1. A valid one has no effect in inference,
    and training warns that it has none there either (``StrictPreTrainedModel.train``)."""
    if not _is_float(rate) or rate >= 1:
        raise ValueError(f"{name} must be a probability from 0 to below 1, got {rate!r}")


def refuse_unknown(vision: Mapping, known: Collection[str]) -> None:
    """Raises ``ValueError`` for fields of a VLM's vision config that are not known: they may mean another network."""
    common = (*PretrainedConfig().to_dict(), "model_type", "torch_dtype", "dtype", "attn_implementation")
    if strange := sorted(set(vision) - set(known) - set(common)):
        raise ValueError(
            f"its vision_config has fields that are not known here: "
            f"{', '.join(f'{name} {vision[name]!r}' for name in strange)}"
        )


def axial_theta(vision: Mapping, default: float) -> Any:
    """The base of 2-D rotary positions in a vision config. Raises ``ValueError`` for positions of another kind."""
    rope = {**(vision.get("rope_scaling") or {}), **(vision.get("rope_parameters") or {})}
    kind = rope.get("rope_type", rope.get("type", "axial"))
    if kind not in ("axial", "default"):
        raise ValueError(f"its vision_config has rotary positions of the type {kind!r}; this tower's are 'axial'")
    return rope.get("rope_theta", vision.get("rope_theta", default))


def check_config(config: PretrainedConfig, where: object) -> None:
    """Raises ``ValueError`` with the field, its value and what it should be. Fields of unknown types are let pass."""
    parameters: dict[str, inspect.Parameter] = {}
    for cls in type(config).__mro__:
        if cls is PretrainedConfig:
            break
        parameters = {**inspect.signature(cls).parameters, **parameters}
    for name, parameter in parameters.items():
        kind, _, rest = str(parameter.annotation).partition(" | ")
        value = getattr(config, name, None)
        if kind not in _RULES or (value is None and rest == "None"):
            continue
        fits, wanted = _RULES[kind]
        if not fits(value):
            raise ValueError(f"{where}: {name} in its config is {value!r:.80}, it should be {wanted}")
        if name in _NOT_ZERO and value == 0:
            raise ValueError(f"{where}: {name} in its config is {value!r}, it cannot be zero")
        if name in _LARGEST and isinstance(value, int) and value > _LARGEST[name]:
            raise ValueError(f"{where}: {name} in its config is {value!r:.40}, beyond the largest, {_LARGEST[name]}")
