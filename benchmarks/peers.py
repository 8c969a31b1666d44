"""A training by TRL beside one by `llava-packing train`: models of the same sizes, the same photographs, one GPU.

  LLAVA_NEXT_DIR=... python benchmarks/peers.py --out peers.json --photos FOLDER

A run is NAME:SAMPLES, with so many samples in a micro-batch.

  trl        TRL does not train LLaVA-NeXT's own classes. The nearest that it does, LlavaNextForConditionalGeneration of
             transformers, has random weights here: CLIP ViT-L/14 at 336 pixels with anyres, a decoder of Qwen2-0.5B's
             size. SFTConfig as it is (gradient checkpointing, sdpa), but for truncation, which images do not allow. Its
             own collator supervises the answers alone, as LLaVA does. The weights and the states of AdamW are bfloat16;
             `llava-packing train` has those of ZeRO-2.
  trl_best   without checkpointing, with flash-attn 2 where it is installed, and with liger-kernel's layers of Qwen2
             (the trainer's own `use_liger_kernel` finds none for a model of this type)
  native     `llava-packing train` by train_speed.py, with the tower at native resolution
  anyres     the same with the grids of the peer

Options that the trainer refuses are tried, and its words kept. Counted is from the end of the 10th step to the end of
the last. MFU is by the rule of llava_packing_tower/multimodal/flops.py, over the rate of a matmul in the same run. The
peer has a process of its own: of --python, with --site in front of its PYTHONPATH. --cpu makes everything tiny, which
shows only that it works.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import train_speed
from host_matrix_parts import SYSTEM, TEMPLATE, make_tokenizer
from runs import environment, versions
from train_speed import WARM_UP

from llava_packing_tower.multimodal.flops import decoder_flops, encoder_flops, head_flops, step_flops
from llava_packing_tower.tools.bench.timing import Clock, PeakMatmul, release
from llava_packing_tower.tools.bench.training.models import FULL, TINY, decoder_attention
from llava_packing_tower.tools.bench.training.photos import GRIDS, IGNORE, PATCH
from llava_packing_tower.utils.files import write_text
from llava_packing_tower.utils.versions import installed

RUNS = ("trl:4", "trl_best:4", "trl_best:8", "native:8", "anyres:8")
OURS = ("native", "anyres")
MEASURED = {"visual_tokens_per_second", "text_tokens_per_second", "data_wait", "mfu"}
DISTRIBUTIONS = ("torch", "transformers", "trl", "accelerate", "datasets", "liger-kernel", "flash-attn")
REFUSED = ("padding_free", "packing")  # what would help here, and trainers of text have
CONTENT = (
    "{% for part in message['content'] %}{{ '<image>\n' if part['type'] == 'image' else part['text'] }}{% endfor %}"
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", default=RUNS, metavar="RUN", help=f"default: {' '.join(RUNS)}")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="results, read and extended")
    parser.add_argument("--photos", metavar="FOLDER", help="photographs to make images from (default: noise)")
    parser.add_argument("--steps", type=int, default=25, help=f"of each run, at least {WARM_UP + 2} (default: 25)")
    parser.add_argument("--limit", type=float, default=150, help="seconds for the peer, and for each run of ours")
    parser.add_argument("--workspace", type=Path, metavar="FOLDER", help="models and data, kept")
    parser.add_argument("--python", default=sys.executable, help="interpreter that has the peer (default: this one)")
    parser.add_argument("--site", default="", metavar="FOLDER", help="packages of the peer, found before all others")
    parser.add_argument("--cpu", action="store_true", help="tiny models on this machine's processor")
    parser.add_argument("--in-peer", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.steps < WARM_UP + 2:
        parser.error(f"--steps {args.steps}: at least {WARM_UP + 2}, since the first {WARM_UP} do not count")
    if args.in_peer:
        return in_peer(args)
    with tempfile.TemporaryDirectory(prefix="peers_") as scratch:
        args.workspace, args.logs = args.workspace or Path(scratch) / "workspace", None
        if not (args.workspace / "mix.json").is_file():
            train_speed.make_workspace(args.workspace, argparse.Namespace(**vars(args), documents=0.0))
        ours = [word for word in args.runs if word.partition(":")[0] in OURS]
        peers = [word for word in args.runs if word not in ours]
        failed = [run_peer(peers, args)] if peers else []
        failed += [run_ours(word, Path(scratch) / "output", args) for word in ours]
    return int(any(failed))


def keep(file: Path, word: str, row: dict) -> None:
    """Add a row to the file and print it."""
    found, row = read(file), {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}
    found.setdefault("rows", {})[word] = row
    write_text(file, json.dumps(found, indent=1) + "\n")
    print(json.dumps({word: {k: v for k, v in row.items() if k not in ("losses", "tail", "versions")}}), flush=True)


def read(file: Path) -> dict:
    return json.loads(file.read_text()) if file.is_file() else {}


def run_ours(word: str, output: Path, args: argparse.Namespace) -> bool:
    """A run of train_speed.py, with what its ``speed.csv`` says after the 10th step. Returns whether it failed."""
    name, _, batch = word.partition(":")
    found = read(args.out)
    asked = {"name": word.replace(":", "_"), "gpus": "1", "deepspeed": "zero2_nvlink", "batch": batch}
    if rate := found.get("matmul TFLOP/s"):
        asked["mm_packing_peak_tflops"] = str(rate)
    if name == "anyres":
        tile = 224 if args.cpu else 336
        asked |= {"image_aspect_ratio": name, "image_grid_pinpoints": str([(tile * w, tile * h) for w, h in GRIDS])}
    row = train_speed.run(asked, args.workspace, output, args)
    row |= {"run": asked, "versions": versions(sys.executable)[0]}
    if "samples/s" in row:
        losses = [loss for step, loss in row["losses"].items() if step > WARM_UP]
        row |= {"ms": 1e3 * int(batch) / row["samples/s"], "loss": statistics.fmean(losses)}
    table = output / f"llava_qwen_{asked['name']}" / "speed.csv"
    if not row["exit status"] and table.is_file():
        with table.open(newline="") as file:
            logs = [{key: float(value) for key, value in log.items() if value} for log in csv.DictReader(file)]
        logs = [log for log in logs if log["step"] > WARM_UP]
        seconds = [int(batch) / log["samples_per_second"] for log in logs]
        whole = {
            key: sum(s * log[key] for s, log in zip(seconds, logs, strict=True)) for key in MEASURED & logs[0].keys()
        }
        tokens = whole["visual_tokens_per_second"] + whole["text_tokens_per_second"]
        row |= {"tokens of a step": round(tokens / len(logs)), "waits for data": whole["data_wait"] / sum(seconds)}
        if not args.cpu:
            row |= {"MFU": whole["mfu"] / sum(seconds), "peak GiB": max(log["peak_memory_gib"] for log in logs)}
    keep(args.out, word, row)
    return row["exit status"] != 0


def run_peer(words: list[str], args: argparse.Namespace) -> bool:
    """All its runs, in one process. Returns whether it failed."""
    given = [args.python, __file__, *words, "--in-peer", "--out", args.out.resolve(), "--workspace", args.workspace]
    given += ["--steps", args.steps, *["--cpu"] * args.cpu]
    variables = environment()
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, [args.site, variables["PYTHONPATH"]]))
    try:
        return subprocess.run(list(map(str, given)), env=variables, timeout=args.limit).returncode != 0
    except subprocess.TimeoutExpired:
        print(f"the peer was not done after {args.limit:.0f} s", flush=True)
        return True


def in_peer(args: argparse.Namespace) -> int:
    import torch

    device, found = torch.device("cpu" if args.cpu else "cuda"), read(args.out)
    found |= {"date": date.today().isoformat(), "versions of the peer": {n: installed(n) for n in DISTRIBUTIONS}}
    if not args.cpu:
        clock, matmul = Clock(device), PeakMatmul(device)
        rates = [matmul.flops_per_second(clock(matmul.run)) for _ in range(4)][1:]  # the first one builds kernels
        found |= {"device": torch.cuda.get_device_name(), "matmul TFLOP/s": round(statistics.median(rates) / 1e12, 1)}
        del matmul
    found["refused by SFTTrainer"] = refusals(args, device)
    write_text(args.out, json.dumps(found, indent=1) + "\n")
    for word in args.runs:  # liger-kernel stays: trl_best is behind trl
        name, _, batch = word.partition(":")
        try:
            row = run_trl(name == "trl_best", int(batch), args, device)
        except torch.cuda.OutOfMemoryError:
            row = {"failure": "out of memory"}
        keep(args.out, word, row)
        release(device)
    return 0


def conversations(workspace: Path):
    """LLaVA's conversations as TRL takes them: a list of images, a prompt and a completion; as `datasets.Dataset`."""
    from datasets import Dataset, Image, List

    samples = []
    for sample in json.loads((workspace / "mix.json").read_text()):
        question, answer = (turn["value"] for turn in sample["conversations"])
        asked = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question.removeprefix("<image>\n")}]
        images = [str(workspace / "images" / sample["image"])] if "image" in sample else []
        samples.append({"images": images, "prompt": asked, "completion": [{"role": "assistant", "content": answer}]})
    return Dataset.from_list(samples).cast_column("images", List(Image()))


