"""Requests per second of `llava_packing` (batched, packed) beside lmms-eval's own `llava_onevision` (batch size 1).

    LLAVA_NEXT_DIR=... python benchmarks/eval_throughput.py CHECKPOINT --images 200 --batch_sizes 1,8,16
    LLAVA_NEXT_DIR=... python benchmarks/eval_throughput.py --json eval.json         # a checkpoint made here, in a GPU
    LLAVA_NEXT_DIR=... python benchmarks/eval_throughput.py --tiny --images 12       # the same in small, on the CPU

Without CHECKPOINT one is made first: a tower of ViT-L/14 size with random weights, native resolution, and a small LLaMA
decoder which learns to name sixteen photographs (benchmarks/eval_checkpoint.py). Both models get the same checkpoint,
prompts, photographs (each cropped to a shape of its own) and settings: greedy, at most 32 new tokens; every second
request asks for a word, the others for a sentence. Each model and batch size is a process of its own, is loaded and
warmed up before the clock starts, and answers up to three rounds of photographs, each cropped anew: shapes that a
process has seen take it less time, and in an evaluation there are few of them. (The median round counts.) Both need our
hook to load the tower; lmms-eval's model runs without its patch cudnn_plans, which also makes that model faster.
Photographs are in memory; making pixels of them is timed. ("Right" says something about checkpoints that have learned
these photographs.)

lmms-eval's model always loads float16; ours takes the checkpoint's dtype. It also imports two video readers: where
`av` or `decord` is not installed an empty module stands in, as there are no videos here.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
SETTINGS = {"max_new_tokens": 32, "temperature": 0, "do_sample": False}
ROUNDS, ENOUGH = 3, 10.0  # rounds of requests; none is begun after so many seconds
VIDEO_READERS = {"av": (), "decord": ("VideoReader", "cpu")}
STOCK, OURS = "llava_onevision", "llava_packing"


def stand_in_for_video_readers() -> list[str]:
    """Modules without content for those that lmms-eval's model imports and that are not installed; their names."""
    missing = [name for name in VIDEO_READERS if find_spec(name) is None]
    for name in missing:
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        vars(module).update(dict.fromkeys(VIDEO_READERS[name]))
        sys.modules[name] = module
    return missing


def load(model_name: str, checkpoint: Path) -> tuple[object, list[str]]:
    """lmms-eval's model, at batch size 1, and the modules that something stands in for."""
    import torch
    from lmms_eval.models import get_model

    from llava_packing_tower.eval.models.llava_packing import LlavaPacking
    from llava_packing_tower.integrations.llava import install
    from llava_packing_tower.integrations.llava.batched_inference import conversation_name

    install.apply()  # the stock model needs it to build the tower at all
    if model_name == OURS:
        return LlavaPacking(pretrained=str(checkpoint)), []
    missing = stand_in_for_video_readers()
    config = json.loads((checkpoint / "config.json").read_text())
    conversation = conversation_name(SimpleNamespace(**config))  # by itself it would take Qwen's
    # By itself it would take the class from words in the folder's name.
    arguments = {"pretrained": str(checkpoint), "conv_template": conversation, "model_name": config["model_type"]}
    if not torch.cuda.is_available():
        arguments.update(device_map="auto", device="cpu")
    return get_model(STOCK)(**arguments), missing


