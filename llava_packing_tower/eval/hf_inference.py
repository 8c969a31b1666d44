"""Many questions to an export at once, through its own model and processor: the counterpart of
:mod:`..integrations.llava.batched_inference`, whose functions have the same names. Imports no LLaVA."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image

from ..hf import INFO, MODEL_TYPE, ORIGIN
from ..hf.auto import OLDEST, is_supported
from ..utils.files import CONFIG_NAME, read_json

IGNORE = -100


@dataclass(frozen=True)
class Checkpoint:
    """A loaded export."""

    tokenizer: Any
    model: torch.nn.Module
    processor: Any
    context_length: int


@dataclass(frozen=True)
class Question:
    """One request: the prompt, with an ``<image>`` or ``<video>`` for each visual, and the answer that is scored."""

    prompt: str
    images: tuple[Image.Image, ...] = ()
    videos: tuple[object, ...] = ()
    max_frames: int = 32
    answer: str | None = None


def is_export(folder: str | Path) -> bool:
    """Whether a folder is an export, and not a LLaVA checkpoint."""
    file = Path(folder) / CONFIG_NAME
    return file.is_file() and read_json(file).get("model_type") == MODEL_TYPE


def check_export(folder: str | Path) -> None:
    """Raises ``ValueError`` where the installed transformers is too old for exports."""
    if not is_supported(transformers.__version__):
        raise ValueError(
            f"{folder} is an export, which needs transformers {'.'.join(map(str, OLDEST))} or newer, and "
            f"{transformers.__version__} is installed. Use an environment that has one, or turn it back: "
            f"llava-packing import {folder}"
        )


def load_checkpoint(folder: str | Path, device: str) -> Checkpoint:
    """Load an export in the dtype in which it was saved."""
    check_export(folder)
    from transformers import AutoProcessor

    from ..hf.modeling import LlavaPackingForConditionalGeneration

    model = LlavaPackingForConditionalGeneration.from_pretrained(folder, dtype="auto", device_map={"": device}).eval()
    processor = AutoProcessor.from_pretrained(folder)
    length = getattr(model.config.text_config, "max_position_embeddings", 2048)
    return Checkpoint(processor.tokenizer, model, processor, length)


def conversation_name(folder: str | Path, asked: str | None = None) -> str:
    """The conversation of the export. Raises ``ValueError`` where another one is asked for: it has just this one."""
    file = Path(folder) / ORIGIN / INFO
    own = str(read_json(file).get("conversation")) if file.is_file() else "of its chat template"
    if asked not in (None, own):
        raise ValueError(
            f"{folder} was exported with the conversation {own}, not {asked}: export it with --conv_template"
        )
    return own


def prepare(
    loaded: Checkpoint,
    text: str,
    visuals: Sequence[Image.Image | str | Sequence[Image.Image]],
    conversation: str,
    max_frames: int = 32,
    answer: str | None = None,
) -> Question:
    """A question about images (PIL), videos (paths) and lists of frames, as LLaVA's wrapper prepares it.

    An ``<image>`` for each goes in front of the text, unless the text has them already. Raises ``ValueError`` where it
    has more or fewer.
    """
    images = tuple(visual for visual in visuals if isinstance(visual, Image.Image))
    videos = tuple(visual for visual in visuals if not isinstance(visual, Image.Image))
    words = ["<image>" if isinstance(visual, Image.Image) else "<video>" for visual in visuals]
    given = text.count("<image>")
    if given == 0 and visuals:
        text = f"{' '.join(words)}\n{text}"
    elif given != len(visuals):
        raise ValueError(f"the question has {given} <image>, but {len(visuals)} images and videos: {text!r}")
    else:
        for word in words:  # one after the other, from the left
            text = text.replace("<image>", f"\0{word[1:]}", 1)
        text = text.replace("\0", "<")
    messages = [{"role": "user", "content": text}]
    prompt = loaded.processor.apply_chat_template(messages, add_generation_prompt=True)
    if answer is not None:
        whole = [*messages, {"role": "assistant", "content": answer}]
        return Question(prompt, images, videos, max_frames, loaded.processor.apply_chat_template(whole)[len(prompt) :])
    return Question(prompt, images, videos, max_frames)


def scalings(loaded: Checkpoint, question: Question) -> list[float | None]:
    """Of each image of a question, what ``SmartResize.scaling`` says; nothing where no image keeps its own size."""
    settings = loaded.processor.image_processor.settings
    return [settings.rule.scaling(*image.size) for image in question.images] if settings.is_native else []


def _inputs(loaded: Checkpoint, questions: Sequence[Question], with_answers: bool = False) -> Any:
    videos = [video for question in questions for video in question.videos]
    inputs = loaded.processor(
        text=[question.prompt + ((question.answer or "") if with_answers else "") for question in questions],
        images=[image for question in questions for image in question.images] or None,
        videos=videos or None,
        num_frames=questions[0].max_frames,
        return_tensors="pt",
        padding=True,
    )
    return inputs.to(loaded.model.device)


@torch.inference_mode()
def generate(loaded: Checkpoint, questions: Sequence[Question], **options: object) -> list[list[int]]:
    """The token ids of each answer, up to the token that ends it (left out)."""
    inputs = _inputs(loaded, questions)
    made = loaded.model.generate(**inputs, use_cache=True, **options)[:, inputs["input_ids"].shape[1] :]
    ends = loaded.model.generation_config.eos_token_id
    ends = [ends] if isinstance(ends, int) else list(ends or ())
    return [row[: next((i for i, token in enumerate(row) if token in ends), len(row))] for row in made.tolist()]


@torch.inference_mode()
def losses(loaded: Checkpoint, questions: Sequence[Question]) -> list[tuple[float, bool]]:
    """For each question with an answer: the mean of -log p over the answer's tokens, and whether they are greedy."""
    inputs = _inputs(loaded, questions, with_answers=True)
    counts = _inputs(loaded, questions)["attention_mask"].sum(1)
    labels = inputs["input_ids"].clone()
    for row, (whole, question) in enumerate(zip(inputs["attention_mask"].sum(1), counts)):
        labels[row, : labels.shape[1] - int(whole - question)] = IGNORE
    logits = loaded.model(**inputs, use_cache=False).logits
    results = []
    for row in range(len(labels)):
        chosen = labels[row, 1:] != IGNORE
        predicted, wanted = logits[row, :-1][chosen].float(), labels[row, 1:][chosen]
        loss = torch.nn.functional.cross_entropy(predicted, wanted)
        results.append((float(loss), bool((predicted.argmax(-1) == wanted).all())))
    return results
