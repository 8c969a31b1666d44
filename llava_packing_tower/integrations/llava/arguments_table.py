"""The arguments that the plugin adds to a host. A plain table: reading it needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class PluginArgument(NamedTuple):
    """An argument that hosts may lack: it is added to dataclass ``group`` of those that do."""

    name: str
    group: str
    annotation: str
    default: Any
    help: str


PLUGIN_ARGUMENTS: tuple[PluginArgument, ...] = (
    PluginArgument(
        "mm_tunable_parts",
        "ModelArguments",
        "Optional[str]",
        None,
        "the parts that are trained, joined by commas",
    ),
    PluginArgument("unfreeze_mm_vision_tower", "ModelArguments", "bool", False, "train the vision tower as well"),
    PluginArgument(
        "mm_packing_attention",
        "ModelArguments",
        "str",
        "auto",
        "attention backend of a packing tower",
    ),
    PluginArgument(
        "mm_packing_compile",
        "ModelArguments",
        "bool",
        True,
        "run the encoder blocks of a packing tower as fused kernels, in half precision on CUDA; false runs them eager",
    ),
    PluginArgument(
        "mm_packing_fusion",
        "ModelArguments",
        "Optional[str]",
        None,
        "how the features of several towers (packing:A + packing:B) are joined: channel (the default)",
    ),
    PluginArgument(
        "mm_packing_encoder_tokens",
        "ModelArguments",
        "Optional[int]",
        None,
        "the most patches of one pass of a packing tower; larger batches run as several passes, with the same features "
        "and gradients (default: no limit)",
    ),
    PluginArgument(
        "mm_packing_min_patches",
        "ModelArguments",
        "Optional[int]",
        None,
        "with image_aspect_ratio native: the fewest patches of an image or frame; smaller ones are enlarged "
        "(default: 16)",
    ),
    PluginArgument(
        "mm_packing_max_patches",
        "ModelArguments",
        "Optional[int]",
        None,
        "with image_aspect_ratio native: the most patches of an image or frame; larger ones are reduced "
        "(default: those of the tower's nominal image)",
    ),
    PluginArgument(
        "mm_packing_video",
        "ModelArguments",
        "Optional[str]",
        None,
        "with image_aspect_ratio native: clip (the frames of a video attend to each other, at interpolated temporal "
        "positions) or frames (each frame is an image) (default: clip for LlavaViT, else frames)",
    ),
    PluginArgument(
        "mm_packing_video_max_patches",
        "ModelArguments",
        "Optional[int]",
        None,
        "with image_aspect_ratio native: the most patches of all frames of a video together (default: no limit)",
    ),
    PluginArgument(
        "mm_packing_exif",
        "ModelArguments",
        "Optional[bool]",
        None,
        "rotate photos by their EXIF orientation; a checkpoint trained without this key keeps false (default: true)",
    ),
    PluginArgument(
        "mm_packing_background",
        "ModelArguments",
        "Optional[str]",
        None,
        "color behind transparent pixels, a name or #rrggbb; none drops the transparency, as LLaVA does "
        "(default: white)",
    ),
    PluginArgument(
        "mm_packing_max_pixels",
        "ModelArguments",
        "Optional[int]",
        None,
        "the largest image that is decoded, in pixels (width x height) (default: 178000000)",
    ),
    PluginArgument(
        "mm_packing_max_aspect",
        "ModelArguments",
        "Optional[int]",
        None,
        "with image_aspect_ratio native: the largest ratio of the longest to the shortest side of an image "
        "(default: 200)",
    ),
    PluginArgument(
        "mm_packing_strict",
        "DataArguments",
        "bool",
        False,
        "end the run at a sample that cannot be read; false leaves it out of its batch",
    ),
    PluginArgument(
        "mm_packing_decoder",
        "ModelArguments",
        "bool",
        True,
        "train the decoder on the samples of a micro-batch in one row, without padding; false keeps LLaVA's padded "
        "batches",
    ),
    PluginArgument(
        "mm_packing_full_logits",
        "ModelArguments",
        "bool",
        False,
        "return the logits of all positions in training; false computes those that have a label",
    ),
    PluginArgument(
        "mm_packing_liger",
        "ModelArguments",
        "bool",
        True,
        "compute the decoder's RMSNorm, rotary embedding and SwiGLU with liger-kernel, where it is installed, on CUDA",
    ),
    PluginArgument(
        "use_liger_kernel",
        "TrainingArguments",
        "bool",
        False,
        "end the run where liger-kernel is not installed (transformers has this key from 4.45 on)",
    ),
    PluginArgument(
        "mm_packing_balance",
        "ModelArguments",
        "bool",
        True,
        "deal the samples of an optimizer step over ranks and accumulation steps by their cost, with the weights of "
        "LLaVA's own average; false keeps LLaVA's order",
    ),
    PluginArgument(
        "mm_packing_batch_tokens",
        "ModelArguments",
        "Optional[int]",
        None,
        "the most decoder tokens of a micro-batch; an optimizer step takes as many micro-batches as it needs "
        "(default: no limit)",
    ),
    PluginArgument(
        "mm_packing_over_budget",
        "ModelArguments",
        "str",
        "refuse",
        "what happens to a sample with more than mm_packing_batch_tokens tokens: refuse (before training, by name) or "
        "truncate",
    ),
    PluginArgument(
        "mm_packing_loss_average",
        "ModelArguments",
        "str",
        "micro_batches",
        "what the loss is averaged over: micro_batches (each micro-batch by itself, as LLaVA does) or tokens (the "
        "supervised tokens of the global batch)",
    ),
    PluginArgument(
        "mm_vision_tower_lr",
        "TrainingArguments",
        "Optional[float]",
        None,
        "learning rate of the vision tower (default: learning_rate)",
    ),
    PluginArgument(
        "mm_packing_speed",
        "TrainingArguments",
        "bool",
        True,
        "log samples and tokens per second, MFU, memory and waits, and write speed.csv and speed.png at the end",
    ),
    PluginArgument(
        "mm_packing_peak_tflops",
        "TrainingArguments",
        "Optional[float]",
        None,
        "what MFU is measured against, in TFLOP/s of one device (default: the datasheet's figure for the GPU)",
    ),
    PluginArgument(
        "mm_packing_profile",
        "TrainingArguments",
        "Optional[int]",
        None,
        "profile so many steps of rank 0 and say what bounds the training (default: none)",
    ),
    PluginArgument(
        "attn_implementation",
        "TrainingArguments",
        "Optional[str]",
        None,
        "attention of the language model (default: the host's)",
    ),
)

PARTS = ("mm_vision_tower", "mm_mlp_adapter", "mm_vision_resampler", "mm_language_model")


def tunable_parts(value: str | None) -> tuple[str, ...]:
    """The parts named in ``mm_tunable_parts``. Raises ``ValueError`` for a name that is none of PARTS."""
    parts = tuple(part.strip() for part in (value or "").split(",") if part.strip())
    for part in parts:
        if part not in PARTS:
            raise ValueError(f"mm_tunable_parts names {part!r}; the parts are {', '.join(PARTS)}, joined by commas")
    return parts


FAIL_WITH_IMAGES = {
    "remove_unused_columns": "LLaVA's samples would lose their images: the model takes them under another name",
    "label_smoothing_factor": "transformers smooths the labels of the text, but LLaVA's logits have the images in "
    "between",
}
"""Arguments of transformers that fail in the first step with an image, and why. With text alone they work."""

MICRO_BATCHES, TOKENS = AVERAGES = ("micro_batches", "tokens")
REFUSE, TRUNCATE = OVER_BUDGET = ("refuse", "truncate")


def check_dealing(values: Mapping[str, object]) -> None:
    """Raises ``ValueError`` for a key of the balance or the token budget that no run can carry out."""
    tokens = values.get("mm_packing_batch_tokens")
    if tokens is not None and (type(tokens) is not int or tokens < 1):
        raise ValueError(f"mm_packing_batch_tokens must be a whole number of tokens, at least 1, got {tokens!r}")
    for key, allowed in (("mm_packing_over_budget", OVER_BUDGET), ("mm_packing_loss_average", AVERAGES)):
        if (value := values.get(key)) is not None and value not in allowed:
            raise ValueError(f"{key} is {value!r}; it is one of {', '.join(allowed)}")
    if values.get("mm_packing_over_budget") == TRUNCATE and tokens is None:
        raise ValueError(f"mm_packing_over_budget: {TRUNCATE} has no effect without mm_packing_batch_tokens")
