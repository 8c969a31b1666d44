"""A small training run at native resolution through the launcher, and its checkpoint loaded in a new process."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import warm
import yaml
from host_runs import environment, execute
from native_host import QUESTION, SYSTEM, WORDS, make_prompts
from PIL import Image


def make_workspace(folder: Path, **options) -> Path:
    """Tower, decoder, seven photos of different sizes, data with a text-only sample, and ``config.yaml``."""
    from llava_packing_tower.tools.demo.tiny_models import make_decoder, make_tokenizer, make_tower

    tokenizer = make_tokenizer(folder / "llama_tiny", make_prompts(), WORDS)
    make_decoder(folder / "llama_tiny", len(tokenizer), seed=1)
    make_tower(folder / "vit_packing", seed=2)
    noise, data = np.random.default_rng(0), []
    for number in range(7):
        name = f"{number}.png"
        pixels = noise.integers(0, 255, (60 + 9 * number, 90 - 5 * number, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
        turns = [("human", f"<image>\n{QUESTION}"), ("gpt", WORDS[number % len(WORDS)])]
        data.append({"id": name, "image": name, "conversations": [{"from": f, "value": v} for f, v in turns]})
    turns = [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": "cup"}]
    data.append({"id": "text", "conversations": turns})
    (folder / "data.json").write_text(json.dumps(data))
    config = {
        "mm_vision_tower": str(folder / "vit_packing"),
        "mm_vision_select_layer": -1,
        "mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter,mm_language_model",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": "native",
        "model_name_or_path": str(folder / "llama_tiny"),
        "attn_implementation": "sdpa",
        "version": "v1",
        "model_max_length": 512,
        "data_path": str(folder / "data.json"),
        "image_folder": str(folder),
        "bf16": True,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": 3,
        "max_steps": 2,
        "learning_rate": 1e-4,
        "seed": 3,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "output_dir": str(folder / "llava_llama_packing_native"),
        **options,
    }
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


def _run(command: list[str], next_dir: str) -> str:
    result = execute(command, environment(next_dir))
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def train(config: Path, next_dir: str) -> str:
    """`llava-packing train` in one process on the CPU; returns what it printed."""
    return _run([sys.executable, "-m", "llava_packing_tower", "train", str(config), "--num_processes", "1"], next_dir)


# Loads a checkpoint as a user does and reports as JSON in its last line.
RELOAD = """
import json, sys
from pathlib import Path
import builder_patch
import torch
from llava.constants import IMAGE_TOKEN_INDEX
from llava.mm_utils import process_images, tokenizer_image_token
from llava_packing_tower.integrations.llava.inference import load_checkpoint
from llava_packing_tower.train.history import digests_in_memory
from PIL import Image

folder, prompt, *images = sys.argv[1:]
loaded = load_checkpoint(Path(folder), "cpu")
model = loaded.model
result = {"tensors": digests_in_memory(model)}
model.float()
ids = tokenizer_image_token(prompt, loaded.tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")[None]
ids = ids.expand(len(images), -1)
pixels = process_images([Image.open(image) for image in images], loaded.image_processor, model.config)
result["shapes"] = [list(p.shape) for p in pixels]
given = {"images": [p.float() for p in pixels], "attention_mask": torch.ones_like(ids)}
model.generation_config.eos_token_id = None
answers = model.generate(ids, max_new_tokens=4, do_sample=False, **given).tolist()
again, words = ids, []
model.config.tokenizer_padding_side = "left"
for step in range(4):
    given["attention_mask"] = torch.ones_like(again)
    logits = model(again, use_cache=False, **given).logits[:, -1]
    words.append(logits.argmax(-1))
    again = torch.cat([again, words[-1][:, None]], 1)
result |= {"answers": answers, "without cache": torch.stack(words, 1).tolist()}
print(json.dumps(result))
"""


def reload(checkpoint: Path, images: list[Path], next_dir: str) -> dict:
    """What RELOAD says about a checkpoint that is asked about two images in one batch."""
    prompt = f"{SYSTEM}USER: <image>\n{QUESTION} ASSISTANT:"
    command = [sys.executable, "-c", RELOAD, str(checkpoint), prompt, *map(str, images)]
    result = warm.execute(command, environment(next_dir))
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads(result.stdout.splitlines()[-1])
