"""The fenced blocks of README, CONTRIBUTING and docs, and what stands in for the files and machines that they name."""

from __future__ import annotations

import json
import re
import shlex
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from conversions import SIZES, lively, source_state_dict, standard_folder
from PIL import Image
from published import make_hub

from llava_packing_tower import LlavaViTPackingConfig, LlavaViTPackingModel, PackingImageProcessor
from llava_packing_tower.models.llava_vit.config import LlavaViTConfig, OneVisionEncoderConfig
from llava_packing_tower.models.llava_vit.standard import LlavaViTModel, OneVisionEncoderModel

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

# ---------------------------------------------------------------- what stands in for what
# A block runs as it stands on the page, in a folder where the files that it names exist in tiny (FILES, and the hub's
# checkpoints in a cache), with these changes.

TEXT = {
    r"--num_gpus \d+": "--num_processes 2",
    r"--nproc_per_node \d+": "--nproc_per_node 2",
    r"--device cuda": "--device cpu",
    r'"cuda"': '"cpu"',
    r"image_b\], 16": "image_b], 4",  # the DINOv3 that stands in for the hub's has patches of 4
    r" --use_real_images": "",  # photographs of 512 pixels have 16,000 patches of 4
    r"--peers transformers,timm": "--peers transformers",  # timm is not among the requirements
}
"""Pattern -> what it becomes, in bash and Python."""

MORE = {
    "train": "--dry_run --num_processes 2 --tf32 null --attn_implementation sdpa --pretrain_mm_mlp_adapter null",
    "bench": "--repeat 1 --size tiny --work uni1,train:ragged2",
    "probe": "--cache cache --batch_size 8 --k 3",
    "align": "--image_size 16",
}
"""Command -> words that are added: nothing is trained, measured or downloaded."""

UNKNOWN_TO_PYTHON = {
    "image_a": "torch.rand(3, 64, 96)",
    "image_b": "torch.rand(3, 112, 48)",
    "photos": "[Image.new('RGB', (70, 42)), Image.new('RGB', (42, 98))]",
    "model": "__import__('native_host').Host(__import__('pathlib').Path.cwd()).model()",
    "image_processor": "model.get_vision_tower().image_processor",
    "input_ids": "torch.tensor([[1, 5, -200, 6, -200, 7]])",
    "attention_mask": "torch.ones(1, 6, dtype=torch.long)",
    "hidden_states": "torch.rand(30, 48)",
    "grid_thw": "torch.tensor([[1, 3, 6], [1, 4, 3]])",
    "data_url": "'data:image/png;base64,'",
}
"""Name that a page takes for granted -> what it is; in the order in which they are made."""


