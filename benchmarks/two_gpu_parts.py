"""What ``two_gpu_training.py`` trains: the model with its sizes, and the micro-batches."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING

from llava_packing_tower.tools.bench.training.models import FULL as LARGE
from llava_packing_tower.tools.bench.training.models import TINY as SMALL
from llava_packing_tower.tools.bench.training.models import host_classes

if TYPE_CHECKING:
    import torch

IGNORE, IMAGE = -100, -200
MICRO, SLOTS = 4, 2  # samples of a micro-batch, micro-batches of a step
FULL = {
    "steps": 50,
    "tower": LARGE["tower"],
    "patch": 14,
    "sides": (8, 33),  # of an image in patches
    "decoder": LARGE["decoder"],
    "rate": 2e-4,
}
TINY = {
    "steps": 24,
    "tower": SMALL["tower"],
    "patch": 14,
    "sides": (1, 6),
    "decoder": SMALL["decoder"],
    "rate": 5e-3,
}


def make(folder: Path, size: dict, device: str) -> dict:
    """Write a LLaVA with random weights in bfloat16, with its tower inside, as a finished training leaves it."""
    import torch

    from llava_packing_tower import LlavaViTPackingConfig, LlavaViTPackingModel, PackingImageProcessor

    torch.manual_seed(0)
    edge = size["patch"] * (size["sides"][1] - 1)
    tower = folder / "vit_packing"
    # Without a head: LLaVA reads hidden states before it, and every weight is trained.
    config = LlavaViTPackingConfig(image_size=edge, patch_size=size["patch"], use_head=False, **size["tower"])
    with torch.device(device):
        LlavaViTPackingModel(config).bfloat16().save_pretrained(tower)
    PackingImageProcessor(size=edge).save_pretrained(tower)
    name, config_class, model_class = host_classes()
    config = config_class(
        **size["decoder"],
        mm_vision_tower=str(tower),
        mm_hidden_size=size["tower"]["hidden_size"],
        mm_vision_select_layer=-1,
        mm_projector_type="mlp2x_gelu",
        mm_patch_merge_type="flat",
        mm_tunable_parts="mm_vision_tower,mm_mlp_adapter,mm_language_model",
        image_aspect_ratio="native",
        mm_packing_min_patches=1,
        mm_packing_max_patches=size["sides"][1] ** 2,
        mm_packing_video="frames",
        tokenizer_model_max_length=8192,
        use_cache=False,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = model_class(config).bfloat16()
    projector = model.get_model().mm_projector
    model.config.mm_packing_config = model.get_vision_tower().packing_config("checkpoint")
    model.save_pretrained(folder / "llava")
    count = sum(p.numel() for p in model.parameters())
    parts = {"tower": model.get_vision_tower(), "projector": projector}
    return {"host": name, "parameters": count} | {k: sum(p.numel() for p in m.parameters()) for k, m in parts.items()}


@functools.cache
def photo(height: int, width: int, number: int, device: str) -> torch.Tensor:
    """[3, height, width] in bfloat16: made once, so that the steps measure training alone."""
    import torch

    draw = torch.Generator().manual_seed(number + 1000)
    coarse = torch.randn(1, 3, 5, 5, generator=draw)
    pixels = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic")[0]
    return pixels.to(device, torch.bfloat16)


def micro_batch(size: dict, step: int, slot: int, device: str, backwards: bool = False) -> dict:
    """Four samples: three photos of other sizes and a text, or (slot 1, every fifth step) four texts.

    There are 16 images and 16 texts, each with an answer of its own to be learned by heart.
    """
    import torch

    draw = torch.Generator().manual_seed(7919 * step + slot)
    vocabulary, patch = size["decoder"]["vocab_size"], size["patch"]
    rows, images = [], []
    for index in range(MICRO):
        text = index == 3 or (slot == 1 and step % 5 == 4)
        number = int(torch.randint(16, (1,), generator=draw))
        own = torch.Generator().manual_seed(number + 100 * text)  # the same each time this sample comes
        answer = torch.randint(3, vocabulary, (8,), generator=own)
        question = torch.randint(3, vocabulary, (6 + 10 * (number % 3),), generator=own) if text else torch.arange(3, 9)
        if not text:
            side = torch.randint(*size["sides"], (2,), generator=own)
            images.append(photo(*(side * patch).tolist(), number, device))
            question = torch.cat([question[:3], torch.tensor([IMAGE]), question[3:]])
        rows.append((torch.cat([question, answer]), len(question)))
    if backwards:
        rows, images = rows[::-1], images[::-1]
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.zeros(MICRO, longest, dtype=torch.long)
    labels, mask = torch.full_like(ids, IGNORE), torch.zeros_like(ids, dtype=torch.bool)
    for row, (words, start) in enumerate(rows):
        ids[row, : len(words)], mask[row, : len(words)] = words, True
        labels[row, start : len(words)] = words[start:]
    batch = {"input_ids": ids.to(device), "attention_mask": mask.to(device), "labels": labels.to(device)}
    return batch | {"images": images or None}
