"""What ``shipped_configs.py`` trains: towers of all families, decoders, stage-1 projectors, photos and data.

``tiny`` runs on a CPU in seconds. ``half`` has a decoder of Qwen2-0.5B's size, the published sizes of the towers, and
JPEGs of the sizes that COCO's photos have. All weights are random.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import native_vs_anyres
import numpy as np
import torch
import yaml
from host_matrix_parts import DECODER, QUESTION, SYSTEM, WORDS
from host_matrix_parts import TOWER as TINY_LLAVA_VIT
from host_matrix_parts import make_tokenizer as make_qwen_tokenizer
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
from two_gpu_parts import FULL

from llava_packing_tower import PackingImageProcessor
from llava_packing_tower.models.registry import family_for
from llava_packing_tower.multimodal.projectors import make_projector
from llava_packing_tower.tools.bench.models import PRESETS
from llava_packing_tower.tools.bench.training.photos import photo_sizes
from llava_packing_tower.tools.demo.tiny_models import make_tokenizer as make_llama_tokenizer

SIZES = ("tiny", "half")
TEXTS_EVERY = 8  # one sample in so many has no image


def make_workspace(folder: Path, size: str, needs: list[tuple[str, str]], photos: str = "", seed: int = 0) -> None:
    """Write everything into ``folder``.

    needs: pairs of a family and the kind of a decoder (qwen or llama).
    photos: folder of photographs to make the images from (default: noise).
    """
    folder.mkdir(parents=True, exist_ok=True)
    device = "cuda" if size == "half" and torch.cuda.is_available() else "cpu"
    torch.manual_seed(seed)
    decoders = {kind: _decoder(folder / f"{kind}_{size}", kind, size, device) for _, kind in needs}
    towers = {family: _tower(folder / f"{family}_packing", family, size, device) for family, _ in needs}
    for family, kind in needs:
        width, out = towers[family], decoders[kind]
        shipped = Path(__file__).parents[1] / "configs" / f"llava_next_pretrain_{family}.yaml"
        named = yaml.safe_load(shipped.read_text())["mm_projector_type"] if shipped.is_file() else None
        mlp = torch.nn.Sequential(torch.nn.Linear(width, out), torch.nn.GELU(), torch.nn.Linear(out, out))
        projector = make_projector(named, width, out) or mlp
        state = {f"model.mm_projector.{key}": value for key, value in projector.state_dict().items()}
        file = folder / f"{family}_{kind}_projector" / "mm_projector.bin"
        file.parent.mkdir(exist_ok=True)
        torch.save(state, file)
    _data(folder, size, Path(photos) if photos else None, seed)


def _decoder(folder: Path, kind: str, size: str, device: str) -> int:
    if (folder / "config.json").is_file():
        return json.loads((folder / "config.json").read_text())["hidden_size"]
    sizes = DECODER if size == "tiny" else FULL["decoder"]
    if kind == "qwen":
        tokenizer = make_qwen_tokenizer(folder)
        special = {"bos_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
        config = Qwen2Config(**{"vocab_size": len(tokenizer), **sizes}, **special, use_sliding_window=False)
        model_class = Qwen2ForCausalLM
    else:
        prompts = [f"{SYSTEM} USER: {QUESTION} ASSISTANT: {word}</s>" for word in WORDS]
        # The pieces of its vocabulary come from a longer text.
        prompts = [*prompts * 4, native_vs_anyres.__doc__]
        tokenizer = make_llama_tokenizer(folder, prompts, [w for words in WORDS for w in words.split()])
        config = LlamaConfig(**{**sizes, "vocab_size": len(tokenizer)}, bos_token_id=1, eos_token_id=2)
        model_class = LlamaForCausalLM
    with torch.device(device):
        model_class(config).to(torch.bfloat16).save_pretrained(folder)
    return config.hidden_size


def _tower(folder: Path, family: str, size: str, device: str) -> int:
    chosen = PRESETS[family]
    fields = dict(chosen.tiny if size == "tiny" else chosen.full)
    if family == "llava_vit":  # anyres takes five values of image_size; without its head, all of it is trained
        fields = TINY_LLAVA_VIT if size == "tiny" else {**fields, "image_size": 336, "use_head": False}
    kind = family_for(chosen.model_type)
    config = kind.config_class(**fields)
    with torch.device(device):
        kind(config).to(torch.bfloat16).save_pretrained(folder)
    if family == "llava_vit":
        PackingImageProcessor(size=config.image_size).save_pretrained(folder)
    return config.hidden_size


def _data(folder: Path, size: str, photos: Path | None, seed: int) -> None:
    """Photos, a JSON of conversations, one of captions, and a YAML that lists the first with a sampling strategy."""
    if (folder / "conversations.yaml").is_file():
        return
    (folder / "images").mkdir(exist_ok=True)
    draw, noise = random.Random(seed), np.random.default_rng(seed)
    sizes = photo_sizes(1.0 if size == "half" else 0.35)
    sources = [Image.open(file).convert("RGB") for file in sorted(photos.iterdir())] if photos else []
    count = 320 if size == "half" else 24
    for number in range(count):
        width, height = draw.choice(sizes)
        if sources:
            image = sources[number % len(sources)].resize((width, height))
        else:
            image = Image.fromarray(noise.integers(0, 255, (height, width, 3), dtype=np.uint8))
        image.save(folder / "images" / f"{number}.jpg", quality=90)
    conversations, captions = [], []
    for number in range(4000 if size == "half" else 400):
        answer = " ".join(draw.choice(WORDS) for _ in range(draw.randint(1, 20)))
        image = {} if number % TEXTS_EVERY == 0 else {"image": f"{draw.randrange(count)}.jpg"}
        question = f"<image>\n{QUESTION}" if image else QUESTION
        conversations.append(_sample(number, question, answer, image))
        captions.append(_sample(number, "<image>", answer, {"image": f"{draw.randrange(count)}.jpg"}))
    (folder / "conversations.json").write_text(json.dumps(conversations))
    (folder / "captions.json").write_text(json.dumps(captions))
    listed = {"datasets": [{"json_path": str(folder / "conversations.json"), "sampling_strategy": "first:90%"}]}
    (folder / "conversations.yaml").write_text(yaml.safe_dump(listed))


def _sample(number: int, question: str, answer: str, image: dict) -> dict:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": str(number), **image, "conversations": turns}
