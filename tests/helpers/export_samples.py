"""What exports are asked, and what they answer. Imports no LLaVA: it runs with any transformers since 4.57."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

QUESTION = "What is in the photo?"
SHAPES = [(50, 31), (23, 40), (33, 33)]
NEW_TOKENS = 8


def photographs(*sizes: tuple[int, int]) -> list[Image.Image]:
    """Images of these sizes, (width, height), of smooth noise: resizing them matters, rounding does not."""
    made = []
    for number, (width, height) in enumerate(sizes):
        noise = np.random.default_rng(number).integers(0, 255, (5, 6, 3), dtype=np.uint8)
        made.append(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC))
    return made


def samples(videos: bool) -> list[tuple[list, str]]:
    """(visuals, question): one image, several, none, another image, and a video as a list of frames."""
    wide, tall, square = photographs(*SHAPES)
    made: list[tuple[list, str]] = [([wide], QUESTION), ([tall, square, wide], "Which?"), ([], "2 + 2?")]
    made.append(([tall], QUESTION))
    return [*made, ([photographs(*[(40, 30)] * 5)], QUESTION)] if videos else made


def messages_of(visuals: Sequence, question: str) -> list[dict]:
    """A sample as chat messages."""
    parts: list[dict] = [
        {"type": "image", "image": v} if isinstance(v, Image.Image) else {"type": "video", "video": v} for v in visuals
    ]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


def inputs_of(processor: object, *asked: tuple[Sequence, str]) -> dict:
    """What the model is called with, for one sample or a batch."""
    chats = [messages_of(*sample) for sample in asked]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    return processor.apply_chat_template(chats if len(chats) > 1 else chats[0], **options)


def load(folder: Path, **options: object):
    """The model and the processor of an export."""
    import llava_packing_tower  # noqa: F401  (registers them)

    # isort: split
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(folder, **{"dtype": "auto", **options}).eval()
    return model, AutoProcessor.from_pretrained(folder)


@torch.inference_mode()
def answers(model: torch.nn.Module, inputs: dict, **options: object) -> list[list[int]]:
    """The greedy ids of each sample, up to the token that ends it."""
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, **options}
    made = model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :].tolist()
    ends = model.generation_config.eos_token_id
    ends = [ends] if isinstance(ends, int) else list(ends or ())
    return [row[: next((i for i, token in enumerate(row) if token in ends), len(row))] for row in made]


def compare(file: Path, atol: float) -> None:
    """An export beside what the LLaVA that it comes from said (``<export>.npz`` and ``.json``)."""
    model, processor = load(file.with_suffix(""))
    said, wanted = np.load(file), json.loads(file.with_suffix(".json").read_text())
    asked = samples(len(wanted) > 4)
    for number, (sample, answer) in enumerate(zip(asked, wanted, strict=True)):
        inputs = inputs_of(processor, sample)
        with torch.inference_mode():
            logits = model(**inputs).logits[0].numpy()
        # LLaVA makes rows for tokens that its tokenizer has and the files have not, or cuts those that are beyond it.
        columns = min(logits.shape[1], said[f"logits_{number}"].shape[1])
        logits, expected = logits[:, :columns], said[f"logits_{number}"][:, :columns]
        assert logits.shape == expected.shape, (file.stem, number, logits.shape, expected.shape)
        worst = np.abs(logits - expected).max()
        assert worst <= atol, (file.stem, number, worst)
        assert answers(model, inputs) == [answer], (file.stem, number)
    assert answers(model, inputs_of(processor, *asked)) == wanted, f"{file.stem}: a batch answers otherwise"
