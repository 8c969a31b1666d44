"""Config fields of weights that come without transformers' config.json: from their shapes, and from timm's."""

from __future__ import annotations

from collections.abc import Mapping

from ..data.timm_processor import timm_part

Shapes = Mapping[str, tuple[int, ...]]

# timm's arguments of a model that say the same as its tensors, or nothing about the features of its patches.
_TOLD_BY_TENSORS = (
    *("depth", "embed_dim", "img_size", "in_chans", "patch_size", "num_reg_tokens", "mlp_ratio", "qkv_bias"),
    *("num_classes", "global_pool", "dynamic_img_size", "dynamic_img_pad", "drop_rate", "proj_drop_rate"),
    *("attn_drop_rate", "drop_path_rate", "pos_drop_rate", "patch_drop_rate", "fc_norm", "use_fc_norm"),
    "strict_img_size",
)


def heads_of(raw: Mapping, hidden_size: int, published: Mapping[int, int], whose: str) -> int:
    """The number of attention heads, which weights do not contain: as given, else that of the published size.

    raw: with ``num_attention_heads``, or timm's ``model_args``. Raises ``ValueError`` for an unpublished size.
    """
    arguments = timm_part(raw, "model_args")
    found = raw.get("num_attention_heads", arguments.get("num_heads", published.get(hidden_size)))
    if found is None:
        sizes = ", ".join(map(str, published))
        raise ValueError(
            f"the number of attention heads cannot be read from weights, and {whose} is published in the widths "
            f"{sizes}, not {hidden_size}: give num_attention_heads (llava-packing convert --num_attention_heads)"
        )
    return int(found)


def timm_arguments(raw: Mapping, known: tuple[str, ...] = ("num_heads",)) -> dict:
    """The ``model_args`` of timm's config.json, where they are of the ``known`` ones.

    Raises ``ValueError`` for others that could change the features.
    """
    arguments = timm_part(raw, "model_args")
    if strange := sorted(set(arguments) - set(known) - set(_TOLD_BY_TENSORS)):
        told = ", ".join(f"{name} {arguments[name]!r}" for name in strange)
        raise ValueError(f"timm's model_args have {told}, which the packed encoder does not have")
    return {name: value for name, value in arguments.items() if name in known}


def timm_image_size(raw: Mapping, otherwise: int) -> int:
    """The side in pixels that timm's config.json names for the model."""
    size = (timm_part(raw, "pretrained_cfg") or raw).get("input_size")
    return int(size[-1]) if isinstance(size, (list, tuple)) and len(size) == 3 else otherwise


def shape_of(shapes: Shapes, name: str, dimensions: int) -> tuple[int, ...]:
    """The shape of a tensor that the sizes are read from. Raises ``ValueError`` where it is missing or another."""
    shape = shapes.get(name)
    if shape is None or len(shape) != dimensions or 0 in shape:
        raise ValueError(f"{name} should have {dimensions} dimensions, found {shape and list(shape)}")
    return shape


def patch_of(shapes: Shapes, name: str) -> dict[str, int]:
    """Width, channels and patch size, from the weight of a patch convolution ``[hidden, channels, patch, patch]``."""
    hidden, channels, rows, columns = shape_of(shapes, name, 4)
    if rows != columns:
        raise ValueError(f"{name} should have square patches, found {rows} x {columns}")
    return {"hidden_size": hidden, "num_channels": channels, "patch_size": rows}
