"""Which hidden states a LLaVA tower returns: ``mm_vision_select_layer`` and ``mm_vision_select_feature``."""

from __future__ import annotations

_PATCH, _FOUR, _SLICE = ("patch", "cls_patch"), "slicefour_", "slice_m25811_f6_"
SELECT_FEATURES = tuple(prefix + name for prefix in ("", _FOUR, _SLICE) for name in _PATCH)


def selected_layers(select_feature: str, select_layer: int, num_layers: int) -> tuple[int, ...]:
    """Indices of the hidden states whose concatenation (on the feature axis, in this order) is the tower's output.

    There are ``num_layers + 1`` hidden states: 0 is the input of the first block, i the output of block i.

    * ``patch``, ``cls_patch``: the one at ``select_layer`` (no family returns a CLS token, so both are the same).
    * ``slicefour_*``: with ``k = (num_layers + 1) // 4`` those at ``k + select_layer``, ``2k + select_layer``, ...
    * ``slice_m25811_f6_*``: -2, -5, -8, -11 and 6, whatever ``select_layer`` is.

    (LLaVA-NeXT's CLIP encoder, the original packing tower.)

    Raises:
        ValueError: an unknown ``select_feature``, or an index outside the hidden states.
    """
    if select_feature not in SELECT_FEATURES:
        raise ValueError(f"Unexpected select feature: {select_feature}; choose one of {', '.join(SELECT_FEATURES)}")
    count = num_layers + 1
    if select_feature.startswith(_SLICE):
        wanted = [-2, -5, -8, -11, 6]
    elif select_feature.startswith(_FOUR):
        step = count // 4
        wanted = list(range(step + select_layer, count, step)) if step else []
        if not wanted or wanted[0] < 0:
            raise ValueError(
                f"{select_feature} with mm_vision_select_layer {select_layer} and {num_layers} layers would select "
                f"hidden states {wanted}"
            )
    else:
        wanted = [select_layer]
    for index in wanted:
        if not -count <= index < count:
            raise ValueError(
                f"{select_feature} selects hidden state {index}, but a tower of {num_layers} layers has only "
                f"{-count} to {count - 1} (mm_vision_select_layer is {select_layer})"
            )
    return tuple(index % count for index in wanted)
