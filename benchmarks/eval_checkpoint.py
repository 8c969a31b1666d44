"""A LLaVA checkpoint to measure an evaluation with: a packing tower of ViT-L/14 size and a small LLaMA decoder.

    LLAVA_NEXT_DIR=... python benchmarks/eval_checkpoint.py FOLDER [--tiny]

All weights are random; projector and decoder then learn, in some seconds, to name sixteen photographs out of installed
packages in crops of many shapes, in a word and in a sentence. So answers end where they should, and can be compared.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from llava_packing_tower.data.sample_photos import PHOTOS, Photo, source_of
from llava_packing_tower.tools.demo.dataset import QUESTION

CONVERSATION = "v1"
LONG_QUESTION = "What does this photo show? Answer with one sentence."
FULL = {
    "tower": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
    "decoder": {
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 4,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
    },
    "max_patches": 576,
    "steps": 200,
    "rate": 5e-4,
    "crops": 12,  # of each photograph, prepared once
}
TINY = {
    "tower": {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4},
    "decoder": {
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    },
    "max_patches": 36,
    "steps": 12,
    "rate": 2e-3,
    "crops": 2,
}
BATCH = 8


def asked(photo: Photo, index: int) -> tuple[str, str]:
    """Question and right answer number ``index`` about a photo: a word and a sentence in turn."""
    if index % 2 == 0:
        return QUESTION, photo.answer
    return LONG_QUESTION, f"As far as one can see in this picture, it shows {photo.answer} and nothing else."


def photographs(count: int, seed: int) -> list:
    """(PIL image, photo): the photographs in turn, every second round for the other question, each cropped anew."""
    import numpy as np
    from PIL import Image

    rng, made = np.random.default_rng(seed), []
    for index in range(count):
        photo = PHOTOS[(index // 2) % len(PHOTOS)]
        with Image.open(source_of(photo)) as image:
            width, height = (int(side * rng.uniform(0.6, 1)) for side in image.size)
            made.append((image.convert("RGB").crop((0, 0, width, height)), photo))
    return made


def build(folder: Path, size: dict, device: str = "cpu"):
    """The untrained model as the host builds it, in float32, and its tokenizer; the tower is written to ``folder``."""
    import torch
    from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM

    from llava_packing_tower import LlavaViTPackingConfig, LlavaViTPackingModel, PackingImageProcessor
    from llava_packing_tower.integrations.llava.inference import build_prompt
    from llava_packing_tower.tools.demo.tiny_models import make_tokenizer

    pairs = [asked(photo, index) for photo in PHOTOS for index in (0, 1)]
    prompts = [build_prompt(CONVERSATION, f"\n{question}", answer) for question, answer in pairs]
    tokenizer = make_tokenizer(folder / "tokenizer", prompts, [photo.answer for photo in PHOTOS])
    torch.manual_seed(0)
    tower, edge = folder / "vit_packing", 14 * 24
    config = LlavaViTPackingConfig(image_size=edge, patch_size=14, use_head=False, **size["tower"])
    with torch.device(device):
        LlavaViTPackingModel(config).bfloat16().save_pretrained(tower)
    PackingImageProcessor(size=edge).save_pretrained(tower)
    config = LlavaConfig(
        **size["decoder"],
        vocab_size=len(tokenizer),
        bos_token_id=1,
        eos_token_id=2,
        max_position_embeddings=2048,
        mm_vision_tower=str(tower),
        mm_hidden_size=size["tower"]["hidden_size"],
        mm_vision_select_layer=-1,
        mm_projector_type="mlp2x_gelu",
        mm_patch_merge_type="flat",
        mm_use_im_start_end=False,
        mm_use_im_patch_token=False,
        image_aspect_ratio="native",
        mm_packing_min_patches=1,
        mm_packing_max_patches=size["max_patches"],
        mm_packing_video="frames",
        mm_packing_conversation=CONVERSATION,
        tokenizer_model_max_length=2048,
    )
    return LlavaLlamaForCausalLM(config).float().to(device), tokenizer


def teach(model: object, tokenizer: object, size: dict) -> float:
    """Train projector and decoder on crops of the photographs; the mean loss of the last ten steps."""
    import torch

    from llava_packing_tower.integrations.llava.batched_inference import IGNORE, prepare
    from llava_packing_tower.integrations.llava.inference import Checkpoint

    loaded = Checkpoint(tokenizer, model, model.get_vision_tower().image_processor, 2048)
    samples = []
    for index, (image, photo) in enumerate(photographs(size["crops"] * len(PHOTOS), seed=0)):
        question, answer = asked(photo, index)
        samples.append(prepare(loaded, question, [image], CONVERSATION, answer=answer))
    learned = [p for name, p in model.named_parameters() if "vision_tower" not in name]
    model.requires_grad_(False).train()
    for parameter in learned:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(learned, lr=size["rate"], weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, size["rate"], size["steps"])
    draw, losses = torch.Generator().manual_seed(0), []
    for _ in range(size["steps"]):
        batch = [samples[i] for i in torch.randperm(len(samples), generator=draw)[:BATCH].tolist()]
        ids = torch.nn.utils.rnn.pad_sequence([s.ids for s in batch], batch_first=True)
        mask, labels = torch.zeros_like(ids, dtype=torch.bool), torch.full_like(ids, IGNORE)
        for row, sample in enumerate(batch):
            end = len(sample.ids)
            mask[row, :end] = True
            labels[row, end - sample.answer : end] = sample.ids[-sample.answer :]
        given = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        loss = model(
            **{name: value.to(model.device) for name, value in given.items()},
            images=[s.pixels[0].to(model.device, model.dtype) for s in batch],
            image_sizes=[s.details[0] for s in batch],
        ).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
    return float(torch.stack(losses[-10:]).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--steps", type=int, help=f"of the training (default {FULL['steps']}, tiny {TINY['steps']})")
    args = parser.parse_args()
    # Nothing is gained by capturing graphs for these few steps.
    os.environ.update(LLAVA_PACKING_FUSED="0", LLAVA_PACKING_CUDA_GRAPHS="0", HF_HUB_OFFLINE="1")
    import torch

    import builder_patch  # noqa: F401

    size = dict(TINY if args.tiny else FULL)
    size["steps"] = args.steps or size["steps"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = True
    args.folder.mkdir(parents=True)
    mark = time.monotonic()
    model, tokenizer = build(args.folder, size, device)
    built = time.monotonic() - mark
    loss = teach(model, tokenizer, size)
    model.config.mm_packing_config = model.get_vision_tower().packing_config("checkpoint")
    tower, projector = model.get_vision_tower(), model.get_model().mm_projector
    parts = {"model": model, "tower": tower, "projector": projector}
    # LLaVA sets a temperature, which transformers refuses to save for greedy decoding.
    model.generation_config.temperature = model.generation_config.top_p = None
    model.eval().bfloat16().save_pretrained(args.folder)
    tokenizer.save_pretrained(args.folder)
    made = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    made |= {"loss": loss, "steps": size["steps"], "max_patches": size["max_patches"], "dtype": "bfloat16"}
    (args.folder / "made.json").write_text(json.dumps(made))
    seconds = time.monotonic() - mark
    print(f"{args.folder}: {made} ({built:.0f} s to build, {seconds:.0f} s in all)", flush=True)


if __name__ == "__main__":
    main()
