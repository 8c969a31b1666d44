"""Native resolution beside LLaVA's anyres: the same photos, the same model, samples per second.

  python benchmarks/native_vs_anyres.py --json native_vs_anyres.json      # on a GPU, under two minutes
  python benchmarks/native_vs_anyres.py --json tiny.json --tiny           # the same on a CPU, in small

The model is a host's own class (LLaVA-NeXT if LLAVA_NEXT_DIR is set, else llavaction's Qwen2, else LLaVA 1.x's Llama)
with random weights: a tower of ViT-L/14 size, an mlp2x_gelu projector, a decoder of the size of Qwen2-0.5B. One model
serves all modes; only its config changes between them. ``mm_patch_merge_type`` is ``spatial_unpad`` throughout.

  anyres              LLaVA-NeXT's tiles of 336 x 336 in its five grids (up to 672 x 672 and 1008 x 336), beside the
                      whole image as one tile; the host's own process_images, and its own unpadding
  native, same tokens every photo at its own shape, enlarged until the mean number of visual tokens per sample is that
                      of anyres (``mm_packing_min_patches`` is chosen so; within 2 %, else the script fails)
  native, own size    every photo at its own size, and not enlarged: ``mm_packing_max_patches`` 2304, the patches of
                      anyres' 672 x 672. Nothing that the photo holds is lost, so this is what a user would choose

Measured are: "features", from pixels to the embeddings that the decoder gets, without gradients; "first token",
`generate` of one token; "training", forward and backward of tower, projector and decoder with gradient checkpointing
(no optimizer step, which does not depend on the images). The modes take turns on the same photos, round after round;
given are medians over the rounds, and of the ratios to anyres in the same round. Time is that of the device (CUDA
events). Reading and resizing photos is not in it: the pixels lie on the GPU.

The sizes of the photos are those of 159 photos of COCO 2017 (80 of its training and 79 of its validation set), which
is where most photos of LLaVA's instruction data come from; counted from a public extract of COCO's annotations. The
pixels are noise.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from llava_packing_tower.tools.bench.training.models import FULL as LARGE
from llava_packing_tower.tools.bench.training.models import TINY as SMALL
from llava_packing_tower.tools.bench.training.models import (
    build_packed,
    host_classes,
    set_checkpointing,
)
from llava_packing_tower.tools.bench.training.photos import (
    PATCH,
    Batch,
    Mode,
    draw_photos,
    make_batch,
    prepared,
)

STARTED = time.monotonic()
TASKS = ("features", "first token", "training")
MODES = ("anyres", "native, same tokens", "native, own size")
FULL = {"tile": 336, "scale": 1.0, "batch": 8, "train_batch": 4, "rounds": 15, "words": (40, 60)}
TINY = {"tile": 56, "scale": 1 / 6, "batch": 3, "train_batch": 2, "rounds": 2, "words": (5, 7)}
TOLERANCE = 0.02
BATCHES = 6
WARM_UPS = 2


# ---------------------------------------------------------------- photos


def photo_batches(size: dict, seed: int = 0) -> list[list]:
    """Batches of photos (noise) whose sizes are drawn from the table, the same on every machine."""
    made = draw_photos(BATCHES * size["batch"], size["scale"], seed)
    return [made[i : i + size["batch"]] for i in range(0, len(made), size["batch"])]


# ---------------------------------------------------------------- model


def build(tiny: bool, device: str) -> tuple[str, object]:
    """Name of the host and a model of it with random weights, in bfloat16 on a GPU."""
    import torch

    model = build_packed(SMALL if tiny else LARGE, torch.device(device))
    set_checkpointing(model, True)
    return host_classes()[0], model


def visual_tokens(model: object, mode: Mode, batches: list[Batch], size: dict) -> tuple[list[int], int]:
    """Visual tokens of every sample, and the length that padding gives to all of them together."""
    import torch

    mode.set(model)
    counts, padded = [], 0
    with torch.no_grad():
        for batch in batches:
            _, mask = prepared(model, batch)
            counts += [int(n) - sum(size["words"]) for n in mask.sum(1)]
            padded += mask.numel()
    return counts, padded


def fewest_patches(sizes: list[tuple[int, int]], most: int, tokens: float) -> int:
    """The smallest ``mm_packing_min_patches`` at which these photos have this many tokens (newlines included)."""
    from llava_packing_tower.data.smart_resize import SmartResize

    def mean(least: int) -> float:
        rule = SmartResize(PATCH, (1, 1), least, most)
        grids = [rule.grid(*size) for size in sizes]
        return statistics.mean(rows * (columns + 1) for rows, columns in grids)

    low, high = 1, most
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if mean(middle) >= tokens else (middle + 1, high)
    return low


# ---------------------------------------------------------------- measuring


class Work:
    """What is measured: ``run(task, batch)``."""

    def __init__(self, model: object) -> None:
        self.model, self.losses = model, []

    def begin(self, task: str) -> None:
        """Training or evaluation mode, and LLaVA's padding at the side that goes with it."""
        self.model.train(task == "training")
        self.model.config.tokenizer_padding_side = "right" if task == "training" else "left"

    def run(self, task: str, batch: Batch) -> None:
        import torch

        if task == "features":
            with torch.no_grad():
                prepared(self.model, batch)
        elif task == "first token":
            given = dict(batch.given)
            self.model.generate(given.pop("input_ids"), **given, max_new_tokens=1, do_sample=False, pad_token_id=0)
        else:
            loss = self.model(**batch.given, labels=batch.labels, use_cache=False).loss
            loss.backward()
            self.losses.append(loss.detach())


