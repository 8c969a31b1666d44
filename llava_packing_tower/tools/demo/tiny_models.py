"""The small, randomly initialized parts that the demo starts from: a packed tower, a tokenizer and a LLaMA decoder."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path

import sentencepiece
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaTokenizer

from ...data.image_processor import PackingImageProcessor
from ...models.llava_vit.packed import LlavaViTPackingConfig, LlavaViTPackingModel

IMAGE_SIZE, PATCH_SIZE = 112, 14
TOWER = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "patch_size": PATCH_SIZE,
    "image_size": IMAGE_SIZE,
    # LLaVA reads hidden states before the final norm and the pooling head: without them every tensor is trained.
    "use_head": False,
}
DECODER = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 2048,
}
VOCABULARY = 512
WEIGHT_OF_A_WORD = 10


def make_tokenizer(folder: Path, prompts: Iterable[str], words: Iterable[str]) -> LlamaTokenizer:
    """A LLaMA tokenizer (SentencePiece BPE with byte fallback) trained on the prompts, with a token for each word.

    LLaVA masks the question by counting tokens, and leaves out a sample where its counts do not add up; they add up
    for this kind of tokenizer: a space belongs to the word after it, and a space at the end is a token of its own.
    """
    lines = [line for prompt in prompts for line in prompt.splitlines()]
    # Often enough that byte-pair encoding merges each answer into one token.
    lines += [word for word in words for _ in range(WEIGHT_OF_A_WORD)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCABULARY,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    # From the folder: what the constructor takes, a file or its vocabulary, depends on the version of transformers.
    tokenizer = LlamaTokenizer.from_pretrained(folder, legacy=True, add_bos_token=True)
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_decoder(folder: Path, vocabulary: int, seed: int) -> None:
    """A LLaMA decoder with random weights, float32."""
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=vocabulary, bos_token_id=1, eos_token_id=2, **DECODER)
    LlamaForCausalLM(config).save_pretrained(folder)


def make_tower(folder: Path, seed: int) -> None:
    """A packed LlavaViT with random weights, float32, and its image processor."""
    torch.manual_seed(seed)
    LlavaViTPackingModel(LlavaViTPackingConfig(**TOWER)).save_pretrained(folder)
    PackingImageProcessor(size=IMAGE_SIZE).save_pretrained(folder)
