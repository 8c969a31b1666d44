"""Many questions to a LLaVA at once: prompts, pixels, `generate` and losses of a batch, through the host's own model.

All images of a batch go through the tower in one packed pass. What a sample gets does not depend on its neighbors:
samples that LLaVA's code would treat differently in one batch are put into batches of their own.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image

from ...data.codec import DEFAULT_PATCHES, codec_clip
from ...data.images import ImageReading, to_rgb
from ...data.native_config import asks_for_native
from ...data.native_image_processor import KEPT
from ...data.video import Clip, read_clip
from ...multimodal.visual_inputs import VIDEO
from .inference import Checkpoint, as_read, build_prompt, host_module, takes_modalities, trains_with_lists
from .model_class import class_name
from .registry import host_of

IGNORE = -100
IMAGE = "image"
# LLaVA's own defaults for the conversation, by the class of a checkpoint that does not say what it was trained in.
CONVERSATIONS = {
    "LlavaQwenForCausalLM": "qwen_1_5",
    "LlavaQwenMoeForCausalLM": "qwen_1_5",
    "LlavaMistralForCausalLM": "mistral_instruct",
    "LlavaMixtralForCausalLM": "mistral_instruct",
}
DEFAULT_CONVERSATION = "v1"


@dataclass(frozen=True)
class Question:
    """One request, ready for the model: ids ``[L]`` with LLaVA's number for each ``<image>``, and what these stand for.

    pixels: ``[C, H, W]``, ``[crops, C, H, W]`` or, for a video, ``[T, C, H, W]``. kinds: "image" or "video" of each.
    details: (width, height) of each, or at native resolution what ``multimodal.visual_inputs.Detail`` says. answer:
    number of ids at the end that are the answer (to be scored), 0 in front of generation.
    """

    ids: torch.Tensor
    pixels: tuple[torch.Tensor, ...] = ()
    kinds: tuple[str, ...] = ()
    details: tuple[object, ...] = ()
    answer: int = 0
    key: str = field(default="text")
    """Samples with one key may share a batch."""


def conversation_name(config: object, asked: str | None = None) -> str:
    """The conversation template: the one asked for, else what training noted in the config, else that of the decoder.

    Raises ``ValueError`` for a template that the host does not have.
    """
    name = asked or getattr(config, "mm_packing_conversation", None)
    name = name or CONVERSATIONS.get(class_name(vars(config), host_of(), plain=True), DEFAULT_CONVERSATION)
    build_prompt(name, "?")  # raises where there is none
    return name


def reads_videos(model: torch.nn.Module) -> bool:
    """Whether videos can be given: LLaVA-NeXT reads them in any mode, every other LLaVA at native resolution."""
    return asks_for_native(model.config) or takes_modalities(model)


# ---------------------------------------------------------------- one sample


def prepare(
    loaded: Checkpoint,
    text: str,
    visuals: Sequence[Image.Image | str | Sequence[Image.Image]],
    conversation: str,
    max_frames: int = 32,
    answer: str | None = None,
    positions_thw: str | None = None,
) -> Question:
    """A question about images (PIL), videos (paths, of which ``max_frames`` evenly spaced frames are read) and lists of
    frames.

    An ``<image>`` for each goes in front of the text, unless the text has them already. Raises ``ValueError`` where it
    has more or fewer, for a video that cannot be read, and for videos where the model takes none.

    positions_thw: ``codec`` or ``codec-video-prep`` for the patches of video files in which something happens, in
    place of their frames (at native resolution), as many as ``mm_packing_video_max_patches`` of the model.
    """
    constants, utilities = host_module("constants", loaded.model), host_module("mm_utils", loaded.model)
    mark = constants.DEFAULT_IMAGE_TOKEN
    given = text.count(mark)
    if given == 0 and visuals:
        text = f"{' '.join([mark] * len(visuals))}\n{text}"
    elif given != len(visuals):
        raise ValueError(f"the question has {given} {mark}, but {len(visuals)} images and videos: {text!r}")
    if getattr(loaded.model.config, "mm_use_im_start_end", False):
        text = text.replace(mark, constants.DEFAULT_IM_START_TOKEN + mark + constants.DEFAULT_IM_END_TOKEN)

    def to_ids(reply: str | None) -> torch.Tensor:
        prompt = build_prompt(conversation, text, reply)
        return utilities.tokenizer_image_token(
            prompt, loaded.tokenizer, constants.IMAGE_TOKEN_INDEX, return_tensors="pt"
        )

    ids = to_ids(answer)
    scored = 0 if answer is None else len(ids) - len(to_ids(None))
    if not visuals:
        return Question(ids, answer=scored)
    parts = [_pixels(loaded, visual, len(visuals) > 1, max_frames, positions_thw) for visual in visuals]
    pixels, kinds, details = zip(*parts)
    native = asks_for_native(loaded.model.config)
    key = "native" if native else "tensor" if all(p.dim() == 3 for p in pixels) else "list"
    return Question(ids, pixels, kinds, details, scored, key)


def _pixels(
    loaded: Checkpoint, visual: object, several: bool, max_frames: int, selector: str | None
) -> tuple[torch.Tensor, str, object]:
    """Pixels, kind and detail of one image or video."""
    config, native = loaded.model.config, asks_for_native(loaded.model.config)
    if isinstance(visual, Image.Image):
        if not native and several:
            # LLaVA trains and asks about several images without tiles, whatever it does with one.
            config = copy(config)
            config.image_aspect_ratio = "pad"
        image = as_read(visual, loaded.image_processor, config)
        made = host_module("mm_utils", loaded.model).process_images([image], loaded.image_processor, config)
        pixels = made[0]
        return pixels, IMAGE, {"size": image.size, "modality": IMAGE} if native else image.size
    if not reads_videos(loaded.model):
        raise ValueError(
            f"{type(loaded.model).__name__} of LLaVA 1.x takes videos only from checkpoints that were trained with "
            f"image_aspect_ratio: native; use LLaVA-NeXT"
        )
    if selector is not None and isinstance(visual, str):
        return _codec_pixels(loaded, visual, selector)
    reading = loaded.image_processor.image_reading
    clip = read_clip(visual, upbound=max_frames, force=True) if isinstance(visual, str) else _clip_of(visual, reading)
    pixels = loaded.image_processor.preprocess(clip.frames, return_tensors="pt")["pixel_values"]
    pixels = pixels if isinstance(pixels, torch.Tensor) else torch.stack(list(pixels))
    size = (clip.frames.shape[2], clip.frames.shape[1])
    if not native:
        return pixels, VIDEO, size
    places = {"frame_indices": torch.tensor(clip.indices), "total_frames": clip.total}
    return pixels, VIDEO, {"size": size, "modality": VIDEO, **places}


def _codec_pixels(loaded: Checkpoint, file: str, selector: str) -> tuple[torch.Tensor, str, object]:
    """The mosaics of a video file, and where their patches stand. Raises ``ValueError`` for a model that is not one of
    native resolution."""
    if not asks_for_native(loaded.model.config):
        raise ValueError(f"positions_thw {selector!r} needs a model that was trained with image_aspect_ratio: native")
    processor = loaded.image_processor
    budget = processor.settings.video_max_patches or DEFAULT_PATCHES
    clip = codec_clip(file, processor.rule.patch_size, budget, selector)
    with processor.placed(KEPT):
        pixels = processor.preprocess(clip.mosaics, return_tensors="pt")["pixel_values"]
    size = (clip.mosaics.shape[2], clip.mosaics.shape[1])
    return pixels, VIDEO, {"size": size, "modality": VIDEO, "patch_positions": torch.from_numpy(clip.positions)}


def _clip_of(frames: Sequence[Image.Image], reading: ImageReading) -> Clip:
    """Frames that are there already. Raises ``ValueError`` for frames of several sizes."""
    sizes = {frame.size for frame in frames}
    if len(sizes) != 1:
        raise ValueError(f"all frames of a video must have one size, got {len(frames)} frames of {sorted(sizes)}")
    stacked = np.stack([np.asarray(to_rgb(frame, reading)) for frame in frames])
    return Clip(stacked, list(range(len(frames))), len(frames), 1.0)


def scalings(loaded: Checkpoint, question: Question) -> list[float | None]:
    """Of each image of a question, what :meth:`SmartResize.scaling` says; nothing where no image keeps its own size."""
    if not asks_for_native(loaded.model.config):
        return []
    sizes = [detail["size"] for kind, detail in zip(question.kinds, question.details) if kind == IMAGE]
    return [loaded.image_processor.rule.scaling(*size) for size in sizes]


# ---------------------------------------------------------------- a batch


@torch.inference_mode()
def generate(loaded: Checkpoint, questions: Sequence[Question], **options: object) -> list[list[int]]:
    """The token ids of each answer, up to the token that ends it (left out). ``options`` go to the model's `generate`.

    One call for all questions with one ``key``.
    """
    answers: list[list[int]] = [[]] * len(questions)
    pad = _pad_id(loaded)
    for indices in _by_key(questions):
        batch = [questions[index] for index in indices]
        ids, mask = _padded([question.ids for question in batch], pad, loaded.model.device)
        with padding_side(loaded.model, "left"):
            output = loaded.model.generate(
                ids, **_images(loaded, batch), attention_mask=mask, pad_token_id=pad, use_cache=True, **options
            )
        for index, tokens in zip(indices, output.tolist()):
            answers[index] = _until_end(tokens, loaded.model.generation_config.eos_token_id)
    return answers


@torch.inference_mode()
def losses(loaded: Checkpoint, questions: Sequence[Question]) -> list[tuple[float, bool]]:
    """For each question with an answer: the mean of -log p over the answer's tokens, and whether they are the greedy
    ones."""
    results: list[tuple[float, bool]] = [(0.0, False)] * len(questions)
    for indices in _by_key(questions):
        batch = [questions[index] for index in indices]
        ids, mask = _padded([question.ids for question in batch], _pad_id(loaded), loaded.model.device)
        labels = torch.full_like(ids, IGNORE)
        for row, question in enumerate(batch):
            labels[row, ids.shape[1] - question.answer :] = ids[row, ids.shape[1] - question.answer :]
        with padding_side(loaded.model, "left"):
            ids, positions, mask, labels, inputs = _embedded(loaded, batch, ids, mask, labels)
            inputs = {"input_ids": ids} if inputs is None else {"inputs_embeds": inputs}
            logits = loaded.model(**inputs, attention_mask=mask, position_ids=positions, use_cache=False).logits
        for row, index in enumerate(indices):
            chosen = labels[row, 1:] != IGNORE
            predicted, wanted = logits[row, :-1][chosen].float(), labels[row, 1:][chosen]
            loss = torch.nn.functional.cross_entropy(predicted, wanted)
            results[index] = float(loss), bool((predicted.argmax(-1) == wanted).all())
    return results


def _embedded(
    loaded: Checkpoint, batch: Sequence[Question], ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor | None, ...]:
    """Ids (or None), positions, mask, labels and embeddings (or None) with the visual tokens in their places."""
    images = _images(loaded, batch)
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    if not images:
        return ids, positions, mask, labels, None
    prepare_inputs = loaded.model.prepare_inputs_labels_for_multimodal
    accepted = inspect.signature(prepare_inputs).parameters
    images = {name: value for name, value in images.items() if name in accepted}
    _, _, mask, _, embeddings, labels, *_ = prepare_inputs(ids, None, mask, None, labels, **images)
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    return None, positions, mask, labels, embeddings


def _images(loaded: Checkpoint, batch: Sequence[Question]) -> Mapping[str, object]:
    """What the host's `generate` is given for the images of a batch of one key."""
    key = batch[0].key
    if key == "text":
        return {}
    model = loaded.model
    pixels = [p.to(model.device, model.dtype) for question in batch for p in question.pixels]
    # LLaVA-NeXT is trained with lists, whose images end with a newline (spatial_unpad); those of a tensor do not.
    stacked = key == "tensor" and not trains_with_lists(model) and len({p.shape for p in pixels}) == 1
    given: dict[str, object] = {
        "images": torch.stack(pixels) if stacked else pixels,
        "image_sizes": [detail for question in batch for detail in question.details],
    }
    if takes_modalities(model):
        given["modalities"] = [kind for question in batch for kind in question.kinds]
    return given


