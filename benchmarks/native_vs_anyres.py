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
import inspect
import os
import random
import statistics
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
STARTED = time.monotonic()
IGNORE, IMAGE = -100, -200
# Width x height in pixels, and how many of the photos have that size.
COCO = """
640x480:33 640x427:22 480x640:12 640x426:6 500x375:6 375x500:5 640x424:5 427x640:4 640x428:4 640x425:4 500x333:3
478x640:3 640x399:2 640x433:2 640x579:1 640x474:1 640x383:1 640x640:1 500x406:1 640x360:1 376x500:1 640x522:1
640x463:1 640x342:1 640x422:1 621x640:1 640x506:1 640x382:1 640x400:1 640x393:1 640x361:1 479x640:1 414x640:1
500x500:1 640x478:1 500x377:1 333x500:1 612x612:1 640x358:1 457x640:1 640x423:1 640x457:1 424x640:1 428x640:1
474x640:1 470x640:1 500x334:1 640x304:1 640x464:1 640x559:1 640x414:1 383x640:1 640x406:1 640x313:1 640x408:1
500x374:1 358x640:1 640x461:1 500x400:1 640x484:1 426x640:1 640x476:1
"""
GRIDS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))  # of tiles, width x height
TASKS = ("features", "first token", "training")
MODES = ("anyres", "native, same tokens", "native, own size")
FULL = {"tile": 336, "scale": 1.0, "batch": 8, "train_batch": 4, "rounds": 15, "words": (40, 60)}
TINY = {"tile": 56, "scale": 1 / 6, "batch": 3, "train_batch": 2, "rounds": 2, "words": (5, 7)}
PATCH = 14
TOLERANCE = 0.02
BATCHES = 6
WARM_UPS = 2


# ---------------------------------------------------------------- photos


def photo_sizes(scale: float) -> list[tuple[int, int]]:
    """Width and height of each photo."""
    sizes = []
    for entry in COCO.split():
        size, count = entry.split(":")
        sizes += [tuple(round(int(side) * scale) for side in size.split("x"))] * int(count)
    return sizes


def photo_batches(size: dict, seed: int = 0) -> list[list]:
    """Batches of photos (noise) whose sizes are drawn from the table, the same on every machine."""
    import numpy as np
    from PIL import Image

    draw, noise = random.Random(seed), np.random.default_rng(seed)
    drawn = draw.sample(photo_sizes(size["scale"]), BATCHES * size["batch"])
    made = [Image.fromarray(noise.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in drawn]
    return [made[i : i + size["batch"]] for i in range(0, len(made), size["batch"])]


# ---------------------------------------------------------------- model


def build(size: dict, tiny: bool, device: str) -> tuple[str, object]:
    """Name of the host and a model of it with random weights, in bfloat16 on a GPU."""
    import torch
    from two_gpu_training import FULL as LARGE
    from two_gpu_training import TINY as SMALL
    from two_gpu_training import decoder_attention, host_classes

    from llava_packing_tower import LlavaViTPackingConfig, LlavaViTPackingModel, PackingImageProcessor

    dimensions, tile = SMALL if tiny else LARGE, size["tile"]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "vit_packing"
        # Without a head: LLaVA reads hidden states before it.
        config = LlavaViTPackingConfig(image_size=tile, patch_size=PATCH, use_head=False, **dimensions["tower"])
        LlavaViTPackingModel(config).to(dtype).save_pretrained(folder)
        PackingImageProcessor(size=tile).save_pretrained(folder)
        host, config_class, model_class = host_classes()
        config = config_class(
            **dimensions["decoder"],
            attn_implementation=decoder_attention(device),
            mm_vision_tower=str(folder),
            mm_hidden_size=dimensions["tower"]["hidden_size"],
            mm_vision_select_layer=-1,
            mm_projector_type="mlp2x_gelu",
            mm_patch_merge_type="spatial_unpad",
            unfreeze_mm_vision_tower=True,
            image_aspect_ratio="anyres",
            image_grid_pinpoints=[[w * tile, h * tile] for w, h in GRIDS],
            tokenizer_model_max_length=dimensions["decoder"]["max_position_embeddings"],
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
        model = model_class(config)
    with torch.no_grad():
        model.get_model().image_newline.normal_(std=0.02)  # LLaVA leaves it uninitialised
    model = model.to(device, dtype).requires_grad_(True)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return host, model


class Mode(NamedTuple):
    """What a mode sets in the model's config."""

    name: str
    bounds: tuple[int, int] | None  # fewest and most patches, None for anyres

    def set(self, model: object) -> None:
        from llava_packing_tower.data.native_config import settings_of

        config = model.config
        config.image_aspect_ratio = "native" if self.bounds else "anyres"
        if self.bounds:
            config.mm_packing_min_patches, config.mm_packing_max_patches = self.bounds
            config.mm_packing_video = "frames"
        model.get_vision_tower().set_native(settings_of(config))


class Batch(NamedTuple):
    """What a model is called with."""

    given: dict
    labels: object

    @property
    def patches(self) -> int:
        """How many the tower will encode."""
        return sum(pixels.numel() // (3 * PATCH**2) for pixels in self.given["images"])

    def first(self, count: int) -> Batch:
        return Batch({key: value[:count] for key, value in self.given.items()}, self.labels[:count])


def make_batch(model: object, mode: Mode, photos: list, size: dict, vocabulary: int) -> Batch:
    """Photos as the host's own ``process_images`` makes them, each behind some words and in front of an answer."""
    import torch
    from two_gpu_training import host_classes

    utilities = import_module(host_classes()[2].__module__.split(".")[0] + ".mm_utils")
    mode.set(model)
    processor = model.get_vision_tower().image_processor
    device, dtype = model.device, model.dtype
    pixels = [p.to(device, dtype) for p in utilities.process_images(photos, processor, model.config)]
    draw = torch.Generator().manual_seed(1)
    question, answer = size["words"]
    words = torch.randint(3, vocabulary, (len(photos), question + answer), generator=draw)
    ids = torch.cat([words[:, :4], torch.full((len(photos), 1), IMAGE), words[:, 4:]], dim=1).to(device)
    labels = ids.clone()
    labels[:, : question + 1] = IGNORE
    given = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids, dtype=torch.bool),
        "images": pixels,
        "image_sizes": [photo.size for photo in photos],
    }
    if "modalities" in inspect.signature(type(model).forward).parameters:
        given["modalities"] = ["image"] * len(photos)  # LLaVA-NeXT drops the samples beyond their number
    return Batch(given, labels)


def prepared(model: object, batch: Batch) -> tuple[object, object]:
    """Embeddings ``[B, L, hidden]`` that the decoder gets, and their mask ``[B, L]``."""
    given = dict(batch.given)
    words = (given.pop("input_ids"), None, given.pop("attention_mask"), None, batch.labels, given.pop("images"))
    made = model.prepare_inputs_labels_for_multimodal(*words, **given)
    return made[4], made[2]


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
    host, model = build(size, args.tiny, device)
    photos, vocabulary = photo_batches(size), model.config.vocab_size
    batches, tokens = {}, {}

    def add(mode: Mode) -> Mode:
        batches[mode.name] = [make_batch(model, mode, some, size, vocabulary) for some in photos]
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
