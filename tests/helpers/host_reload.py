"""Loads checkpoints as a user does, in a process of its own, and prints a JSON list about them in its last line."""

from __future__ import annotations

import json
import sys

import builder_patch  # noqa: F401

# isort: split
import torch
from PIL import Image


def about(folder: str, base: str | None, image: str, prompt: str) -> dict:
    from llava.constants import IMAGE_TOKEN_INDEX
    from llava.mm_utils import process_images, tokenizer_image_token

    from llava_packing_tower.checkpoint.hashing import tensor_digest
    from llava_packing_tower.integrations.llava.inference import load_checkpoint

    loaded = load_checkpoint(folder, "cpu", model_base=base)  # through the host's load_pretrained_model
    tokenizer, model = loaded.tokenizer, loaded.model
    tower = model.get_vision_tower()
    result = {"tower": type(tower).__name__, "dtype": str(tower.dtype)}
    result["tensors"] = {n: tensor_digest(p) for n, p in tower.vision_tower.named_parameters()}
    ids = tokenizer_image_token(prompt, tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")[None]
    photo = Image.open(image)
    pixels = process_images([photo], loaded.image_processor, model.config)
    pixels = pixels if torch.is_tensor(pixels) else torch.stack(list(pixels))
    with torch.no_grad():
        features = tower(pixels.to(tower.dtype))
        result |= {"pixels": tensor_digest(pixels), "features": tensor_digest(features)}
        model.float()
        inputs = {"images": pixels.float(), "image_sizes": [photo.size]}
        never = {"eos_token_id": model.config.vocab_size - 1, "pad_token_id": 0}  # four tokens, whatever they are
        answer = model.generate(ids, max_new_tokens=4, do_sample=False, **never, **inputs)[0].tolist()
        again, words = ids, []
        for _ in answer:
            words.append(int(model(again, use_cache=False, **inputs).logits[0, -1].argmax()))
            again = torch.cat([again, torch.tensor([words[-1:]])], 1)
    return result | {"answer": answer, "without cache": words}


def main() -> None:
    jobs, image, prompt = sys.argv[1:]
    reports = []
    for job in json.loads(jobs):
        try:
            reports.append(about(job["folder"], job.get("base"), image, prompt))
        except Exception as error:
            reports.append({"error": f"{type(error).__name__}: {error}"})
    print(json.dumps(reports))


if __name__ == "__main__":
    main()
