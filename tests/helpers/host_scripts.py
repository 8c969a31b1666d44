"""Checkpoints for the host's own scripts, as training leaves them: ``python host_scripts.py FOLDER``.

In a process of its own, since it imports the host. The folder gets a Llama, a Qwen and a LoRA with its base.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import transformers
from llava_checkpoints import make_decoder, make_llava, save_full, save_lora
from native_host import make_tower
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel


def qwen_tokenizer(decoder: Path) -> int:
    """Bytes, where a line break is one token, and the marks of Qwen's turns; returns how many tokens there are."""
    letters = sorted(ByteLevel.alphabet())
    model = BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[])
    raw = Tokenizer(model)
    raw.pre_tokenizer, raw.decoder = ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    marks = ["<|im_start|>", "<|im_end|>"]
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<|endoftext|>", pad_token="<|endoftext|>", additional_special_tokens=marks
    )
    tokenizer.save_pretrained(decoder)
    return len(tokenizer)


def save(model: torch.nn.Module, decoder: Path, folder: Path) -> None:
    """A checkpoint whose answers end after one token: the scripts ask for 1024."""
    model.generation_config.eos_token_id = list(range(model.config.vocab_size))
    model.config.image_aspect_ratio = "pad"  # the worker needs one
    save_full(model, decoder, folder)


def main(root: Path) -> None:
    tower = root / "vit_packing"
    make_tower(tower)
    llama, qwen = make_decoder(root / "decoder", "Llama"), make_decoder(root / "qwen", "Qwen")
    for file in qwen.glob("*token*"):
        file.unlink()
    model = transformers.AutoModelForCausalLM.from_pretrained(qwen)
    model.resize_token_embeddings(qwen_tokenizer(qwen))
    model.save_pretrained(qwen)
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama, use_fast=False)
    tokenizer.pad_token = tokenizer.unk_token  # as Vicuna has it; the video demo needs one
    tokenizer.save_pretrained(llama)
    spatial = {"mm_patch_merge_type": "spatial_unpad"}
    save(make_llava(llama, tower, "Llama", **spatial), llama, root / "llava_llama_run")
    save(make_llava(qwen, tower, "Qwen", **spatial), qwen, root / "llava_qwen_run")
    save_lora(make_llava(llama, tower, "Llama"), llama, root / "llava_llama_lora")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
