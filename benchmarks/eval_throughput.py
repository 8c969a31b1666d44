"""Requests per second of `llava_packing` (batched, packed) beside lmms-eval's own `llava_onevision` (batch size 1).

    LLAVA_NEXT_DIR=... python benchmarks/eval_throughput.py CHECKPOINT --images 200 --batch_sizes 1,8,32

The same checkpoint, questions and images (photographs out of installed packages, each cropped to a shape of its own).
Each is a process of its own. The model is loaded and warmed up before the clock starts. Greedy, 16 new
tokens.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

QUESTION = "What does this photo show? Answer with one word."
SETTINGS = {"max_new_tokens": 16, "temperature": 0, "do_sample": False}


def images(count: int, seed: int = 0) -> list:
    import numpy as np
    from PIL import Image

    from llava_packing_tower.demo.photos import PHOTOS, source_of

    rng, made = np.random.default_rng(seed), []
    for index in range(count):
        with Image.open(source_of(PHOTOS[index % len(PHOTOS)])) as photo:
            width, height = (int(side * rng.uniform(0.5, 1)) for side in photo.size)
            made.append(photo.convert("RGB").crop((0, 0, width, height)))
    return made


def measure(model_name: str, checkpoint: str, count: int, batch_size: int) -> dict:
    """Seconds and answers of one model, in this process."""
    import torch
    from lmms_eval.api.instance import Instance
    from lmms_eval.models import get_model

    from llava_packing_tower import hosts

    hosts.apply()  # the stock model needs it to build the tower at all
    arguments = {"pretrained": checkpoint, "batch_size": batch_size, "conv_template": "v1"}
    if model_name == "llava_onevision":
        arguments["model_name"] = json.loads((Path(checkpoint) / "config.json").read_text())["model_type"]
        if not torch.cuda.is_available():
            arguments.update(device_map="auto", device="cpu")
    model = get_model(model_name)(**arguments)
    pictures = images(count)
    model.task_dict = {"throughput": {"test": pictures}}

    def request(index: int) -> Instance:
        given = (QUESTION, dict(SETTINGS), lambda picture: [picture], index, "throughput", "test")
        return Instance(
            request_type="generate_until",
            arguments=given,
            idx=0,
            metadata={"task": "throughput", "doc_id": index, "repeats": 1},
        )

    def finish() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    model.generate_until([request(index) for index in range(min(count, max(8, batch_size)))])
    finish()
    mark = time.perf_counter()
    answers = model.generate_until([request(index) for index in range(count)])
    finish()
    seconds = time.perf_counter() - mark
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {"model": model_name, "batch_size": batch_size, "requests": count, "seconds": seconds, "device": device} | {
        "answers": answers
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--batch_sizes", default="1,8,32")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", nargs=2, metavar=("MODEL", "BATCH"), help="measure one, in this process")
    args = parser.parse_args()
    if args.only:
        print(json.dumps(measure(args.only[0], args.checkpoint, args.images, int(args.only[1]))))
        return
    runs = [("llava_onevision", "1"), *(("llava_packing", size) for size in args.batch_sizes.split(","))]
    rows = []
    for model, size in runs:
        command = [sys.executable, __file__, args.checkpoint, "--images", str(args.images), "--only", model, size]
        result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows.append(json.loads(result.stdout.splitlines()[-1]))
        row = rows[-1]
        same = sum(a == b for a, b in zip(row["answers"], rows[0]["answers"]))
        print(
            f"{row['model']:<16} batch {row['batch_size']:<3} {row['requests'] / row['seconds']:8.2f} requests/s"
            f"  {same} of {row['requests']} answers as llava_onevision  ({row['device']})",
            flush=True,
        )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
