"""What `llava-packing train` does on several GPUs when one rank has no image, one an enormous one, or one dies.

  LLAVA_NEXT_DIR=... python benchmarks/rank_faults.py --gpus 2 --deepspeed zero2 --out faults.json --photos FOLDER

The run is that of train_speed.py, a step a sample on each rank and the rest of the data text alone. Cases:

  no_images  every rank has batches without an image while others have them: all steps are made, all losses finite
  enormous   one image of 9,216 patches among texts: likewise
  whole      12 steps, a checkpoint after each 4
  killed     the same run, the last rank killed with SIGKILL after step 6: seconds until the last process has ended
  resumed    the killed run started again: from step 5 on, beside the losses of `whole`
  damaged    --strict, an image that is cut off: seconds from the first error to the end, and whether the file is named

With --cpu it runs tiny models and gloo, which shows only that everything works.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

import psutil
from runs import CONFIGS, REPOSITORY, environment, versions
from train_speed import BASE, STEP, make_workspace

from llava_packing_tower.utils.files import write_text

STEPS, SAVED_EVERY, KILLED_AFTER = 12, 4, 6
RANKS = re.compile(r"(?i)\brank[\s:=]*(\d+)")


@dataclass
class Run:
    """What a training printed, when it ended, and what was left of it."""

    status: int = 0
    losses: dict[int, float] = field(default_factory=dict)
    log: str = ""
    ended_after: float | None = None
    left: int = 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=2, metavar="N", help="ranks (default: 2)")
    parser.add_argument("--deepspeed", nargs="+", default=["zero2"], help="zero2, zero3, or files (default: zero2)")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="default: all")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="results")
    parser.add_argument("--photos", metavar="FOLDER", help="photographs to make images from (default: noise)")
    parser.add_argument("--limit", type=float, default=150, help="seconds for each training")
    parser.add_argument("--workspace", type=Path, metavar="FOLDER", help="models and data, kept (default: a new one)")
    parser.add_argument("--logs", type=Path, metavar="FOLDER", help="keep what each training printed")
    parser.add_argument("--cpu", action="store_true", help="tiny models on this machine's processor")
    args = parser.parse_args()
    args.documents = 0.1
    rows: dict[str, dict] = {}
    with tempfile.TemporaryDirectory(prefix="rank_faults_") as scratch:
        workspace = args.workspace or Path(scratch) / "workspace"
        if not (workspace / "mix.json").is_file():
            make_workspace(workspace, args)
        make_data(workspace, args)
        for stage in args.deepspeed:
            runs: dict[str, Run] = {}
            for case in args.cases:
                runs[case] = CASES[case](Training(stage, workspace, Path(scratch) / stage, args))
                row = judged(case, runs, args.gpus)
                rows[f"{stage}, {case}"] = row
                print(json.dumps({"case": f"{stage}, {case}", **row}), flush=True)
                if not row["as it should be"]:
                    print(runs[case].log[-3000:], flush=True)
    head = {"date": date.today().isoformat(), "ranks": args.gpus, "versions": versions(sys.executable)[0]}
    write_text(args.out, json.dumps({**head, "cases": rows}, indent=1) + "\n")
    return int(not all(row["as it should be"] for row in rows.values()))


def make_data(workspace: Path, args: argparse.Namespace) -> None:
    """texts.json: a text, but one photograph for each step of all ranks; large.json: but one enormous image in all;
    cut.json: but one image that ends in the middle."""
    from PIL import Image

    samples = json.loads((workspace / "conversations.json").read_text())
    pictures = [sample for sample in samples if "image" in sample]
    texts = [sample for sample in samples if "image" not in sample]
    photo = Image.open(workspace / "images" / pictures[0]["image"]).convert("RGB")
    side = 0.1 if args.cpu else 1.0
    photo.resize((int(9000 * side), int(12000 * side))).save(workspace / "images" / "enormous.jpg", quality=60)
    whole = (workspace / "images" / pictures[0]["image"]).read_bytes()
    (workspace / "images" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    draw, total = random.Random(0), STEPS * args.gpus

    def write(name: str, with_image: list[dict]) -> None:
        mixed = [*with_image, *draw.choices(texts, k=total - len(with_image))]
        draw.shuffle(mixed)
        write_text(workspace / name, json.dumps(mixed))

    write("texts.json", draw.choices(pictures, k=STEPS))
    write("large.json", [{**pictures[0], "image": "enormous.jpg"}])
    write("cut.json", [{**pictures[0], "image": "cut.jpg"}])


@dataclass
class Training:
    """One kind of training, which may be started several times into one folder."""

    stage: str
    workspace: Path
    output: Path
    args: argparse.Namespace

    def run(self, name: str, data: str, *words: str, at_step: Callable[[psutil.Process], None] | None = None) -> Run:
        """Start it; ``at_step`` is called once with the launcher when step :data:`KILLED_AFTER` is logged."""
        file = self.stage if self.stage.endswith(".json") else str(CONFIGS / f"{self.stage}.json")
        values = {
            **BASE,
            "deepspeed": file,
            "mm_vision_tower": self.workspace / "llava_vit_packing",
            "model_name_or_path": self.workspace / f"qwen_{'tiny' if self.args.cpu else 'half'}",
            "data_path": self.workspace / data,
            "image_folder": self.workspace / "images",
            "output_dir": self.output / f"llava_qwen_{name}",
            "max_steps": STEPS,
            "per_device_train_batch_size": 1,
            "dataloader_num_workers": 1,
        }
        if self.args.cpu:
            values |= {"tf32": "false", "attn_implementation": "sdpa"}
        command = [sys.executable, "-m", "llava_packing_tower", "train", str(CONFIGS / "llava_next_finetune.yaml")]
        command += [word for key, value in values.items() for word in (f"--{key}", str(value))]
        command += ["--num_processes" if self.args.cpu else "--num_gpus", str(self.args.gpus), *words]
        process = subprocess.Popen(
            ["timeout", "--foreground", "--kill-after=10", f"{self.args.limit:.0f}", *command],
            env=environment(),
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        result, fault, family = Run(), None, set()
        for line in process.stdout:
            result.log += line
            if match := STEP.match(line):
                result.losses[int(match[1])] = float(match[2])
                if not family:
                    family = set(psutil.Process(process.pid).children(recursive=True))
                if at_step and int(match[1]) == KILLED_AFTER:
                    fault = time.monotonic()
                    at_step(psutil.Process(process.pid))
            elif fault is None and re.search(r"\b\w*Error: ", line):
                fault = time.monotonic()
        result.status = process.wait()
        _, alive = psutil.wait_procs(family, timeout=60)
        result.left = len(alive)
        if fault is not None:
            result.ended_after = round(time.monotonic() - fault, 1)
        if self.args.logs:
            self.args.logs.mkdir(parents=True, exist_ok=True)
            (self.args.logs / f"faults_{Path(self.stage).stem}_{name}.log").write_text(result.log)
        return result


def kill_last_rank(launcher: psutil.Process) -> None:
    ranks = {int(process.environ().get("RANK", -1)): process for process in reversed(launcher.children(recursive=True))}
    ranks[max(ranks)].kill()


CASES: dict[str, Callable[[Training], Run]] = {
    "no_images": lambda it: it.run("no_images", "texts.json", "--save_strategy", "no"),
    "enormous": lambda it: it.run("enormous", "large.json", "--save_strategy", "no"),
    "whole": lambda it: it.run("whole", "texts.json", *SAVING),
    "killed": lambda it: it.run("killed", "texts.json", *SAVING, at_step=kill_last_rank),
    "resumed": lambda it: it.run("killed", "texts.json", *SAVING),
    "damaged": lambda it: it.run("damaged", "cut.json", "--save_strategy", "no", "--strict"),
}
SAVING = ("--save_strategy", "steps", "--save_steps", str(SAVED_EVERY))


def judged(case: str, runs: dict[str, Run], ranks: int) -> dict:
    """The row of a case."""
    found = runs[case]
    row: dict = {"exit status": found.status, "losses": found.losses, "processes left": found.left}
    steps, finite = sorted(found.losses), all(map(math.isfinite, found.losses.values()))
    if case in ("killed", "damaged"):
        row["seconds to the end"] = found.ended_after
        row["ranks named"] = sorted({int(number) for number in RANKS.findall(found.log)})
        named = ranks - 1 in row["ranks named"] if case == "killed" else "cut.jpg" in found.log
        right = found.status != 0 and named and found.ended_after is not None and found.ended_after < 30
    elif case == "resumed":
        first = SAVED_EVERY + 1
        right = not found.status and finite and steps == list(range(first, STEPS + 1))
        if "whole" in runs and right:
            expected = runs["whole"].losses
            row["apart"] = max(abs(found.losses[n] - expected[n]) / expected[n] for n in steps)
            right = row["apart"] < 0.01  # of bfloat16; what is repeated in float32 is bit-equal, by the tests
    else:
        right = not found.status and finite and steps == list(range(1, STEPS + 1))
    return {**row, "as it should be": bool(right and not found.left)}


if __name__ == "__main__":
    os.chdir(REPOSITORY)
    sys.exit(main())
