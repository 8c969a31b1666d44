"""The tokenizer of an export: one file that every version of transformers reads alike, compared with LLaVA's own."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..utils.files import write_json
from .chat_template import Marks

VISUAL_TOKENS = ("<image>", "<video>")
MadeTokenizer = tuple[Any, dict[str, object], list[int]]
"""A ``tokenizers.Tokenizer``, its tokenizer_config.json, and the ids of :data:`VISUAL_TOKENS`."""
SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


def fast_backend(tokenizer: object) -> object:
    """The ``tokenizers.Tokenizer`` of a tokenizer, converted where it is a slow one.

    Raises ``ValueError`` for one that cannot be converted.
    """
    from tokenizers import Tokenizer

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return Tokenizer.from_str(backend.to_str())
    from transformers.convert_slow_tokenizer import convert_slow_tokenizer

    try:
        return convert_slow_tokenizer(tokenizer)
    except (ValueError, KeyError) as error:
        raise ValueError(f"the tokenizer {type(tokenizer).__name__} has no fast form: {error}") from error


def make_tokenizer(tokenizer: object, rows: int) -> MadeTokenizer:
    """A ``tokenizers.Tokenizer`` with the tokens of images and videos, its tokenizer_config.json, and their ids.

    rows: of the decoder's embeddings; the token for padding must have one.
    """
    from tokenizers import AddedToken

    backend = fast_backend(tokenizer)
    add_first_token(backend, tokenizer)
    size = len(tokenizer)
    known = backend.get_vocab_size(with_added_tokens=True)
    if known < size:  # added tokens, which a conversion leaves out
        extra = sorted((index, token) for token, index in tokenizer.get_added_vocab().items() if index >= known)
        backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for _, token in extra])
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in VISUAL_TOKENS])
    ids = [backend.token_to_id(token) for token in VISUAL_TOKENS]
    config: dict[str, object] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "model_max_length": min(int(tokenizer.model_max_length), 1 << 31),
    }
    config.update({name: str(value) for name in SPECIAL if (value := getattr(tokenizer, name, None)) is not None})
    # As LLaVA pads in generation: with the pad token, else the end of a text, else the first token.
    fitting = [config[name] for name in ("pad_token", "eos_token") if name in config]
    fitting = [token for token in fitting if backend.token_to_id(token) < rows]
    config["pad_token"] = next(iter(fitting), backend.id_to_token(0))
    return backend, config, ids


def add_first_token(backend: object, tokenizer: object) -> None:
    """Have a backend begin every text with the token that the tokenizer begins it with: conversions leave it out."""
    from tokenizers.processors import TemplateProcessing

    first, bos = tokenizer("a").input_ids[:1], tokenizer.bos_token
    if bos is None or first != [tokenizer.bos_token_id] or backend.encode("a").ids[:1] == first:
        return
    backend.post_processor = TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B:1", special_tokens=[(bos, tokenizer.bos_token_id)]
    )


def check_tokenizer(
    backend: object,
    ids: Sequence[int],
    to_llava_ids: Callable[[str], list[int]],
    prompts: Sequence[str],
    marks: Marks,
    start: str,
    llava_image: int,
) -> None:
    """Raises ``ValueError`` where a prompt has other ids than in LLaVA, which tokenizes each part around an image.

    start: what the chat template writes in front of a prompt, instead of what the tokenizer would add.
    """
    plain = replace(marks, gap="")
    for prompt in prompts:
        made = backend.encode(start + marks.apply(prompt), add_special_tokens=not start).ids
        wanted = [ids[0] if index == llava_image else index for index in to_llava_ids(plain.apply(prompt))]
        if made != wanted:
            raise ValueError(
                f"the fast tokenizer makes other ids of a prompt than LLaVA's: {made} and {wanted} of {prompt!r}"
            )


def write_tokenizer(folder: Path, backend: object, config: dict[str, object]) -> None:
    backend.save(str(folder / "tokenizer.json"))
    write_json(config, folder / "tokenizer_config.json")
    special = {name: config[name] for name in SPECIAL if name in config}
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n", encoding="utf-8")