def measure(model: object, modes: list[Mode], batches: dict, size: dict, limit: float) -> tuple[dict, dict]:
    """Samples per second of every round, by task and mode; and the peak of memory in training in GiB, by mode.

    Every task gets an equal part of the time that is left of ``limit`` seconds since the start, and 3 rounds at least.
    """
    import torch

    from llava_packing_tower.tools.bench.timing import Clock, Deadline

    clock, work, found, memory = Clock(model.device), Work(model), {}, {}
    deadline = Deadline(limit - (time.monotonic() - STARTED))
    for left, task in zip(range(len(TASKS), 0, -1), TASKS):
        count = size["train_batch" if task == "training" else "batch"]
        cut = {mode.name: [batch.first(count) for batch in batches[mode.name]] for mode in modes}
        found[task] = rates = {mode.name: [] for mode in modes}
        end = deadline.share(left)
        work.begin(task)
        for turn in range(-WARM_UPS, size["rounds"]):
            if turn >= 3 and time.monotonic() > end:
                break
            for mode in modes:
                mode.set(model)
                model.zero_grad(set_to_none=True)
                if clock.cuda:
                    torch.cuda.reset_peak_memory_stats()
                batch = cut[mode.name][turn % BATCHES]
                milliseconds = clock(lambda task=task, batch=batch: work.run(task, batch))
                if turn >= 0:
                    rates[mode.name].append(count / milliseconds * 1e3)
                if clock.cuda and task == "training":
                    peak = torch.cuda.max_memory_allocated() / 2**30
                    memory[mode.name] = max(peak, memory.get(mode.name, 0.0))
    if not (losses := torch.stack(work.losses)).isfinite().all():
        raise SystemExit(f"a loss is not finite: {losses.tolist()}")
    return found, memory


def summary(found: dict, counts: dict, modes: list[Mode]) -> dict:
    """Medians, and the medians of the ratios to anyres round by round."""
    table = {}
    for mode in modes:
        row = {"bounds in patches": mode.bounds, **counts[mode.name], "samples/s": {}, "to anyres": {}}
        for task, rates in found.items():
            own, base = rates[mode.name], rates[MODES[0]]
            row["samples/s"][task] = statistics.median(own)
            row["to anyres"][task] = statistics.median(a / b for a, b in zip(own, base, strict=True))
        table[mode.name] = row
    return table


