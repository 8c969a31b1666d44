"""How many samples per second `llava-packing train` makes with an unedited LLaVA-NeXT, and how it scales over GPUs.

  LLAVA_NEXT_DIR=... python benchmarks/train_speed.py --out speed.json --photos FOLDER \\
      "name=one gpus=1 deepspeed=zero2 batch=16" "name=two gpus=2 deepspeed=zero3 batch=16 mm_packing_balance=false"

A run is configs/llava_next_finetune.yaml at native resolution, with the changes that its words name: a decoder of
Qwen2-0.5B's size, a ViT-L/14 tower, random weights; JPEGs of the sizes of COCO's photos, one sample in eight without an
image, and a share of documents (--documents) of 2,300 to 9,200 patches. path=host trains with LLaVA's own step around
the tower: padded, with all logits, unfused, in the order of its sampler. Counted is from the end of the 10th step to
the end of the last: everything in between, workers and logging included. With --cpu it runs tiny models, which shows
only that everything works.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

from runs import CONFIGS, REPOSITORY, environment, versions

from llava_packing_tower.utils.files import write_text

WARM_UP = 10
WORDS = ("name", "gpus", "deepspeed", "batch", "path")
PATHS = {
    "packed": {},
    "host": {  # LLaVA's own step around the packing tower
        "mm_packing_decoder": "false",
        "mm_packing_full_logits": "true",
        "mm_packing_liger": "false",
        "mm_packing_balance": "false",
    },
}
STEP = re.compile(r"^step +(\d+)/\d+ .*?loss ([\d.]+)")
BASE = {
    "image_aspect_ratio": "native",
    "mm_packing_max_patches": 9216,
    "model_max_length": 16384,
    "gradient_checkpointing": "false",
    "gradient_accumulation_steps": 1,
    "dataloader_num_workers": 8,
    "save_strategy": "no",
    "pretrain_mm_mlp_adapter": "null",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help=f"words KEY=VALUE: {', '.join(WORDS)}, or a key")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="results, read and extended")
    parser.add_argument("--photos", metavar="FOLDER", help="photographs to make images from (default: noise)")
    parser.add_argument("--documents", type=float, default=0.1, help="share of samples with a document (default: 0.1)")
    parser.add_argument("--steps", type=int, default=30, help=f"of each run, more than {WARM_UP}")
    parser.add_argument("--limit", type=float, default=150, help="seconds for each run")
    parser.add_argument("--workspace", type=Path, metavar="FOLDER", help="models and data, kept (default: a new one)")
    parser.add_argument("--logs", type=Path, metavar="FOLDER", help="keep what each run printed")
    parser.add_argument("--cpu", action="store_true", help="tiny models on this machine's processor")
    args = parser.parse_args()
    found = json.loads(args.out.read_text()) if args.out.is_file() else {}
    with tempfile.TemporaryDirectory(prefix="train_speed_") as scratch:
        workspace = args.workspace or Path(scratch) / "workspace"
        if not (workspace / "mix.json").is_file():
            make_workspace(workspace, args)
        for words in args.runs:
            asked = dict(word.split("=", 1) for word in words.split())
            row = {"run": asked, "date": date.today().isoformat(), "versions": versions(sys.executable)[0]}
            row |= run(asked, workspace, Path(scratch) / "output", args)
            found[asked["name"]] = row
            write_text(args.out, json.dumps(found, indent=1) + "\n")
            shown = {key: value for key, value in row.items() if key not in ("versions", "losses", "tail")}
            print(json.dumps(shown), *([row["tail"]] if row["exit status"] else []), sep="\n", flush=True)
    return int(any(row["exit status"] for row in found.values()))


def make_workspace(folder: Path, args: argparse.Namespace) -> None:
    size = "tiny" if args.cpu else "half"
    script = "import sys, pathlib, shipped_configs_parts as p; "
    script += "p.make_workspace(pathlib.Path(sys.argv[1]), sys.argv[2], [('llava_vit', 'qwen')], sys.argv[3])"
    command = [sys.executable, "-c", script, str(folder), size, args.photos or ""]
    subprocess.run(command, env=environment(), cwd=REPOSITORY, check=True)
    add_documents(folder, args.documents, 0.15 if args.cpu else 1.0)


def add_documents(folder: Path, share: float, scale: float, count: int = 48, seed: int = 0) -> None:
    """``mix.json``: the conversations, a share of them about a page in place of a photo.

    scale: of the pages' sides; at 1 they have 2,300 to 9,200 patches of 14 x 14 pixels, in portrait.
    """
    from PIL import Image

    draw = random.Random(seed)
    samples = json.loads((folder / "conversations.json").read_text())
    source = Image.open(next((folder / "images").glob("*.jpg"))).convert("RGB")
    for number in range(count):
        patches, ratio = draw.uniform(2300, 9200), draw.uniform(1.2, 1.5)
        width = (patches / ratio) ** 0.5 * 14 * scale
        source.resize((int(width), int(width * ratio))).save(folder / "images" / f"page{number}.jpg", quality=85)
    for sample in samples:
        if "image" in sample and draw.random() < share:
            sample["image"] = f"page{draw.randrange(count)}.jpg"
    (folder / "mix.json").write_text(json.dumps(samples))


def run(asked: dict[str, str], workspace: Path, output: Path, args: argparse.Namespace) -> dict:
    """One training, and what is read from the times of its steps."""
    size = "tiny" if args.cpu else "half"
    changes = {
        **BASE,
        "mm_vision_tower": workspace / "llava_vit_packing",
        "model_name_or_path": workspace / f"qwen_{size}",
        "data_path": workspace / "mix.json",
        "image_folder": workspace / "images",
        "output_dir": output / f"llava_qwen_{asked['name']}",
        "max_steps": args.steps,
    }
    if args.cpu:
        changes |= {"tf32": "false", "attn_implementation": "sdpa", "dataloader_num_workers": 1}
    changes |= PATHS[asked.get("path", "packed")]
    changes |= {key: value for key, value in asked.items() if key not in WORDS}
    processes, batch = int(asked["gpus"]), int(asked["batch"])
    file = asked["deepspeed"]
    changes["deepspeed"] = file if file.endswith(".json") else CONFIGS / f"{file}.json"
    changes["per_device_train_batch_size"] = batch
    words = [word for key, value in changes.items() for word in (f"--{key}", str(value))]
    words += ["--num_processes" if args.cpu else "--num_gpus", str(processes)]
    command = [sys.executable, "-m", "llava_packing_tower", "train", str(CONFIGS / "llava_next_finetune.yaml"), *words]
    began, times, losses, lines, peaks = time.monotonic(), {}, {}, [], []
    process = subprocess.Popen(
        ["timeout", "--kill-after=10", f"{args.limit:.0f}", *command],
        env=environment(),
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    for line in process.stdout:
        lines.append(line)
        if match := STEP.match(line):
            times.setdefault(int(match[1]), time.monotonic())
            losses[int(match[1])] = float(match[2])
            if not args.cpu:
                peaks.append(_used())
    status = process.wait()
    if args.logs:
        args.logs.mkdir(parents=True, exist_ok=True)
        (args.logs / f"{asked['name']}.log").write_text("".join(lines))
    row = {"exit status": status, "seconds": round(time.monotonic() - began, 1), "losses": losses}
    if len(times) > WARM_UP + 1:
        last = max(times)
        accumulated = int(changes["gradient_accumulation_steps"])
        done = (last - WARM_UP) * batch * processes * accumulated
        row["samples/s"] = round(done / (times[last] - times[WARM_UP]), 2)
        row["first step s"] = round(times[min(times)] - began, 1)
    if peaks:
        row["GiB in use"] = [round(max(used) / 1024, 1) for used in zip(*peaks)]
    return {**row, "tail": "".join(lines[-25:]) if status else ""}


def _used() -> list[int]:
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return [int(line) for line in subprocess.run(query, capture_output=True, text=True).stdout.split()]


if __name__ == "__main__":
    os.chdir(REPOSITORY)
    sys.exit(main())
