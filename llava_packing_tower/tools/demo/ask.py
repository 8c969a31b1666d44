"""Load a LLaVA checkpoint in this (new) process and ask it about every photo of a LLaVA training file.

    python -m llava_packing_tower.tools.demo.ask CHECKPOINT --data photos.json --images folder \\
        --version v1 --output answers

writes `answers.json` (the answers, the patch grid of each photo and the visual tokens that the decoder got for it, a
digest of every tensor of the loaded tower) and `answers.npz` (what reached the tower, as uint8 `[H, W, 3]` per photo).
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch

from ...data.images import open_image
from ...integrations.llava import install
from ...integrations.llava.inference import ask, load_checkpoint, prepare_image
from ...train.history import digests_in_memory
from ...utils.files import write_aside, write_text


def visible(pixels: torch.Tensor, image_processor: object) -> np.ndarray:
    """Normalized pixels `[C, H, W]` as uint8 `[H, W, C]`."""
    mean, std = (np.asarray(v, np.float32) for v in (image_processor.image_mean, image_processor.image_std))
    image = pixels.float().cpu().numpy().transpose(1, 2, 0) * std + mean
    return np.rint(image.clip(0, 1) * 255).astype(np.uint8)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--version", required=True, help="the host's conversation template")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args(argv)

    install.apply()
    loaded = load_checkpoint(args.checkpoint)
    tower = loaded.model.get_vision_tower()
    patch = tower.config.patch_size
    answers, inputs, grids, tokens = {}, {}, {}, {}
    counted: list[int] = []
    loaded.model.get_model().mm_projector.register_forward_hook(
        lambda module, given, output: counted.append(output.shape[:-1].numel())
    )
    for entry in json.loads(args.data.read_text(encoding="utf-8")):
        question = entry["conversations"][0]["value"].replace("<image>", "").strip()
        image = open_image(args.images / entry["image"], loaded.image_processor.image_reading)
        counted.clear()
        answers[entry["image"]] = ask(loaded, image, question, args.version)
        tokens[entry["image"]] = sum(counted)
        pixels = prepare_image(loaded, image)
        inputs[entry["image"]] = visible(pixels[0], loaded.image_processor)
        grids[entry["image"]] = [side // patch for side in pixels.shape[-2:]]
    content = {
        "answers": answers,
        "grids": grids,
        "tokens": tokens,
        "patch_size": patch,
        "dtype": str(tower.dtype).removeprefix("torch."),
        "tower": digests_in_memory(loaded.model),
    }
    write_aside(args.output.with_suffix(".npz"), partial(_savez, arrays=inputs))
    write_text(args.output.with_suffix(".json"), json.dumps(content, indent=1, ensure_ascii=False))
    return 0


def _savez(path: Path, arrays: dict[str, np.ndarray]) -> None:
    np.savez_compressed(path, **arrays)


if __name__ == "__main__":
    sys.exit(main())