def show(report: dict) -> None:
    from rich.table import Table

    from llava_packing_tower.tools.bench.report import console

    out, table = console(), Table("", box=None, pad_edge=False)
    columns = ("patches", "visual tokens", "padded to", *TASKS)
    for column in columns:
        table.add_column(column, justify="right")
    for name, row in report["modes"].items():
        rates = [f"{row['samples/s'][task]:.1f} ({row['to anyres'][task]:.2f} x)" for task in TASKS]
        numbers = [f"{row[key]:.0f}" for key in ("patches per sample", "visual tokens per sample", "padded length")]
        table.add_row(name, *numbers, *rates)
    out.print(f"\n{report['host']}, {report['device']}: samples/s (and against anyres)")
    out.print(table)
    out.print(f"batch {report['batch']} (training {report['train_batch']}), rounds {report['rounds']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where the report goes")
    parser.add_argument("--tiny", action="store_true", help="small, on the CPU")
    parser.add_argument("--batch", type=int, help="photos in a batch (default 8)")
    parser.add_argument("--train_batch", type=int, help="photos in a batch of training (default 4)")
    parser.add_argument("--rounds", type=int, help="at most (default 15)")
    parser.add_argument("--limit", type=float, default=90, help="seconds after which no round is begun (default 90)")
    args = parser.parse_args()
    given = {name: getattr(args, name) for name in ("batch", "train_batch", "rounds")}
    size = {**(TINY if args.tiny else FULL), **{name: value for name, value in given.items() if value}}

    import torch

    import builder_patch  # noqa: F401
    from llava_packing_tower.tools.bench.report import environment, write_json

    device = "cpu" if args.tiny else "cuda"
    host, model = build(args.tiny, device)
    photos = photo_batches(size)
    batches, tokens = {}, {}

    def add(mode: Mode) -> Mode:
        batches[mode.name] = [make_batch(model, mode, some, size["words"]) for some in photos]
        tokens[mode.name] = visual_tokens(model, mode, batches[mode.name], size)
        return mode

    modes = [add(Mode(MODES[0], None))]
    goal = statistics.mean(tokens[MODES[0]][0])
    sizes = [photo.size for some in photos for photo in some]
    largest = (2 * size["tile"] // PATCH) ** 2
    modes.append(add(Mode(MODES[1], (fewest_patches(sizes, largest, goal), largest))))
    modes.append(add(Mode(MODES[2], (1 if args.tiny else 16, largest))))
    samples = len(sizes)
    if any(len(each) != samples for each, _ in tokens.values()):
        raise SystemExit(f"the host lost samples: of {samples}, it has {[len(each) for each, _ in tokens.values()]}")
    counts = {
        name: {
            "patches per sample": sum(batch.patches for batch in batches[name]) / samples,
            "visual tokens per sample": statistics.mean(each),
            "fewest and most visual tokens": (min(each), max(each)),
            "padded length": padded / samples,
        }
        for name, (each, padded) in tokens.items()
    }
    apart = counts[MODES[1]]["visual tokens per sample"] / goal - 1
    if abs(apart) > TOLERANCE:
        raise SystemExit(f"{MODES[1]} has {apart:+.1%} of the visual tokens of anyres: no longer the same budget")
    prepared_in = time.monotonic() - STARTED
    found, memory = measure(model, modes, batches, size, args.limit)
    report = {
        **environment(torch.device(device), sys.argv),
        "host": host,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "decoder attention": model.config._attn_implementation,
        "batch": size["batch"],
        "train_batch": size["train_batch"],
        "rounds": {task: len(rates[MODES[0]]) for task, rates in found.items()},
        "photos": len(sizes),
        "modes": summary(found, counts, modes),
        "peak GiB in training": memory,
        "samples/s of each round": found,
        "seconds": {"until the first round": prepared_in, "in all": time.monotonic() - STARTED},
    }
    if args.json:
        write_json(report, args.json)
    show(report)


if __name__ == "__main__":
    main()