def model_and_processor(size: dict, device, attention: str | None = None):
    import torch
    import transformers as hf

    tile = size["tile"]
    pinpoints = [[h * tile, w * tile] for w, h in GRIDS]
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = make_tokenizer(Path(folder))
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    crop = {"height": tile, "width": tile}
    images = hf.LlavaNextImageProcessor(size={"shortest_edge": tile}, crop_size=crop, image_grid_pinpoints=pinpoints)
    more = {"patch_size": PATCH, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    template = TEMPLATE.replace("{{ message['content'] }}", CONTENT)
    processor = hf.LlavaNextProcessor(images, tokenizer, chat_template=template, **more)
    decoder = {**size["decoder"], "vocab_size": max(size["decoder"]["vocab_size"], len(tokenizer))}
    config = hf.LlavaNextConfig(
        vision_config=hf.CLIPVisionConfig(**size["tower"], image_size=tile, patch_size=PATCH, projection_dim=768),
        text_config=hf.Qwen2Config(**decoder, pad_token_id=tokenizer.pad_token_id),
        image_grid_pinpoints=pinpoints,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        tie_word_embeddings=decoder["tie_word_embeddings"],
    )
    torch.manual_seed(0)
    with device:
        model = hf.AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16, attn_implementation=attention)
    return model, processor


