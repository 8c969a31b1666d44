"""Small models, data and a YAML for training a real host, and the commands that train it and load the result."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from llava_packing_tower.demo.models import make_decoder, make_tokenizer, make_tower

REPOSITORY = Path(__file__).parent.parent
NEXT = os.environ.get("LLAVA_NEXT_DIR") or ""
WORDS = ("cat", "moon", "cup")
QUESTION = "What is in the photo?"
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)


def make_workspace(folder: Path) -> Path:
    """Tower (by its name a packing one), decoder, photos, data with a text-only sample, and ``config.yaml``."""
    prompts = [f"{SYSTEM}USER: <image>\n{QUESTION} ASSISTANT: {word}</s>" for word in WORDS]
    tokenizer = make_tokenizer(folder / "llama_tiny", prompts, WORDS)
    make_decoder(folder / "llama_tiny", len(tokenizer), seed=1)
    make_tower(folder / "vit_packing", seed=2)
    (folder / "images").mkdir()
    noise = np.random.default_rng(0)
    data = []
    for number in range(7):
        name = f"{number}.png"
        pixels = noise.integers(0, 255, (60 + 9 * number, 90 - 5 * number, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / name)
        turns = [("human", f"<image>\n{QUESTION}"), ("gpt", WORDS[number % len(WORDS)])]
        data.append({"id": name, "image": name, "conversations": [{"from": f, "value": v} for f, v in turns]})
    data.append(
        {"id": "text", "conversations": [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": "cup"}]}
    )
    (folder / "data.json").write_text(json.dumps(data))
    config = {
        "mm_vision_tower": str(folder / "vit_packing"),
        "mm_vision_select_layer": -1,
        "mm_projector_type": "mlp2x_gelu",
        "mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter,mm_language_model",
        "mm_vision_tower_lr": 5e-2,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": "pad",
        "model_name_or_path": str(folder / "llama_tiny"),
        "attn_implementation": "sdpa",
        "version": "v1",
        "model_max_length": 512,
        "data_path": str(folder / "data.json"),
        "image_folder": str(folder / "images"),
        "bf16": True,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": 2,
        "max_steps": 2,
        "learning_rate": 1e-3,
        "seed": 3,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "output_dir": "set by each test",
    }
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


def environment(next_dir: str) -> dict[str, str]:
    return {**os.environ, "LLAVA_NEXT_DIR": next_dir, "OMP_NUM_THREADS": "1"}


def train(config: Path, output: Path, next_dir: str, *words: str, processes: int = 2) -> str:
    """`llava-packing train` on the CPU; returns what it printed. Fails the test if it exits with an error."""
    command = [sys.executable, "-m", "llava_packing_tower", "train", str(config), "--num_processes", str(processes)]
    command += ["--output_dir", str(output), *words]
    result = subprocess.run(
        command, env=environment(next_dir), cwd=REPOSITORY, capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


# Loads a checkpoint as a user would, in a process of its own, and reports as JSON in its last line.
RELOAD = """
import inspect, json, sys
import builder_patch
import torch
from llava.constants import IMAGE_TOKEN_INDEX
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava_packing_tower.digest import tensor_digest
from llava_packing_tower.hosts import mends
from PIL import Image

folder, image, prompt = sys.argv[1:]
v1 = "device" in inspect.signature(load_pretrained_model).parameters
how = {"device": "cpu", "device_map": "cpu"} if v1 else {"attn_implementation": "sdpa", "torch_dtype": "bfloat16"}
tokenizer, model, processor, _ = load_pretrained_model(folder, None, folder.rsplit("/", 1)[-1], **how)
tower = model.get_vision_tower()
result = {"tower": type(tower).__name__, "mends": mends.applied()}
result["tensors"] = {n: tensor_digest(p.to(torch.bfloat16)) for n, p in tower.vision_tower.named_parameters()}
model.float()
ids = tokenizer_image_token(prompt, tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")[None]
photo = Image.open(image)
pixels = process_images([photo], processor, model.config)
pixels = pixels.float() if torch.is_tensor(pixels) else [p.float() for p in pixels]
inputs = {"images": pixels, "image_sizes": [photo.size]}
answer = model.generate(ids, max_new_tokens=4, do_sample=False, **inputs)[0].tolist()
again, words = ids, []
for _ in answer:
    words.append(int(model(again, use_cache=False, **inputs).logits[0, -1].argmax()))
    again = torch.cat([again, torch.tensor([words[-1:]])], 1)
result |= {"answer": answer, "without cache": words}
print(json.dumps(result))
"""


def reload(checkpoint: Path, workspace: Path, next_dir: str) -> subprocess.CompletedProcess:
    """Run RELOAD on a checkpoint."""
    prompt = f"{SYSTEM}USER: <image>\n{QUESTION} ASSISTANT:"
    command = [sys.executable, "-c", RELOAD, str(checkpoint), str(workspace / "images" / "3.png"), prompt]
    return subprocess.run(
        command, env=environment(next_dir), cwd=REPOSITORY, capture_output=True, text=True, timeout=240
    )


def report(result: subprocess.CompletedProcess) -> dict:
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads(result.stdout.splitlines()[-1])
