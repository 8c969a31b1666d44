"""Tiny models of a real host, batches as its collator makes them, and the plain reference for native resolution."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import torch

SQUARE = 56
WORDS = ("cat", "moon", "cup")
QUESTION = "What is in the photo?"
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)
IGNORE, IMAGE = -100, -200
TOWER = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 14,
    "image_size": SQUARE,
    "use_head": False,
}
DECODER = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "attn_implementation": "eager",
}


def make_prompts() -> list[str]:
    """Enough text for a tokenizer of the template ``v1``."""
    return [f"{SYSTEM}USER: <image>\n{QUESTION} ASSISTANT: {word}</s>" for word in WORDS]


def make_tower(folder: Path) -> None:
    from llava_packing_tower import LlavaViTPackingConfig, LlavaViTPackingModel, PackingImageProcessor

    torch.manual_seed(1)
    LlavaViTPackingModel(LlavaViTPackingConfig(**TOWER)).save_pretrained(folder)
    PackingImageProcessor(size=SQUARE).save_pretrained(folder)


class Host:
    """The models of the host under test, all with the same weights for the same options."""

    def __init__(self, folder: Path) -> None:
        self.tower = folder / "tiny_packing"
        if not self.tower.exists():
            make_tower(self.tower)
        import llava.model.language_model.llava_llama as module

        self.module = module
        self.is_next = bool(os.environ.get("LLAVA_NEXT_DIR"))
        self.kept: dict[tuple, torch.nn.Module] = {}

    def model(self, ratio: str = "native", **options) -> torch.nn.Module:
        key = (ratio, *sorted(options.items()))
        if key not in self.kept:
            values = {"mm_projector_type": "mlp2x_gelu", "mm_patch_merge_type": "flat", **options}
            if ratio == "native":
                limits = {"mm_packing_min_patches": 1, "mm_packing_max_patches": 64, "mm_packing_video": "clip"}
                values = {**limits, **values}
            config = self.module.LlavaConfig(
                **DECODER,
                mm_vision_tower=str(self.tower),
                mm_hidden_size=TOWER["hidden_size"],
                mm_vision_select_layer=-1,
                unfreeze_mm_vision_tower=True,
                image_aspect_ratio=ratio,
                tokenizer_model_max_length=400,
                **values,
            )
            torch.manual_seed(3)
            model = self.module.LlavaLlamaForCausalLM(config).float()
            generator = torch.Generator().manual_seed(5)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
            self.kept[key] = model.eval().requires_grad_(True)
        return copy.deepcopy(self.kept[key])

    def prepare(self, model, batch):
        extra = {"image_sizes": batch.get("image_sizes")}
        if self.is_next:
            extra["modalities"] = batch.get("modalities", ["image"] * len(batch["images"]))
        return model.prepare_inputs_labels_for_multimodal(
            batch["input_ids"], None, batch["attention_mask"], None, batch["labels"], batch["images"], **extra
        )

    def forward(self, model, batch):
        more = {}
        if self.is_next:
            more["modalities"] = batch.get("modalities", ["image"] * len(batch["images"]))
        return model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            labels=batch["labels"],
            images=batch["images"],
            **more,
        )


def pixels(*sides, seed=0):
    """Random images of (height, width) in patches."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, h * 14, w * 14, generator=generator) for h, w in sides]


def collate(samples, images, side="right"):
    """A batch as LLaVA's collator makes it: id lists, padded with 0; labels are the ids but for the images."""
    longest = max(map(len, samples))
    ids, labels, mask = [], [], []
    for sample in samples:
        pad, own = [0] * (longest - len(sample)), [IGNORE if t == IMAGE else t for t in sample]
        rows = ((sample, pad), (own, [IGNORE] * len(pad)), ([1] * len(sample), pad))
        for target, (left, right) in zip((ids, labels, mask), rows):
            target.append(left + right if side == "right" else right + left)
    return {
        "input_ids": torch.tensor(ids),
        "labels": torch.tensor(labels),
        "attention_mask": torch.tensor(mask).bool(),
        "images": images,
    }


# An image in front; text alone (for which LLaVA has a blank image); two images with text between; an image at the end.
SAMPLES = [[IMAGE, 3, 4, 5], [6, 7], [8, IMAGE, 9, 10, IMAGE, 11, 12], [13, 14, 15, IMAGE]]
RAGGED = [(2, 5), (1, 1), (3, 2), (1, 7), (4, 3)]


def image_features(model, image):
    """One image through the tower and the projector, alone and by hand."""
    from llava_packing_tower import image_to_packing_input

    tower = model.get_vision_tower()
    rows, grid = image_to_packing_input(image, 14)
    states = tower.vision_tower(rows, grid, output_hidden_states=True).hidden_states[-1]
    kind, projector = model.config.mm_projector_type, model.get_model().mm_projector
    h, w = grid[0, 1:].tolist()
    if kind in ("linear", "mlp2x_gelu"):
        tokens = projector(states)
    else:
        states = projector.ln_q(states).view(h, w, -1)
        down, across = (2, 2) if kind == "spatial_merge" else (1, 4)
        cells = []
        for top in range(0, h, down):
            for left in range(0, w, across):
                ys = [min(top + y, h - 1) for y in range(down)]
                xs = [min(left + x, w - 1) for x in range(across)]
                cells.append(torch.cat([states[y, x] for y in ys for x in xs]))
        h, w = -(-h // down), -(-w // across)
        tokens = projector.mlp(torch.stack(cells))
    if "unpad" in model.config.mm_patch_merge_type:
        lines = tokens.view(h, w, -1)
        newline = model.get_model().image_newline
        tokens = torch.cat([part for line in lines for part in (line, newline[None])])
    return tokens


def reference_embeddings(model, samples, images):
    """For each sample alone: embeddings and labels, with the tokens of each image in its place."""
    images, made = iter(images), []
    for sample in samples:
        parts, labels = [], []
        for token in sample:
            if token == IMAGE:
                parts.append(image_features(model, next(images)))
                labels += [IGNORE] * len(parts[-1])
            else:
                parts.append(model.get_model().embed_tokens(torch.tensor([token])))
                labels.append(token)
        if IMAGE not in sample:
            next(images)
        made.append((torch.cat(parts), torch.tensor(labels)))
    return made


def close(a, b, atol=2e-5):
    assert a.shape == b.shape, (a.shape, b.shape)
    worst = (a - b).abs().max().item()
    assert worst <= atol, worst


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}