def settings(args: argparse.Namespace, folder: str, batch: int, **more: object):
    from trl import SFTConfig

    length = {"output_dir": folder, "max_steps": args.steps, "per_device_train_batch_size": batch, "max_length": None}
    rate = {"learning_rate": 1e-5, "lr_scheduler_type": "cosine", "warmup_steps": 1}
    logs = {"logging_steps": 1, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    machine = {"bf16": not args.cpu, "use_cpu": args.cpu, "dataloader_num_workers": 1 if args.cpu else 8}
    return SFTConfig(**length, **rate, **logs, **machine, **more)


def refusals(args: argparse.Namespace, device) -> dict[str, str]:
    """What SFTTrainer says to the options that it does not have for images."""
    from trl import SFTTrainer

    model, processor = model_and_processor(TINY, device)
    said, more = {}, {"train_dataset": conversations(args.workspace), "processing_class": processor}
    for option in REFUSED:
        try:
            with tempfile.TemporaryDirectory() as folder:
                SFTTrainer(model, settings(args, folder, 2, **{option: True}), **more)
        except ValueError as error:
            said[option] = str(error)
    return said


def run_trl(best: bool, batch: int, args: argparse.Namespace, device) -> dict:
    import torch
    from transformers import TrainerCallback
    from trl import SFTTrainer

    attention = decoder_attention(device) if best else None
    if best and not args.cpu and installed("liger-kernel"):
        from liger_kernel.transformers import apply_liger_kernel_to_qwen2

        apply_liger_kernel_to_qwen2(fused_linear_cross_entropy=False)  # the trainer has a head of its own
    if not args.cpu:
        torch.cuda.reset_peak_memory_stats()
    model, processor = model_and_processor(TINY if args.cpu else FULL, device, attention)
    batches, times, waits = [], {}, {}

    class Watched(SFTTrainer):
        def training_step(self, model, inputs, *more, **keywords):
            batches.append([inputs["attention_mask"], inputs["labels"], 0])
            return super().training_step(model, inputs, *more, **keywords)

    class Watch(TrainerCallback):
        ended = time.perf_counter()

        def on_step_begin(self, given, state, control, **more):
            waits[state.global_step + 1] = time.perf_counter() - self.ended

        def on_step_end(self, given, state, control, **more):
            if state.global_step in (WARM_UP, args.steps):
                Clock(device).wait()
            times[state.global_step] = self.ended = time.perf_counter()

    def count_tiles(module, given, keywords) -> None:
        batches[-1][2] = len(given[0] if given else keywords["pixel_values"])

    model.model.vision_tower.register_forward_pre_hook(count_tiles, with_kwargs=True)
    with tempfile.TemporaryDirectory() as folder:
        more = {"train_dataset": conversations(args.workspace), "processing_class": processor, "callbacks": [Watch()]}
        trainer = Watched(model, settings(args, folder, batch, gradient_checkpointing=not best), **more)
        trainer.train()
    counted, seconds = batches[WARM_UP:], times[args.steps] - times[WARM_UP]
    vision, text, flops, tokens = model.config.vision_config, model.config.text_config, 0.0, 0
    for mask, labels, tiles in counted:
        lengths = mask.sum(1).tolist()
        encoder = encoder_flops(vision, [(vision.image_size // PATCH) ** 2] * tiles, vision.num_hidden_layers - 1)
        head = head_flops(text, int((labels[:, 1:] != IGNORE).sum()))
        flops += step_flops(encoder, decoder_flops(text, lengths), head)
        tokens += sum(lengths)
    losses = {log["step"]: log["loss"] for log in trainer.state.log_history if "loss" in log}
    row = {
        "samples/s": len(counted) * batch / seconds,
        "ms": 1e3 * seconds / len(counted),
        "loss": statistics.fmean(loss for step, loss in losses.items() if step > WARM_UP),
        "tokens of a step": round(tokens / len(counted)),
        "padded to": round(statistics.fmean(mask.numel() for mask, _, _ in counted)),
        "tiles of a step": statistics.fmean(tiles for _, _, tiles in counted),
        "waits for data": sum(wait for step, wait in waits.items() if step > WARM_UP) / seconds,
        "attention": attention or "sdpa",
        "norms": type(model.model.language_model.norm).__name__,
        "losses": losses,
    }
    if not args.cpu:
        row["peak GiB"] = torch.cuda.max_memory_allocated() / (1 << 30)
        row["MFU"] = flops / seconds / (read(args.out)["matmul TFLOP/s"] * 1e12)
    return row


if __name__ == "__main__":
    sys.exit(main())