def measure(model_name: str, checkpoint: Path, count: int, size: int) -> dict:
    """The row of one model and batch size."""
    import torch
    from eval_checkpoint import asked, photographs
    from lmms_eval.api.instance import Instance

    from llava_packing_tower.integrations.llava import compat

    model, missing = load(model_name, checkpoint)

    def answers_to(pictures: list) -> tuple[list[str], int, float]:
        """The answers, how many are right, and the seconds that they took."""
        model.task_dict = {"throughput": {"test": [picture for picture, _ in pictures]}}
        questions = [asked(photo, index) for index, (_, photo) in enumerate(pictures)]
        requests = []
        for index in range(len(pictures)):
            given = (questions[index][0], dict(SETTINGS), lambda picture: [picture], index, "throughput", "test")
            about = {"task": "throughput", "doc_id": index, "repeats": 1}
            requests.append(Instance(request_type="generate_until", arguments=given, idx=0, metadata=about))
        mark = time.perf_counter()
        answers = model.generate_until(requests)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - mark
        right = sum(answer == wanted for answer, (_, wanted) in zip(answers, questions, strict=True))
        return answers, right, seconds

    if model_name == OURS:
        model.batch_size = size
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    answers_to(photographs(2 * max(16, size), seed=0))
    answers, right, seconds = answers_to(photographs(count, seed=1))
    rounds = [seconds]
    while len(rounds) < ROUNDS and sum(rounds) < ENOUGH:
        rounds.append(answers_to(photographs(count, seed=len(rounds) + 1))[2])
    return {
        "model": model_name,
        "batch_size": size,
        "requests": count,
        "seconds": [round(seconds, 3) for seconds in rounds],
        "requests_per_second": count / statistics.median(rounds),
        "dtype": str(model.model.dtype),
        "right": right,
        "stand_ins": missing,
        "patches": compat.applied(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None,
        "answers": answers,
    }


def child(words: Sequence[str], limit: float, more: dict[str, str]) -> float:
    """This file again, in a process of its own; seconds. Raises ``SystemExit`` where it fails or takes too long."""
    mark = time.monotonic()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **more}
    try:
        subprocess.run([sys.executable, __file__, *words], check=True, timeout=limit, env=environment)
    except subprocess.TimeoutExpired:
        raise SystemExit(f"not done after {limit:.0f} s: {' '.join(words)}") from None
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"failed with status {error.returncode}: {' '.join(words)}") from None
    return time.monotonic() - mark


def line(row: dict, reference: dict) -> str:
    same = sum(a == b for a, b in zip(row["answers"], reference["answers"]))
    times = row["requests_per_second"] / reference["requests_per_second"]
    return (
        f"{row['model']:<16} batch {row['batch_size']:<3} {row['requests_per_second']:8.2f} requests/s ({times:5.2f}x) "
        f"{row['dtype']}, {row['right']} of {row['requests']} answers right, {same} as {reference['model']}'s, "
        f"{row['device']}"
    )


def versions() -> dict[str, str]:
    names = ("torch", "transformers", "lmms-eval", "flash-attn")
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", type=Path, help="(one is made)")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--batch_sizes", default="1,8,16", help="of llava_packing (1,8,16)")
    parser.add_argument("--tiny", action="store_true", help="make a small checkpoint, for a CPU")
    parser.add_argument("--limit", type=float, default=300, help="seconds that one process may take (300)")
    parser.add_argument("--json", type=Path, help="where the report goes")
    parser.add_argument("--only", nargs=3, metavar=("MODEL", "BATCH_SIZE", "OUTPUT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        row = measure(args.only[0], args.checkpoint, args.images, int(args.only[1]))
        Path(args.only[2]).write_text(json.dumps(row))
        return
    runs = [(STOCK, 1), *((OURS, int(size)) for size in args.batch_sizes.split(","))]
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, made, seconds = args.checkpoint, None, {}
        if checkpoint is None:
            checkpoint = Path(folder, "llava_llama_packing")
            maker = [sys.executable, str(Path(__file__).with_name("eval_checkpoint.py")), str(checkpoint)]
            mark = time.monotonic()
            subprocess.run([*maker, *(["--tiny"] if args.tiny else [])], check=True, timeout=args.limit)
            seconds["make"] = time.monotonic() - mark
            made = json.loads((checkpoint / "made.json").read_text())
        rows = []
        for model, size in runs:
            output = str(Path(folder, f"{model}_{size}.json"))
            words = [str(checkpoint), "--images", str(args.images), "--only", model, str(size), output]
            without = {"LLAVA_PACKING_DISABLE_MENDS": "cudnn_plans"} if model == STOCK else {}
            seconds[f"{model} {size}"] = child(words, args.limit, without)
            rows.append(json.loads(Path(output).read_text()))
            print(line(rows[-1], rows[0]), flush=True)
    seconds = {name: round(value, 1) for name, value in seconds.items()}
    print(f"seconds of each process, loading and warm-up included: {seconds}")
    if args.json:
        report = {"date": time.strftime("%Y-%m-%d"), "versions": versions(), "checkpoint": made or str(checkpoint)}
        report |= {"settings": SETTINGS, "seconds": seconds, "rows": rows}
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
