"""How many samples per second `llava-packing train` makes with an unedited LLaVA-NeXT, and how it scales over GPUs.

  LLAVA_NEXT_DIR=... python benchmarks/train_speed.py --out speed.json --photos FOLDER \\
      "name=one gpus=1 deepspeed=zero2 batch=16" "name=two gpus=2 deepspeed=zero3 batch=16 mm_packing_balance=false"

A run is configs/llava_next_finetune.yaml at native resolution, with the changes that its words name: a decoder of
Qwen2-0.5B's size, a ViT-L/14 tower, random weights; JPEGs of the sizes of COCO's photos, one sample in eight without an
image, and a share of documents (--documents) of 2,300 to 9,200 patches. path=host trains with LLaVA's own step around
the tower: padded, with all logits, unfused, in the order of its sampler. Counted is from the end of the 10th step to
the end of the last: everything in between, workers and logging included. With --cpu it runs tiny models, which shows
only that everything works.

  LLAVA_NEXT_DIR=... python benchmarks/train_speed.py --out scaling.json --photos FOLDER --scaling 1 2 4

makes the runs of a table: on so many GPUs, by ZeRO-2 and ZeRO-3, samples dealt over the ranks and as LLaVA's sampler
has them. A step always has the same samples (--batch times the most GPUs; fewer accumulate), so that the losses must be
the same. (With transformers 4.40, one process has another order than several.) Under "scaling" the file then has, for
each run, samples/s, the efficiency against the fewest GPUs of the same stage, dealt over undealt, the largest
difference from the losses of the fewest GPUs (of the same stage: LLaVA's newline has other random weights under
ZeRO-3), and what two profiled steps before the 10th say of the time, collectives among it. A run of the table that the
file has already is not repeated.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

from runs import CONFIGS, REPOSITORY, Training, environment, last_error, train, train_command, versions

from llava_packing_tower.utils.files import write_text

WARM_UP, PROFILED = 10, 2  # a profile takes 5 steps and twice as many as are profiled
PROFILE = re.compile(r"^profile: a step takes (\d+) ms: (.*)$", re.M)
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
PROJECTOR = Path("llava_vit_qwen_projector", "mm_projector.bin")
BASE = {
    "image_aspect_ratio": "native",
    "mm_packing_max_patches": 9216,
    "model_max_length": 16384,
    "gradient_checkpointing": "false",
    "gradient_accumulation_steps": 1,
    "dataloader_num_workers": 8,
    "save_strategy": "no",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="RUN", help=f"words KEY=VALUE: {', '.join(WORDS)}, or a key")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="results, read and extended")
    parser.add_argument("--scaling", type=int, nargs="+", default=[], metavar="N", help="the table, on so many GPUs")
    parser.add_argument("--deepspeed", nargs="+", default=["zero2", "zero3"], help="of the table (default: both)")
    parser.add_argument("--batch", type=int, default=8, help="samples of a micro-batch of the table (default: 8)")
    parser.add_argument("--photos", metavar="FOLDER", help="photographs to make images from (default: noise)")
    parser.add_argument("--documents", type=float, default=0.1, help="share of samples with a document (default: 0.1)")
    parser.add_argument("--steps", type=int, default=30, help=f"of each run, more than {WARM_UP}")
    parser.add_argument("--limit", type=float, default=150, help="seconds for each run")
    parser.add_argument("--within", type=float, default=math.inf, help="seconds in all: what is left is not run")
    parser.add_argument("--workspace", type=Path, metavar="FOLDER", help="models and data, kept (default: a new one)")
    parser.add_argument("--logs", type=Path, metavar="FOLDER", help="keep what each run printed")
    parser.add_argument("--cpu", action="store_true", help="tiny models on this machine's processor")
    args = parser.parse_args()
    found = json.loads(args.out.read_text()) if args.out.is_file() else {}
    runs, began = [dict(word.split("=", 1) for word in words.split()) for words in args.runs], time.monotonic()
    try:
        table = scaling_runs(args.scaling, args.deepspeed, args.batch) if args.scaling else []
    except ValueError as error:
        parser.error(str(error))
    runs += [asked for asked in table if found.get(asked["name"], {}).get("exit status") != 0]
    installed, failed = versions(sys.executable)[0], False
    with tempfile.TemporaryDirectory(prefix="train_speed_") as scratch:
        workspace = args.workspace or Path(scratch) / "workspace"
        if not (workspace / "mix.json").is_file():
            make_workspace(workspace, args)
        for asked in runs:
            left = began + args.within - time.monotonic()
            if left < 30:
                print(f"{asked['name']}: not run, {left:.0f} s are left", flush=True)
                failed = True
                continue
            row = {"run": asked, "date": date.today().isoformat(), "versions": installed}
            row |= run(asked, workspace, Path(scratch) / "output", args, left)
            found[asked["name"]] = row
            if table:
                found["scaling"] = scaling(table, found)
            write_text(args.out, json.dumps(found, indent=1) + "\n")
            shutil.rmtree(Path(scratch) / "output", ignore_errors=True)
            shown = {key: value for key, value in row.items() if key not in ("versions", "losses", "tail")}
            print(json.dumps(shown), *([row["tail"]] if row["exit status"] else []), sep="\n", flush=True)
            failed |= row["exit status"] != 0
    if table:  # also if the file had all runs
        found["scaling"] = scaling(table, found)
        write_text(args.out, json.dumps(found, indent=1) + "\n")
        print(*map(json.dumps, found["scaling"]), sep="\n")
    return int(failed)


# ---------------------------------------------------------------- the table


def scaling_runs(counts: list[int], stages: list[str], batch: int) -> list[dict[str, str]]:
    """The runs of the table, in words. Raises ``ValueError`` where a step cannot have the same samples on each."""
    most = max(counts)
    if any(count < 1 or most % count for count in counts):
        raise ValueError(f"--scaling: {most} GPUs are no multiple of each of {counts}")
    runs = []
    for stage, gpus in itertools.product(stages, sorted(set(counts))):
        for dealt in (True, False) if gpus > 1 else (False,):
            asked = {"name": f"{Path(stage).stem}_{gpus}{'_dealt' if dealt else ''}", "gpus": str(gpus)}
            asked |= {"deepspeed": stage, "batch": str(batch), "gradient_accumulation_steps": str(most // gpus)}
            asked |= {"mm_packing_balance": str(dealt).lower(), "mm_packing_profile": str(PROFILED)}
            runs.append(asked)
    return runs


def scaling(table: list[dict[str, str]], found: dict[str, dict]) -> list[dict]:
    """A row for each run of the table that has a speed."""
    rows = []
    made = [asked for asked in table if "samples/s" in found.get(asked["name"], {})]
    for asked in made:
        ran = found[asked["name"]]
        same = [other for other in made if other["deepspeed"] == asked["deepspeed"]]
        row = {key: asked[key] for key in ("name", "gpus", "deepspeed")} | {"dealt": asked["mm_packing_balance"]}
        row["samples/s"] = speed = ran["samples/s"]
        fewest = min(same, key=lambda other: int(other["gpus"]))
        one = found[fewest["name"]]
        each = one["samples/s"] / int(fewest["gpus"])
        row[f"efficiency against {fewest['gpus']}"] = round(speed / int(asked["gpus"]) / each, 3)
        for other in same:
            if (other["gpus"], asked["mm_packing_balance"]) == (asked["gpus"], "true") and other != asked:
                row["of undealt"] = round(speed / found[other["name"]]["samples/s"], 3)
        rows.append(row | {"loss differs by": _apart(ran, one), "profile": ran.get("profile")})
    return rows


def _apart(one: dict, other: dict) -> float:
    """The largest difference of two runs' losses; their steps are text in a file."""
    first, second = ({int(step): loss for step, loss in row["losses"].items()} for row in (one, other))
    return round(max(abs(first[step] - second[step]) for step in first.keys() & second.keys()), 4)


