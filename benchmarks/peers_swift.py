"""The row of ms-swift beside those of peers.py: the same model, photographs and counts, by `swift sft`.

  python benchmarks/peers_swift.py swift:8 --out peers.json --workspace FOLDER --site FOLDER

Run peers.py with the same --out and --workspace before. ms-swift reads a model from a folder, so the random weights are
saved first. Its options are like those of `trl_best`: no checkpointing, flash-attn 2 where it is installed, and
liger-kernel's layers of Qwen2. Tower and projector are trained, which it would freeze. It refuses `padding_free` and
`packing` for a model of this type. Time and memory are those of its own log (``logging.jsonl``). MFU takes the
operations of a sample from the last row of TRL. --cpu is for tiny models.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from peers import keep, model_and_processor, read
from runs import environment
from train_speed import WARM_UP

from llava_packing_tower.tools.bench.training.models import FULL, TINY, decoder_attention
from llava_packing_tower.utils.versions import installed

LIGER = """
from liger_kernel.transformers import apply_liger_kernel_to_qwen2
apply_liger_kernel_to_qwen2(fused_linear_cross_entropy=False)
"""
START = """
import json, sys
from importlib.metadata import version
with open(sys.argv.pop(1), "w") as file:
    json.dump({name: version(name) for name in ("torch", "transformers", "ms-swift", "trl", "accelerate")}, file)
from swift.pipelines import sft_main
sft_main()
"""
ATTENTION = {"flash_attention_2": "flash_attn", "sdpa": "sdpa"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", help="swift:SAMPLES")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="results, read and extended")
    parser.add_argument("--workspace", type=Path, required=True, metavar="FOLDER", help="that of peers.py")
    parser.add_argument("--steps", type=int, default=25, help=f"at least {WARM_UP + 2} (default: 25)")
    parser.add_argument("--limit", type=float, default=100, help="seconds (default: 100)")
    parser.add_argument("--python", default=sys.executable, help="interpreter that has ms-swift (default: this one)")
    parser.add_argument("--site", default="", metavar="FOLDER", help="packages of ms-swift, found before all others")
    parser.add_argument("--cpu", action="store_true", help="tiny models on this machine's processor")
    args = parser.parse_args()
    device, batch = torch.device("cpu" if args.cpu else "cuda"), int(args.run.partition(":")[2])
    with tempfile.TemporaryDirectory(prefix="peers_swift_") as name:
        folder = Path(name)
        for part in model_and_processor(TINY if args.cpu else FULL, device):
            part.save_pretrained(folder / "model")
        write_conversations(args.workspace, folder / "data.jsonl")
        variables = environment()
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, [args.site, variables["PYTHONPATH"]]))
        start = (LIGER if not args.cpu and installed("liger-kernel") else "") + START
        command = [args.python, "-c", start, str(folder / "versions.json"), *options(folder, batch, args, device)]
        ended = subprocess.run(command, env=variables, timeout=args.limit, stdout=sys.stderr).returncode
        row = {"exit status": ended}
        if not ended:
            row["versions"] = json.loads((folder / "versions.json").read_text())
            (log,) = (folder / "output").rglob("logging.jsonl")
            row |= measured([json.loads(line) for line in log.read_text().splitlines()], batch, args, read(args.out))
    keep(args.out, args.run, row)
    return int(ended != 0)


def write_conversations(workspace: Path, file: Path) -> None:
    """LLaVA's conversations as ms-swift takes them."""
    roles, lines = {"human": "user", "gpt": "assistant"}, []
    for sample in json.loads((workspace / "mix.json").read_text()):
        turns = [{"role": roles[turn["from"]], "content": turn["value"]} for turn in sample["conversations"]]
        images = {"images": [str(workspace.resolve() / "images" / sample["image"])]} if "image" in sample else {}
        lines.append(json.dumps({"messages": turns, **images}))
    file.write_text("\n".join(lines))


def options(folder: Path, batch: int, args: argparse.Namespace, device: torch.device) -> list[str]:
    given = {
        "model": folder / "model",
        "model_type": "llava_next_qwen_hf",
        "dataset": folder / "data.jsonl",
        "output_dir": folder / "output",
        "use_hf": "true",
        "check_model": "false",  # asks its hub
        "tuner_type": "full",
        "freeze_vit": "false",
        "freeze_aligner": "false",
        "torch_dtype": "float32" if args.cpu else "bfloat16",
        "use_cpu": str(args.cpu).lower(),
        "attn_impl": ATTENTION[decoder_attention(device)],
        "gradient_checkpointing": "false",
        "max_length": 8192,
        "max_steps": args.steps,
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-5,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "split_dataset_ratio": 0,
        "dataloader_num_workers": 1 if args.cpu else 8,
    }
    return [word for key, value in given.items() for word in (f"--{key}", str(value))]


def measured(logs: list[dict], batch: int, args: argparse.Namespace, found: dict) -> dict:
    """The row. Of each step the log has the seconds since the start, divided by the steps so far."""
    steps = {int(log["global_step/max_steps"].partition("/")[0]): log for log in logs if "loss" in log}
    begun, ended = (step * float(steps[step]["train_speed(s/it)"]) for step in (WARM_UP, args.steps))
    seconds, count = ended - begun, args.steps - WARM_UP
    row = {
        "samples/s": count * batch / seconds,
        "ms": 1e3 * seconds / count,
        "loss": statistics.fmean(float(log["loss"]) for step, log in steps.items() if step > WARM_UP),
        "losses": {step: float(log["loss"]) for step, log in steps.items()},
    }
    if memory := steps[args.steps].get("memory(GiB)"):
        row["peak GiB"] = float(memory)
    like = [r for r in found.get("rows", {}).values() if "MFU" in r and "tiles of a step" in r]
    if like:
        row["MFU"] = like[-1]["MFU"] * row["samples/s"] / like[-1]["samples/s"]
    return row


if __name__ == "__main__":
    sys.exit(main())
