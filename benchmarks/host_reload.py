"""One cell's second half, in a process of its own: load a LLaVA-NeXT checkpoint as a user would, and generate.

python benchmarks/host_reload.py CHECKPOINT IMAGE     prints a JSON object as its last line
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from PIL import Image
from safetensors import safe_open

import builder_patch  # noqa: F401
from llava_packing_tower.checkpoint.hashing import tensor_digest
from llava_packing_tower.integrations.llava import compat

PROMPT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<image>\nWhat is in the photo?"
    "<|im_end|>\n<|im_start|>assistant\n"
)
NEW_TOKENS = 4


def differing_from_files(model: torch.nn.Module, folder: Path) -> tuple[int, list[str]]:
    """How many tensors the checkpoint's files hold, and the names of those that are not the model's, bit by bit.

    A run without DeepSpeed saves its projector as float32; what counts is then what a cast makes of it.
    """
    state, wrong, count = model.state_dict(), [], 0
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in list(tensors.keys()):
                count += 1
                here = state.get(name)
                if here is None or here.is_meta or not torch.equal(tensors.get_tensor(name).to(here.dtype), here):
                    wrong.append(name)
    return count, wrong


def main() -> None:
    folder, image = Path(sys.argv[1]), Image.open(sys.argv[2])
    from llava.constants import IMAGE_TOKEN_INDEX
    from llava.mm_utils import process_images, tokenizer_image_token
    from llava.model.builder import load_pretrained_model

    tokenizer, model, processor, _ = load_pretrained_model(
        str(folder), None, folder.name, attn_implementation="sdpa", torch_dtype="bfloat16"
    )
    tower = model.get_vision_tower()
    count, wrong = differing_from_files(model, folder)
    result = {
        "tower": type(tower).__name__,
        "tensors": {n: tensor_digest(p) for n, p in tower.vision_tower.named_parameters()},
        "meta": [n for n, p in [*model.named_parameters(), *model.named_buffers()] if p.is_meta],
        "files": count,
        "differing": wrong,
    }
    # In float32, for a comparison of tokens that rounding cannot tip.
    model.float()
    ids = tokenizer_image_token(PROMPT, tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")[None]
    pixels = process_images([image], processor, model.config)
    pixels = [p.float() for p in pixels]
    inputs = {"images": pixels, "image_sizes": [image.size], "modalities": ["image"]}
    answer = model.generate(ids, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False, **inputs)
    again, tokens = ids, []
    with torch.no_grad():
        for _ in range(NEW_TOKENS):
            logits = model(input_ids=again, use_cache=False, **inputs).logits[0, -1].clone()
            logits[model.generation_config.eos_token_id] = -torch.inf  # as min_new_tokens does
            tokens.append(int(logits.argmax()))
            again = torch.cat([again, torch.tensor([tokens[-1:]])], dim=1)
    result |= {"answer": answer[0].tolist(), "without cache": tokens, "patches": compat.applied()}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
