"""What `llava-packing train` does on several GPUs when ranks have no image, one has an enormous one, or one dies.

  LLAVA_NEXT_DIR=... python benchmarks/rank_faults.py --gpus 2 --deepspeed zero2 --out faults.json --photos FOLDER

The run is that of train_speed.py with a sample on each rank, in an order that mixes texts and images. Cases:

  no_images  in some step a rank has an image and another has none: all steps are made, all losses are finite
  enormous   in some step a rank has an image of 9,216 patches: likewise (both are read from one run, "whole")
  killed     the last rank is killed with SIGKILL after step 6: all end within 30 seconds, and the rank is named
  resumed    the killed run started again: it goes on after the checkpoint of step 4, with the losses of "whole"
  damaged    --strict, an image that is cut off: all ranks end within 30 seconds, and the file is named

Each row says what was found; the file is written after each. With --cpu it runs tiny models and gloo, which shows only
that everything works.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import random
import re
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import date
from pathlib import Path

from runs import CONFIGS, LATE, REPOSITORY, Training, last_error, train, train_command, versions
from train_speed import BASE, PROJECTOR, make_workspace

from llava_packing_tower.utils.files import write_text

STEPS, SAVED, KILLED_AFTER = 12, 4, 6
WITHIN = 30.0
"""Seconds from a fault to the end of the last process, as docs/training.md says."""
TOLERANCE = 0.01
"""Of a resumed loss, in bfloat16; in float32 it is bit-equal, by the tests."""
FAILURE = re.compile(r"rank +: (\d+) \(local_rank.*?\n +exitcode +: (-?\d+)")
"""An entry of the table that torchrun prints."""
TOKENS = re.compile(r"visual tokens per image or video: (\d+) to (\d+)")
ENGINE = re.compile(r"^engine: (.*, world size .*, backend .*)$", re.M)
NOT_SAVED = {"save_strategy": "no"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=2, metavar="N", help="ranks, more than one (default: 2)")
    parser.add_argument("--deepspeed", nargs="+", default=["zero2"], help="zero2, zero3, or files (default: zero2)")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="default: all")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="results, read and extended")
    parser.add_argument("--photos", metavar="FOLDER", help="photographs to make images from (default: noise)")
    parser.add_argument("--limit", type=float, default=150, help="seconds for each training (default: 150)")
    parser.add_argument("--within", type=float, default=math.inf, help="seconds in all: what is left is not run")
    parser.add_argument("--workspace", type=Path, metavar="FOLDER", help="models and data, kept (default: a new one)")
    parser.add_argument("--logs", type=Path, metavar="FOLDER", help="keep what each training printed")
    parser.add_argument("--cpu", action="store_true", help="tiny models on this machine's processor")
    args = parser.parse_args()
    args.documents, began = 0.1, time.monotonic()
    rows = json.loads(args.out.read_text()) if args.out.is_file() else {}
    head = {"date": date.today().isoformat(), "versions": versions(sys.executable)[0]}
    bad = 0
    with tempfile.TemporaryDirectory(prefix="rank_faults_") as scratch:
        workspace = args.workspace or Path(scratch) / "workspace"
        if not (workspace / "mix.json").is_file():
            make_workspace(workspace, args)
        make_data(workspace, args)
        for stage in args.deepspeed:
            trainings = Trainings(stage, workspace, Path(scratch) / "output", args, began + args.within)
            for case in args.cases:
                try:
                    row = CASES[case](trainings)
                except Exception as error:  # the other cases are to be run
                    traceback.print_exc()
                    row = {"error": repr(error), "as it should be": False}
                name = f"{args.gpus} {'CPU processes' if args.cpu else 'GPUs'}, {Path(stage).stem}, {case}"
                rows[name] = {**row, **head}
                write_text(args.out, json.dumps(rows, indent=1) + "\n")
                print(json.dumps({"case": name, **row}), flush=True)
                bad += not row["as it should be"]
            shutil.rmtree(trainings.output, ignore_errors=True)  # a checkpoint with its optimizer has 11 GB
    return int(bad > 0)


def make_data(workspace: Path, args: argparse.Namespace) -> None:
    """uneven.json: texts, as many photographs as there are steps, one of them enormous; cut.json: texts and one image
    that ends in the middle. All photographs are one, so that tokens tell how many a step had."""
    from PIL import Image

    samples = json.loads((workspace / "conversations.json").read_text())
    picture = next(sample for sample in samples if "image" in sample)
    texts = [sample for sample in samples if "image" not in sample]
    file = workspace / "images" / picture["image"]
    side = 0.1 if args.cpu else 1.0
    Image.open(file).convert("RGB").resize((int(9000 * side), int(12000 * side))).save(
        workspace / "images" / "enormous.jpg", quality=60
    )
    whole = file.read_bytes()
    (workspace / "images" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    draw, total = random.Random(0), STEPS * args.gpus

    def write(name: str, with_image: list[dict]) -> None:
        mixed = [*with_image, *draw.choices(texts, k=total - len(with_image))]
        draw.shuffle(mixed)
        write_text(workspace / name, json.dumps(mixed))

    write("uneven.json", [*[picture] * (STEPS - 1), {**picture, "image": "enormous.jpg"}])
    write("cut.json", [{**picture, "image": "cut.jpg"}])


class Trainings:
    """The trainings of a stage, each started when a case first asks for it."""

    def __init__(self, stage: str, workspace: Path, output: Path, args: argparse.Namespace, until: float) -> None:
        self.stage, self.workspace, self.output, self.args, self.until = stage, workspace, output, args, until
        self.ranks: int = args.gpus
        self.made: dict[str, Training] = {}
        self.killed_at = math.nan

    def whole(self) -> Training:
        return self._run("whole", "whole", "uneven.json", NOT_SAVED)

    def killed(self) -> Training:
        def at_step(training: Training, step: int) -> None:
            if step == KILLED_AFTER:
                self.killed_at = training.clock
                training.rank(self.ranks - 1).kill()

        saving = {"save_strategy": "steps", "save_steps": SAVED}
        return self._run("killed", "killed", "uneven.json", saving, at_step)

    def resumed(self) -> Training:
        self.killed()
        return self._run("resumed", "killed", "uneven.json", NOT_SAVED)

    def damaged(self) -> Training:
        return self._run("damaged", "damaged", "cut.json", NOT_SAVED, None, "--strict")

    def folder(self, name: str) -> Path:
        return self.output / f"llava_qwen_{name}"

    def _run(
        self,
        name: str,
        folder: str,
        data: str,
        changes: dict[str, object],
        at_step: Callable[[Training, int], None] | None = None,
        *words: str,
    ) -> Training:
        if name in self.made:
            return self.made[name]
        left = self.until - time.monotonic()
        if left < WITHIN:
            raise TimeoutError(f"{name} is not run: {left:.0f} s are left")
        values = {
            **BASE,
            "deepspeed": self.stage if self.stage.endswith(".json") else CONFIGS / f"{self.stage}.json",
            "mm_vision_tower": self.workspace / "llava_vit_packing",
            "model_name_or_path": self.workspace / f"qwen_{'tiny' if self.args.cpu else 'half'}",
            "pretrain_mm_mlp_adapter": self.workspace / PROJECTOR,
            "data_path": self.workspace / data,
            "image_folder": self.workspace / "images",
            "output_dir": self.folder(folder),
            "max_steps": STEPS,
            "per_device_train_batch_size": 1,
            "dataloader_num_workers": 1,
            # Grouped, all ranks would have images in the same steps.
            "group_by_modality_length": "false",
            # So fast that a run without its checkpoint would have other losses.
            "learning_rate": 3e-3 if self.args.cpu else 1e-4,
            **changes,
        }
        if self.args.cpu:
            values |= {"tf32": "false", "attn_implementation": "sdpa"}
        command = train_command(CONFIGS / "llava_next_finetune.yaml", values, self.ranks, self.args.cpu)
        log = self.args.logs and self.args.logs / f"faults_{self.ranks}_{Path(self.stage).stem}_{name}.log"
        self.made[name] = found = train([*command, *words], min(self.args.limit, left), log, at_step)
        print(f"{self.stage}, {name}: {found.seconds:.0f} s, exit status {found.status}", flush=True)
        return found


# ---------------------------------------------------------------- the cases


def _row(run: Training, checks: dict[str, bool], **found: object) -> dict:
    """What each case has. Its checks, and that no process was left, decide."""
    checks = {**checks, "no process was left": not run.left}
    engine = ENGINE.search(run.log)
    row = {"engine": engine and engine[1], "exit status": run.status, "seconds": round(run.seconds, 1)}
    found = {name: None if value != value else value for name, value in found.items()}  # JSON has no nan
    row |= {"losses": run.losses, **found, "checks": checks, "as it should be": all(checks.values())}
    if not row["as it should be"]:
        print(run.log[-3000:], flush=True)
        row |= {"last error": last_error(run.log), "left": run.left}
    return row


def _well(run: Training, first: int = 1) -> dict[str, bool]:
    return {
        "exit status 0": run.status == 0,
        "all steps, each once": sorted(run.losses) == list(range(first, STEPS + 1)),
        "finite losses": all(map(math.isfinite, run.losses.values())),
    }


def images_by_step(run: Training, folder: Path, ranks: int) -> list[tuple[int, bool]]:
    """How many images each step had on all ranks, and whether the enormous one was among them, by its visual tokens.
    Nothing for a run that failed."""
    if run.status != 0:
        return []
    small, large = map(int, TOKENS.search(run.log).groups())
    found = []
    with (folder / "speed.csv").open() as file:
        for row in csv.DictReader(file):
            tokens = float(row["visual_tokens_per_second"]) / float(row["samples_per_second"]) * ranks
            enormous = tokens > 0.98 * large
            found.append((round(max(tokens - enormous * large, 0) / small) + enormous, enormous))
    return found


def no_images(trainings: Trainings) -> dict:
    run, ranks = trainings.whole(), trainings.ranks
    images = [count for count, _ in images_by_step(run, trainings.folder("whole"), ranks)]
    uneven = [step for step, count in enumerate(images, 1) if 0 < count < ranks]
    checks = {**_well(run), "a step with an image on one rank and none on another": bool(uneven)}
    return _row(run, checks, **{"images by step": images})


def enormous(trainings: Trainings) -> dict:
    run = trainings.whole()
    images = images_by_step(run, trainings.folder("whole"), trainings.ranks)
    steps = [step for step, (_, large) in enumerate(images, 1) if large]
    tokens = TOKENS.search(run.log)
    checks = {**_well(run), "a step with the enormous image": len(steps) == 1}
    return _row(run, checks, **{"step of it": steps, "its visual tokens": tokens and int(tokens[2])})


def _ended(run: Training, fault: float, **checks: bool) -> dict:
    failures = {int(rank): int(status) for rank, status in FAILURE.findall(run.log)}
    seconds = run.seconds - fault
    checks = {
        "a status of failure": run.status not in (0, LATE),
        f"ended in {WITHIN:.0f} s": seconds < WITHIN,
        **checks,
    }
    return _row(run, checks, **{"seconds to the end": round(seconds, 1), "ranks in torchrun's report": failures})


def killed(trainings: Trainings) -> dict:
    run, last = trainings.killed(), trainings.ranks - 1
    said = any((int(rank), int(status)) == (last, -9) for rank, status in FAILURE.findall(run.log))
    return _ended(run, trainings.killed_at, **{f"torchrun reports that SIGKILL ended rank {last}": said})


def damaged(trainings: Trainings) -> dict:
    run = trainings.damaged()
    fault = next((seconds for seconds, line in run.lines if "cut.jpg" in line), math.nan)
    return _ended(
        run, fault, **{"the file is named": not math.isnan(fault), "it had begun": bool(ENGINE.search(run.log))}
    )


def resumed(trainings: Trainings) -> dict:
    run, expected = trainings.resumed(), trainings.killed().losses
    first = SAVED + 1
    checks = {**_well(run, first), "it says so": f"resumes from checkpoint-{SAVED}" in run.log}
    if (whole := trainings.made.get("whole")) and whole.status == 0:
        expected = whole.losses
    steps = sorted(run.losses.keys() & expected.keys())
    apart = max((abs(run.losses[n] / expected[n] - 1) for n in steps), default=math.nan)
    changed = abs(expected.get(first, math.nan) / expected.get(1, math.nan) - 1)
    checks |= {"the losses are repeated": apart < TOLERANCE, "the loss had changed before": changed > 3 * TOLERANCE}
    return _row(run, checks, **{"steps compared": steps, "largest difference": apart, "changed before by": changed})


CASES: dict[str, Callable[[Trainings], dict]] = {
    "no_images": no_images,
    "enormous": enormous,
    "killed": killed,
    "resumed": resumed,
    "damaged": damaged,
}


if __name__ == "__main__":
    os.chdir(REPOSITORY)
    sys.exit(main())