def _by_key(questions: Sequence[Question]) -> list[list[int]]:
    keys: dict[str, list[int]] = {}
    for index, question in enumerate(questions):
        keys.setdefault(question.key, []).append(index)
    return list(keys.values())


def _padded(rows: Sequence[torch.Tensor], pad: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask ``[B, L]``, padded on the left: the next token of every row comes at the same place."""
    length = max(len(row) for row in rows)
    ids = torch.full((len(rows), length), pad, dtype=torch.long)
    mask = torch.zeros(len(rows), length, dtype=torch.bool)
    for index, row in enumerate(rows):
        ids[index, length - len(row) :] = row
        mask[index, length - len(row) :] = True
    return ids.to(device), mask.to(device)


def _pad_id(loaded: Checkpoint) -> int:
    tokenizer = loaded.tokenizer
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)


def _until_end(tokens: list[int], ends: int | Sequence[int] | None) -> list[int]:
    ends = [ends] if isinstance(ends, int) else list(ends or ())
    return tokens[: next((i for i, token in enumerate(tokens) if token in ends), len(tokens))]


@contextmanager
def padding_side(model: torch.nn.Module, side: str):
    """Have LLaVA pad at one side; what it does otherwise is what training did, mostly the right."""
    before = getattr(model.config, "tokenizer_padding_side", None)
    model.config.tokenizer_padding_side = side
    try:
        yield
    finally:
        model.config.tokenizer_padding_side = before or "right"
