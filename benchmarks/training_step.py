"""A training step beside stock LLaVA-NeXT's: samples per second, MFU and memory, in one process, taking turns.

  LLAVA_NEXT_DIR=... python benchmarks/training_step.py --json training_step.json    # on a GPU, under 400 seconds
  LLAVA_NEXT_DIR=... python benchmarks/training_step.py --json tiny.json --tiny      # the same on a CPU, in small

Stock is LLaVA-NeXT's own CLIP-L/14-336 with its own anyres (five grids), checkpointing on. Ours is a packing tower of
the same size at native resolution, and once more with the same tiles as stock. Both decoders have the size of
Qwen2-0.5B (151,936 words), all weights are random and trained, in bfloat16. Measured are forward and backward, without
an optimizer step. The photos have the sizes of COCO's (see ``native_vs_anyres.py``) and 60 supervised tokens each.

The systems take turns, round after round: in its turn a system makes one step that is not timed, then two that are.
Given are medians over all timed steps, and the peak of memory without the weights of the other model.

MFU: 3 x forward over real tokens, the head at supervised positions only, recomputation not counted, over the rate of
one large matmul measured in this process. (Projector, embeddings and norms are not counted.)
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import native_vs_anyres as photos_of
from two_gpu_parts import FULL, TINY, host_classes
from two_gpu_training import decoder_attention

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
STARTED = time.monotonic()
GROUPS, TIMED = 3, 2  # batches of a system; timed steps in a turn
SWITCHES = {
    "decoder padded": {"mm_packing_decoder": False},
    "all logits": {"mm_packing_full_logits": True},
    "no liger": {"mm_packing_liger": False},
    "all switches off": {"mm_packing_decoder": False, "mm_packing_full_logits": True, "mm_packing_liger": False},
}


class System(NamedTuple):
    name: str
    stock: bool
    ratio: str
    samples: int
    checkpointing: bool
    keys: dict


def systems(tiny: bool) -> list[System]:
    """In the order of their turns; the most telling ones first, for a run that is cut short."""
    few, many = (2, 4) if tiny else (4, 16)

    def ours(samples: int, checkpointing: bool, ratio: str = "native", **keys: bool) -> System:
        name = f"ours, {ratio}, {samples} samples, " + ("checkpointing" if checkpointing else "no checkpointing")
        return System(name, False, ratio, samples, checkpointing, keys)

    def stock(samples: int) -> System:
        return System(f"stock, CLIP, anyres, {samples} samples, checkpointing", True, "anyres", samples, True, {})

    found = [stock(few), ours(few, True), ours(many, True), ours(many, False), ours(few, False)]
    found += [stock(many)] if tiny else [stock(8), stock(10), stock(16)]
    found += [ours(many, True, "anyres"), ours(many, False, "anyres")]
    for name, keys in SWITCHES.items():
        found.append(ours(many, True, **keys)._replace(name=f"ours, native, {many} samples, checkpointing, {name}"))
    few_bare = ours(few, True, mm_packing_liger=False)
    found.append(few_bare._replace(name=f"{few_bare.name}, no liger"))
    return found if tiny else [*found, ours(24, False), ours(48, True)]


# ---------------------------------------------------------------- models


def build_stock(size: dict, dimensions: dict, device: str) -> object:
    """LLaVA's class with its own CLIP tower, random weights."""
    import torch
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    _, config_class, model_class = host_classes()
    tile, dtype = size["tile"], torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "clip-vit-large-patch14-336"
        config = CLIPVisionConfig(
            **dimensions["tower"], image_size=tile, patch_size=photos_of.PATCH, projection_dim=768
        )
        CLIPVisionModel(config).to(dtype).save_pretrained(folder)
        sides = {"size": {"shortest_edge": tile}, "crop_size": {"height": tile, "width": tile}}
        CLIPImageProcessor(**sides).save_pretrained(folder)
        config = config_class(
            **dimensions["decoder"],
            attn_implementation=decoder_attention(device),
            mm_vision_tower=str(folder),
            mm_hidden_size=dimensions["tower"]["hidden_size"],
            mm_vision_select_layer=-2,
            mm_vision_select_feature="patch",
            mm_projector_type="mlp2x_gelu",
            mm_patch_merge_type="spatial_unpad",
            unfreeze_mm_vision_tower=True,
            image_aspect_ratio="anyres",
            image_grid_pinpoints=[[w * tile, h * tile] for w, h in photos_of.GRIDS],
            tokenizer_model_max_length=dimensions["decoder"]["max_position_embeddings"],
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
        model = model_class(config)
        tower = model.get_vision_tower()
        if not tower.is_loaded:
            tower.load_model()
    with torch.no_grad():
        model.get_model().image_newline.normal_(std=0.02)  # LLaVA leaves it uninitialised
    return model.to(device, dtype).requires_grad_(True)


def checkpointing(model: object, on: bool) -> None:
    if on:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return
    model.gradient_checkpointing_disable()
    for module in model.modules():  # the tower is no submodule that transformers would reach in every version
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = False


class StockMode(photos_of.Mode):
    """anyres with LLaVA's own tower, which has nothing to set."""

    def set(self, model: object) -> None:
        model.config.image_aspect_ratio = self.name


# ---------------------------------------------------------------- counting


def step_flops(config: object, tower: dict, tokens: list[int], images: list[int], supervised: int) -> float:
    """Floating-point operations of a step by the rule above.

    tokens: of each sample in the decoder; images: patches of each image or tile, which attend to each other.
    """
    h, i, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    kv = h // config.num_attention_heads * config.num_key_value_heads
    linear = 2 * h * (h + 2 * kv) + 2 * h * h + 6 * h * i
    decoder = layers * sum(n * linear + 2 * n * n * h for n in tokens)  # causal: half of 4 n^2 h
    head = 2 * h * config.vocab_size * supervised
    w, m = tower["hidden_size"], tower["intermediate_size"]
    encoder = tower["num_hidden_layers"] * sum(n * (8 * w * w + 4 * w * m) + 4 * n * n * w for n in images)
    return 3.0 * (decoder + head + encoder)


def matmul_rate(device: str) -> float:
    """Operations per second of one large matmul in bfloat16 (float32 on a CPU)."""
    import torch

    side, repeats = (8192, 40) if device == "cuda" else (256, 5)
    a = torch.randn(side, side, device=device, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
    wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    for _ in range(2):  # the first is a warm-up
        wait()
        began = time.perf_counter()
        for _ in range(repeats):
            a @ a
        wait()
        rate = repeats * 2 * side**3 / (time.perf_counter() - began)
    return rate


# ---------------------------------------------------------------- measuring


class Runner:
    """A system with its batches; :meth:`turn` runs its steps."""

    def __init__(self, system: System, model: object, others: int, photos: list, size: dict, tower: dict) -> None:
        import torch

        self.system, self.model, self.others = system, model, others
        self.times, self.peak, self.losses, self.oom, self.count = [], 0.0, [], None, 0
        self.bounds = (1 if size["tile"] < 100 else 16, (2 * size["tile"] // photos_of.PATCH) ** 2)
        self.prepare()
        mode = self.mode()
        groups = [photos[i * system.samples : (i + 1) * system.samples] for i in range(GROUPS)]
        groups = [group for group in groups if len(group) == system.samples]
        self.batches = [self.make(mode, group, size) for group in groups]
        self.flops, self.tokens, self.padded = [], [], []
        for batch in self.batches:
            with torch.no_grad():
                mask = photos_of.prepared(model, batch)[1]
            lengths = [int(n) for n in mask.sum(1)]
            images = [
                x.numel() // (x.shape[0] if x.dim() == 4 else 1) // (3 * photos_of.PATCH**2) for x in self.tiles(batch)
            ]
            supervised = int((batch.labels[:, 1:] != photos_of.IGNORE).sum())
            self.flops.append(step_flops(model.config, tower, lengths, images, supervised))
            self.tokens.append(sum(lengths))
            self.padded.append(mask.numel())

    @staticmethod
    def tiles(batch: object) -> list:
        return [x for x in batch.given["images"] for _ in range(x.shape[0] if x.dim() == 4 else 1)]

    def mode(self) -> photos_of.Mode:
        if self.system.stock:
            return StockMode(self.system.ratio, None)
        return photos_of.Mode(self.system.ratio, self.bounds if self.system.ratio == "native" else None)

    def make(self, mode: photos_of.Mode, photos: list, size: dict) -> object:
        return photos_of.make_batch(self.model, mode, photos, size, self.model.config.vocab_size)

    def prepare(self) -> None:
        """Put the model into this system's state: the systems of ours share one."""
        checkpointing(self.model, self.system.checkpointing)
        self.model.train()
        self.model.config.tokenizer_padding_side = "right"
        if self.system.stock:
            return
        from llava_packing_tower.integrations.llava.packed_step import forget_plan

        for name in {name for keys in SWITCHES.values() for name in keys}:
            setattr(self.model.config, name, self.system.keys.get(name))
        forget_plan(self.model)
        self.mode().set(self.model)

    def turn(self, cuda: bool) -> None:
        import torch

        self.prepare()
        try:
            for step in range(1 + TIMED):
                batch = self.batches[self.count % len(self.batches)]
                self.model.zero_grad(set_to_none=True)
                if cuda:
                    torch.cuda.synchronize()
                    torch.cuda.reset_peak_memory_stats()
                began = time.perf_counter()
                loss = self.model(**batch.given, labels=batch.labels, use_cache=False).loss
                loss.backward()
                if cuda:
                    torch.cuda.synchronize()
                if step:
                    self.times.append((time.perf_counter() - began, self.flops[self.count % len(self.batches)]))
                    self.losses.append(loss.item())
                    self.count += 1
                if cuda:
                    self.peak = max(self.peak, (torch.cuda.max_memory_allocated() - self.others) / 2**30)
        except torch.cuda.OutOfMemoryError as error:
            self.oom = str(error).partition("\n")[0][:120]
        self.model.zero_grad(set_to_none=True)
        loss = None
        if cuda:
            torch.cuda.empty_cache()

    def row(self, rate: float) -> dict:
        base = {"samples": self.system.samples, "plan": str(vars(self.model).get("_llava_packing_step", "the host's"))}
        if self.oom or not self.times:
            return {**base, "out of memory": self.oom}
        seconds = [s for s, _ in self.times]
        return {
            **base,
            "ms": statistics.median(seconds) * 1e3,
            "fastest and slowest ms": (min(seconds) * 1e3, max(seconds) * 1e3),
            "samples/s": self.system.samples / statistics.median(seconds),
            "MFU": statistics.median(flops / s for s, flops in self.times) / rate,
            "peak GiB": self.peak,
            "tokens": statistics.mean(self.tokens),
            "padded to": statistics.mean(self.padded),
            "timed steps": len(seconds),
            "losses": self.losses[:GROUPS],
        }


def weights(model: object) -> int:
    """Bytes."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def show(report: dict) -> None:
    from rich.table import Table

    from llava_packing_tower.tools.bench.report import console

    out, table = console(), Table("system", box=None, pad_edge=False)
    for column in ("ms", "samples/s", "MFU", "peak GiB", "tokens", "padded to"):
        table.add_column(column, justify="right")
    for name, row in report["systems"].items():
        if "ms" not in row:
            table.add_row(name, "out of memory")
            continue
        numbers = (f"{row['ms']:.0f}", f"{row['samples/s']:.1f}", f"{row['MFU']:.3f}", f"{row['peak GiB']:.1f}")
        table.add_row(name, *numbers, f"{row['tokens']:.0f}", f"{row['padded to']:.0f}")
    out.print(table)
    for name, value in report["against stock"].items():
        out.print(f"{name}: {value:.2f} x stock at its best batch")


def against_stock(rows: dict) -> dict:
    """Samples per second of the best batch, native and with stock's tiles, over stock's best."""

    def best(words: str) -> float:
        return max(
            (row["samples/s"] for name, row in rows.items() if name.startswith(words) and "ms" in row), default=0
        )

    base = best("stock")
    return {ratio: best(f"ours, {ratio},") / base for ratio in ("native", "anyres")} if base else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="where the report goes; written after every turn")
    parser.add_argument("--tiny", action="store_true", help="small, on the CPU")
    parser.add_argument("--rounds", type=int, default=5, help="at most (default 5)")
    parser.add_argument("--limit", type=float, default=330, help="seconds after which no turn is begun (default 330)")
    parser.add_argument("--only", help="systems whose names contain this")
    args = parser.parse_args()

    import torch

    import builder_patch  # noqa: F401
    from llava_packing_tower.tools.bench.report import environment, write_json

    device, size = "cpu" if args.tiny else "cuda", dict(photos_of.TINY if args.tiny else photos_of.FULL)
    dimensions = TINY if args.tiny else FULL
    rate = matmul_rate(device)
    models = {True: build_stock(size, dimensions, device), False: photos_of.build(size, args.tiny, device)[1]}
    # Noise of the table's sizes, once for each system's batches.
    most = 8 if args.tiny else 96
    photos = [
        photo for batch in photos_of.photo_batches({**size, "batch": most // photos_of.BATCHES + 1}) for photo in batch
    ]
    chosen = [system for system in systems(args.tiny) if not args.only or args.only in system.name]
    runners: dict[str, Runner] = {}
    report = {
        **environment(torch.device(device), sys.argv),
        "host": host_classes()[0],
        "decoder attention": models[True].config._attn_implementation,
        "matmul TFLOP/s": rate / 1e12,
        "rounds": 0,
    }

    def write() -> None:
        report["systems"] = {name: runner.last for name, runner in runners.items()}
        report["against stock"] = against_stock(report["systems"])
        report["seconds"] = time.monotonic() - STARTED
        write_json(report, args.json)

    for number in range(args.rounds):
        for system in chosen:
            if time.monotonic() - STARTED > args.limit:
                break
            if system.name not in runners:
                model, other = models[system.stock], models[not system.stock]
                runners[system.name] = Runner(system, model, weights(other), photos, size, dimensions["tower"])
            runner = runners[system.name]
            if runner.oom is None:
                runner.turn(device == "cuda")
                runner.last = runner.row(rate)
                speed = runner.last.get("samples/s", "out of memory")
                print(f"[{time.monotonic() - STARTED:4.0f} s] {system.name}: {speed}", flush=True)
                write()
        report["rounds"] = number + 1
    write()
    show(report)


if __name__ == "__main__":
    main()