# ---------------------------------------------------------------- one run


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


def run(asked: dict[str, str], workspace: Path, output: Path, args: argparse.Namespace, left: float = math.inf) -> dict:
    """One training of at most ``left`` seconds, and what is read from the times of its steps."""
    size = "tiny" if args.cpu else "half"
    changes = {
        **BASE,
        "mm_vision_tower": workspace / "llava_vit_packing",
        "model_name_or_path": workspace / f"qwen_{size}",
        # Made by the run itself, its weights would depend on the stage.
        "pretrain_mm_mlp_adapter": workspace / PROJECTOR,
        "data_path": workspace / "mix.json",
        "image_folder": workspace / "images",
        "output_dir": output / f"llava_qwen_{asked['name']}",
        "max_steps": args.steps,
    }
    if args.cpu:
        changes |= {"tf32": "false", "attn_implementation": "sdpa", "dataloader_num_workers": 1}
    changes |= PATHS[asked.get("path", "packed")]
    changes |= {key: value for key, value in asked.items() if key not in WORDS}
    if changes["image_aspect_ratio"] != "native":
        del changes["mm_packing_max_patches"]  # refused there
    processes, batch = int(asked["gpus"]), int(asked["batch"])
    file = asked["deepspeed"]
    changes["deepspeed"] = file if file.endswith(".json") else CONFIGS / f"{file}.json"
    changes["per_device_train_batch_size"] = batch
    command = train_command(CONFIGS / "llava_next_finetune.yaml", changes, processes, args.cpu)
    used: list[int] = []

    def at_step(training: Training, step: int) -> None:
        if step == args.steps and not args.cpu:  # what the allocator has taken it keeps
            used.extend(_used())

    found = train(command, min(args.limit, left), args.logs and args.logs / f"{asked['name']}.log", at_step)
    row = {"exit status": found.status, "seconds": round(found.seconds, 1), "losses": found.losses}
    times = found.times
    if len(times) > WARM_UP + 1:
        last = max(times)
        accumulated = int(changes["gradient_accumulation_steps"])
        done = (last - WARM_UP) * batch * processes * accumulated
        row["samples/s"] = round(done / (times[last] - times[WARM_UP]), 2)
        row["first step s"] = round(times[min(times)], 1)
    if shares := PROFILE.search(found.log):
        parts = re.findall(r"([a-z ]+?) (\d+)%", shares[2])
        row["profile"] = {"step ms": int(shares[1]), **{name.strip(): int(part) / 100 for name, part in parts}}
    if used:
        row["GiB in use"] = [round(each / 1024, 1) for each in used]
    if found.status:
        row["error"] = last_error(found.log)
    return {**row, "tail": "".join(found.log.splitlines(keepends=True)[-25:]) if found.status else ""}


def _used() -> list[int]:
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return [int(line) for line in subprocess.run(query, capture_output=True, text=True).stdout.split()]


if __name__ == "__main__":
    os.chdir(REPOSITORY)
    sys.exit(main())
