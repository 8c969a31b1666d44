"""What a cell of the host matrix trains on: a tiny Qwen2 decoder, a tiny packed tower, photos, a configuration."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from llava_packing_tower import LlavaViTPackingModel
from llava_packing_tower.data.image_processor import PackingImageProcessor
from llava_packing_tower.models.llava_vit.packed import LlavaViTPackingConfig

QUESTION = "What is in the photo?"
WORDS = ("a cat", "the moon", "one cup", "two books")
SYSTEM = "You are a helpful assistant."
# The template of Qwen2's tokenizers, shortened to what LLaVA-NeXT's own one does.
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# LLaVA-NeXT takes a tower whose image_size is one of five for anyres; large patches keep the sequences short.
TOWER = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "patch_size": 28,
    "image_size": 224,
    "use_head": False,
}
DECODER = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}


def make_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of Qwen2's kind, saved in ``folder``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=[], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([QUESTION, SYSTEM, "system user assistant", *WORDS] * 4, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=special[2],
        pad_token=special[0],
        additional_special_tokens=special[1:],
        model_max_length=4096,
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    state = json.loads((folder / "tokenizer.json").read_text())
    model = state["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    file = folder / "tokenizer_config.json"
    content = json.loads(file.read_text())
    content["tokenizer_class"] = "Qwen2Tokenizer"  # as the published checkpoints say
    file.write_text(json.dumps(content, indent=1))
    return fast


def make_workspace(folder: Path, seed: int = 0) -> None:
    """Decoder, tower, photos of several sizes, data with a text-only sample, and ``config.yaml``, in ``folder``."""
    decoder, tower, images = folder / "qwen_tiny", folder / "vit_packing_tiny", folder / "images"
    images.mkdir(parents=True)
    tokenizer = make_tokenizer(decoder)
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        use_sliding_window=False,
        **DECODER,
    )
    Qwen2ForCausalLM(config).save_pretrained(decoder)
    LlavaViTPackingModel(LlavaViTPackingConfig(**TOWER)).save_pretrained(tower)
    PackingImageProcessor(size=TOWER["image_size"]).save_pretrained(tower)
    noise = np.random.default_rng(seed)
    data = []
    for number, (width, height) in enumerate([(64, 128), (300, 90), (128, 128), (500, 410), (97, 61), (128, 96)]):
        name = f"{number}.png"
        Image.fromarray(noise.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(images / name)
        turns = [("human", f"<image>\n{QUESTION}"), ("gpt", WORDS[number % len(WORDS)])]
        data.append({"id": name, "image": name, "conversations": [{"from": f, "value": v} for f, v in turns]})
    for number in range(2):
        turns = [("human", QUESTION), ("gpt", WORDS[number])]
        data.append({"id": f"text {number}", "conversations": [{"from": f, "value": v} for f, v in turns]})
    (folder / "data.json").write_text(json.dumps(data))
    values = {
        "mm_vision_tower": str(tower),
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_projector_type": "mlp2x_gelu",
        "mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter,mm_language_model",
        "mm_vision_tower_lr": 1e-2,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": "anyres_max_4",
        "image_grid_pinpoints": "(1x1),...,(2x2)",
        "mm_patch_merge_type": "spatial_unpad",
        "model_name_or_path": str(decoder),
        "attn_implementation": "sdpa",
        "version": "qwen_1_5",
        "model_max_length": 4096,
        "data_path": str(folder / "data.json"),
        "image_folder": str(images),
        "lazy_preprocess": True,
        "group_by_modality_length": True,
        "bf16": True,
        "gradient_checkpointing": True,
        "per_device_train_batch_size": 1,
        "max_steps": 3,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine",
        "warmup_ratio": 0.03,
        "weight_decay": 0.0,
        "seed": seed,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "output_dir": "given on the command line",
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
