"""LLaVAs with packing towers, and what they say, to be compared with their exports."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import builder_patch  # noqa: F401

# isort: split
import numpy as np
import torch
from export_samples import NEW_TOKENS, samples
from families import tiny
from llava_checkpoints import edit_config, make_decoder, make_llava, save_full

from llava_packing_tower import PackingImageProcessor
from llava_packing_tower.integrations.llava.batched_inference import (
    _embedded,
    conversation_name,
    generate,
    prepare,
    reads_videos,
)
from llava_packing_tower.integrations.llava.inference import Checkpoint, load_checkpoint

PATCH, SIDE = 4, 16  # of the towers
PINPOINTS = [(16, 32), (32, 16), (32, 32), (48, 16), (16, 48)]
RATIOS: dict[str, dict[str, object]] = {
    "pad": {},
    "anyres": {"image_grid_pinpoints": PINPOINTS, "mm_patch_merge_type": "spatial_unpad"},
    "native": {
        "mm_packing_min_patches": 4,
        "mm_packing_max_patches": 40,
        "mm_packing_video": "frames",
        "mm_patch_merge_type": "spatial_unpad",
    },
}


def make_tower(folder: Path, family: str) -> Path:
    """A tiny tower of a family whose folder's name says that it is a packing one."""
    tower = folder / f"{family}_packing"
    if not tower.exists():
        tiny(family).save_pretrained(tower)
        PackingImageProcessor(size=SIDE).save_pretrained(tower)
    return tower


def make_checkpoint(folder: Path, family: str, ratio: str, word: str = "Llama", **more: object) -> Path:
    """A LLaVA as training saves it, float32, with its tower's weights inside."""
    sizes = more.pop("sizes", {})
    decoder = folder / f"decoder_{word}{len(sizes)}"
    if not decoder.exists():
        make_decoder(decoder, word, **sizes)
    values = {**RATIOS.get(ratio.partition("_")[0], {}), **more}
    torch.manual_seed(11)
    model = make_llava(decoder, make_tower(folder, family), word, **values)
    values.pop("add_faster_video", None)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "vision_tower." not in name:  # so that answers depend on images
                torch.nn.init.normal_(parameter, std=1.0 if "newline" in name or "embed" in name else 0.3)
    for name, value in values.items():
        setattr(model.config, name, value)
    model.config.image_aspect_ratio = ratio
    model.config.mm_packing_conversation = "v1"
    model.config.mm_spatial_pool_mode = getattr(model.config, "mm_spatial_pool_mode", None) or "bilinear"
    model.get_vision_tower().vision_tower.requires_grad_(True)  # so that the note says: in the checkpoint
    target = folder / f"llava_{len(list(folder.iterdir()))}"
    save_full(model, decoder, target)
    edit_config(target, mm_packing_conversation="v1", torch_dtype="float32")
    return target


@torch.inference_mode()
def llava_says(loaded: Checkpoint, visuals: Sequence, question: str) -> tuple[np.ndarray, list[int]]:
    """Logits ``[tokens, vocabulary]`` of the prompt, and the greedy answer, from LLaVA's own code."""
    asked = prepare(loaded, question, visuals, conversation_name(loaded.model.config))
    ids, mask = asked.ids[None], torch.ones(1, len(asked.ids), dtype=torch.bool)
    labels = torch.full_like(ids, -100)
    ids, positions, mask, _, embeddings = _embedded(loaded, [asked], ids, mask, labels)
    inputs = {"input_ids": ids} if embeddings is None else {"inputs_embeds": embeddings}
    logits = loaded.model(**inputs, attention_mask=mask, position_ids=positions, use_cache=False).logits
    return logits[0].numpy(), generate(loaded, [asked], max_new_tokens=NEW_TOKENS, do_sample=False)[0]


def says_all(checkpoint: Path) -> list[tuple[np.ndarray, list[int]]]:
    loaded = load_checkpoint(checkpoint, "cpu")
    return [llava_says(loaded, *sample) for sample in samples(reads_videos(loaded.model))]


def save_says(file: Path, said: Sequence[tuple[np.ndarray, list[int]]]) -> None:
    """For a process with another transformers."""
    np.savez(file, **{f"logits_{i}": logits for i, (logits, _) in enumerate(said)})
    file.with_suffix(".json").write_text(json.dumps([answer for _, answer in said]))