def tower(folder: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(1)
    LlavaViTPackingModel(LlavaViTPackingConfig(**sizes, patch_size=14, image_size=224)).save_pretrained(folder)
    PackingImageProcessor(size=224).save_pretrained(folder)


def backbone(file: Path) -> None:
    """The weights of ``checkpoints/hevc_vit_large``, as the training code names them."""
    torch.save(source_state_dict(lively(LlavaViTModel(LlavaViTConfig(**SIZES))).state_dict()), file)


def onevision(folder: Path) -> None:
    lively(OneVisionEncoderModel(OneVisionEncoderConfig(**SIZES))).save_pretrained(folder)


def toy_family(folder: Path) -> None:
    from toy_vit import publish

    publish(folder)


def llava(folder: Path) -> None:
    """Enough of a LLaVA checkpoint for what `eval` checks before it starts lmms-eval."""
    folder.mkdir(parents=True)
    config = {"mm_vision_tower": "packing:tower", "architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava"}
    (folder / "config.json").write_text(json.dumps(config))
    torch.save({"w": torch.ones(1)}, folder / "pytorch_model.bin")


EXPORTED = """
import sys; from pathlib import Path; from export_checks import make_checkpoint
from export_host_checks import CLIP, MLP
from llava_packing_tower.export.writer import export
folder = Path(sys.argv[1])
made = make_checkpoint(folder / "export_parts", "llava_vit", "native", **CLIP, **MLP)
made.rename(folder / "checkpoints" / "whole")
export(folder / "checkpoints" / "whole", folder / "exported" / "run1")
"""
"""What makes a whole LLaVA (``checkpoints/whole``) and its export (``exported/run1``), in a process of its own."""


def results(folder: Path) -> None:
    (folder / "ai2d").mkdir(parents=True)
    score = {"results": {"ai2d": {"exact_match,none": len(folder.name) / 10}}, "n-samples": {"ai2d": {"effective": 8}}}
    (folder / "ai2d" / "1_results.json").write_text(json.dumps(score))


def photographs(folder: Path) -> None:
    """Two classes of images, and the first of them beside the classes, every one of another shape."""
    noise = np.random.default_rng(0)
    for number in range(16):
        name = ("cats", "dogs")[number % 2]
        (folder / name).mkdir(parents=True, exist_ok=True)
        pixels = noise.integers(0, 120 + 120 * (number % 2), (60 + 3 * number, 90 - 2 * number, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name / f"{number}.png")


def image(file: Path) -> None:
    Image.fromarray(np.random.default_rng(1).integers(0, 255, (56, 84, 3), dtype=np.uint8)).save(file)


def samples(file: Path) -> None:
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A cup."}]
    enough = range(512)  # for a micro-batch of every process in the documents
    file.write_text(json.dumps([{"id": str(number), "conversations": turns} for number in enough]))


def pairs(file: Path) -> None:
    """Data of DPO, about one of the photographs."""
    pair = {"prompt": "What?", "chosen": "A cup.", "rejected": "A cat."}
    file.write_text(json.dumps([{"id": "0", "image": "cats/0.png", **pair}]))


def mixture(file: Path) -> None:
    samples(file.with_suffix(".json"))
    file.write_text(f"datasets:\n  - json_path: {file.with_suffix('.json')}\n    sampling_strategy: all\n")


def script(file: Path) -> None:
    file.write_text("import sys\nprint('a script ran with', sys.argv[1:])\n")


FILES: dict[str, Callable[[Path], object]] = {
    "checkpoints/llava_vit_large_packing": tower,
    "checkpoints/hevc_vit_large": standard_folder,
    "checkpoints/run1": llava,
    "checkpoints/llava_qwen_packing": llava,
    "backbone.pt": backbone,
    "data/train.json": samples,
    "pairs.json": pairs,
    "data/single_image.yaml": mixture,
    "data/blip_558k/blip_558k_plain.json": samples,
    "data/blip_558k/images": photographs,
    "data/images": photographs,
    "photos": photographs,
    "eval_results/run1": results,
    "eval_results/run2": results,
    "mosaic_0.png": image,
    "mosaic_1.png": image,
    "clip_17.npy": lambda file: np.save(file, np.zeros((48, 3), dtype=np.float32)),
    "path/to/script.py": script,
    "folder of the published checkpoint": toy_family,
}
"""File or folder that a page names -> what makes it in tiny. FILES of the repository stand in the folder too."""


def workspace(folder: Path) -> Path:
    """The folder in which the blocks run."""
    for name, make in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        make(folder / name)
    for name in ("configs", "requirements", "benchmarks", "setup.cfg", "Makefile", ".pre-commit-config.yaml"):
        (folder / name).symlink_to(ROOT / name)
    make_hub(folder / "hub", {"lmms-lab-encoder/onevision-encoder-large": onevision})
    return folder


# ---------------------------------------------------------------- the blocks


class Block(NamedTuple):
    """A fenced block. ``language`` is as it is written, ``line`` that of the fence."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.name}-{self.line}-{self.language or 'output'}"

    def with_stand_ins(self) -> str:
        return stand_in(self.text)


def stand_in(text: str) -> str:
    for pattern, replacement in TEXT.items():
        text = re.sub(pattern, replacement, text)
    return text


FENCE = re.compile(r"^( *)(`{3,}|~{3,}) *(.*?) *\n(.*?)^ *\2 *$", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[Block]:
    text = page.read_text("utf-8")
    found = []
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        found.append(Block(page, line, match[3], textwrap.dedent(match[4])))
    return found


def commands(text: str) -> list[list[str]]:
    """The commands of a piece of bash, as words; ``&&`` parts them as the end of a line does."""
    found: list[list[str]] = []
    words = ""
    for line in text.replace("\\\n", " ").splitlines():
        words += line + "\n"
        try:
            parts = shlex.split(words, comments=True)
        except ValueError:  # a quotation that goes on in the next line
            continue
        words = ""
        found.append([])
        for part in parts:
            if part == "&&":
                found.append([])
            else:
                found[-1].append(part)
    assert not words, f"a quotation does not end: {words}"
    return [command for command in found if command]
