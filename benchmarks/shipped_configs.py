"""The configurations that are shipped (configs/*.yaml), each trained by `llava-packing train` with an unedited LLaVA.

  LLAVA_NEXT_DIR=... python benchmarks/shipped_configs.py --num_processes 2 --out shipped.json        # tiny, on a CPU
  LLAVA_NEXT_DIR=... python benchmarks/shipped_configs.py --num_gpus 2 --size half --configs finetune --out shipped.json

Changed on the command line are paths, the number of steps and when to save; and on a CPU `tf32` and
`attn_implementation`. All else is the file's: workers, grouping by modality, ZeRO-3, the learning rates of the parts,
batch sizes. Without LLAVA_NEXT_DIR the installed LLaVA 1.x trains what is not for LLaVA-NeXT (llava_lora). The models
have random weights (shipped_configs_parts.py). A cell passes if
  - the engine is the one that the file asks for, and every step has a finite loss,
  - the optimizer has the file's learning rates, one for each part,
  - the model is saved at the end, and where a cell is also resumed (finetune and LoRA; --resume): the run is killed
    (SIGKILL to all of it) after the step that follows a checkpoint, started again, goes on from that checkpoint, and
    repeats the killed step's loss (the largest difference is recorded, and may be 1 %).
Every finished cell is written to --out at once; one that passed there already is not run again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import yaml
from runs import (
    CONFIGS,
    LATE,
    REPOSITORY,
    CellFailed,
    Training,
    environment,
    last_error,
    train,
    train_command,
    versions,
)

from llava_packing_tower.tools.bench.models import PRESETS
from llava_packing_tower.utils.files import write_text

GROUPS = {"pretrain": "_pretrain", "finetune": "_finetune", "lora": "lora"}
SAVE_EVERY, REPEATED = 2, 3  # a killed run has saved step 2 and logged step 3
TOLERANCE = 0.01  # of the repeated loss: sums in another order, in bfloat16


def main() -> int:
    args = _arguments()
    names = chosen(args.configs)
    cells = json.loads(args.out.read_text()) if args.out.is_file() else {}
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="shipped_configs_") as scratch:
        workspace = args.workspace or Path(scratch) / "workspace"
        needs = sorted({(family(name), decoder(name)) for name in names})
        missing = [pair for pair in needs if not (workspace / f"{'_'.join(pair)}_projector").is_dir()]
        if missing:
            script = "import sys, pathlib, json, shipped_configs_parts as p; p.make_workspace("
            script += "pathlib.Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]), sys.argv[4])"
            made = [sys.executable, "-c", script, str(workspace), args.size, json.dumps(missing), args.photos or ""]
            subprocess.run(made, env=environment(), cwd=REPOSITORY, check=True)
            print(f"workspace: {time.monotonic() - began:.0f} s", flush=True)
        for python in args.interpreter or [sys.executable]:
            installed, host = versions(python)
            for name in names:
                where = f"{args.num_gpus} GPUs" if args.num_gpus else f"CPU, {args.num_processes} process(es)"
                key = f"{name} | {host} | {installed['transformers']} | {args.size}, {where}"
                if cells.get(key, {}).get("result") == "pass" or (name.startswith("llava_next") and "NeXT" not in host):
                    continue
                left = args.within - (time.monotonic() - began)
                if left < args.least:
                    print(f"{key}: not run, {left:.0f} s are left", flush=True)
                    continue
                cell = {"config": name, "host": host, "size": args.size, "where": where, "versions": installed}
                start = time.monotonic()
                try:
                    output = Path(scratch) / "output"
                    cell |= run_cell(python, name, workspace, output, args, min(args.timeout, left))
                    cell["result"] = "pass"
                except CellFailed as failure:
                    cell |= {"result": "FAIL", "reason": str(failure)}
                shutil.rmtree(output, ignore_errors=True)
                cell |= {"seconds": round(time.monotonic() - start), "date": date.today().isoformat()}
                cells[key] = cell
                write_text(args.out, json.dumps(cells, indent=1) + "\n")
                print(f"{key}: {cell['result']} {cell.get('reason', '')} ({cell['seconds']} s)", flush=True)
    table = markdown(cells)
    print(table)
    if args.markdown:
        write_text(args.markdown, table)
    return int(any(cell["result"] != "pass" for cell in cells.values()))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--num_gpus", type=int, metavar="N")
    where.add_argument("--num_processes", type=int, metavar="N", help="on the CPU")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="results, read and extended")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="the table")
    parser.add_argument("--configs", nargs="+", default=["all"], help="names, pretrain, finetune, lora, all")
    parser.add_argument("--resume", nargs="+", default=["finetune", "lora"], help="also killed and resumed (or: none)")
    parser.add_argument("--size", choices=("tiny", "half"), default="tiny", help="of the models")
    parser.add_argument("--steps", type=int, default=5, help=f"more than {REPEATED}")
    parser.add_argument("--interpreter", action="append", metavar="PYTHON", help="may be repeated (default: this one)")
    parser.add_argument("--workspace", type=Path, metavar="FOLDER", help="models and data, kept (default: a new one)")
    parser.add_argument("--photos", metavar="FOLDER", help="photographs to make images from (default: noise)")
    parser.add_argument("--timeout", type=float, default=300, help="seconds for each start of the launcher")
    parser.add_argument("--within", type=float, default=math.inf, help="seconds in all: what is left is not run")
    parser.add_argument("--least", type=float, default=30, help="seconds that must be left to start a cell")
    parser.add_argument("--logs", type=Path, metavar="FOLDER", help="keep what each run printed")
    return parser.parse_args()


# ---------------------------------------------------------------- which


def chosen(words: list[str]) -> list[str]:
    """Names of shipped configurations; stage 1 first. Raises ``SystemExit`` for a word that is none."""
    shipped = sorted(f.stem for f in CONFIGS.glob("llava_*.yaml"))
    names = []
    for word in words:
        part = GROUPS.get(word)
        found = [n for n in shipped if word in ("all", n) or (part and part in n)]
        if not found and word != "none":
            raise SystemExit(f"no shipped configuration {word!r}: {', '.join(shipped)}, {', '.join(GROUPS)}, all")
        names += [n for n in found if n not in names]
    return sorted(names, key=lambda n: ("_pretrain" not in n, n))


def family(name: str) -> str:
    return next((f for f in PRESETS if name.endswith(f"_{f}")), "llava_vit")


def decoder(name: str) -> str:
    path = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["model_name_or_path"]
    return "qwen" if "qwen" in path.lower() else "llama"


def changes(name: str, workspace: Path, output: Path, args: argparse.Namespace) -> dict[str, object]:
    """What is not as in the file: paths, steps, and what a CPU cannot do."""
    shipped = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    kind, prefix = decoder(name), "packing:" if shipped["mm_vision_tower"].startswith("packing:") else ""
    made: dict[str, object] = {
        "mm_vision_tower": f"{prefix}{workspace / family(name)}_packing",
        "model_name_or_path": workspace / f"{kind}_{args.size}",
        "data_path": workspace / ("captions.json" if shipped["version"] == "plain" else "conversations.yaml"),
        "image_folder": workspace / "images",
        "output_dir": output / Path(shipped["output_dir"]).name,
        "max_steps": args.steps,
    }
    if not shipped["data_path"].endswith(".yaml"):
        made["data_path"] = str(made["data_path"]).replace(".yaml", ".json")
    if "pretrain_mm_mlp_adapter" in shipped:
        made["pretrain_mm_mlp_adapter"] = workspace / f"{family(name)}_{kind}_projector" / "mm_projector.bin"
    if name in chosen(args.resume):
        made["save_steps"] = SAVE_EVERY
    if not args.num_gpus:
        made |= {"tf32": "false", "attn_implementation": "sdpa"}
    return made


# ---------------------------------------------------------------- one cell


def run_cell(python: str, name: str, workspace: Path, output: Path, args: argparse.Namespace, timeout: float) -> dict:
    """Train as shipped; where asked for, be killed, go on, and compare. Raises :class:`CellFailed`."""
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    shipped = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    made = changes(name, workspace, output, args)
    processes = args.num_gpus or args.num_processes
    command = train_command(CONFIGS / f"{name}.yaml", made, processes, not args.num_gpus, python)
    resumed = name in chosen(args.resume)
    log = (args.logs / f"{name}_{time.time():.0f}.log") if args.logs else None
    first = _train(command, timeout, log, REPEATED if resumed else None)
    folder = Path(made["output_dir"])
    cell: dict[str, object] = {"engine": _engine(first.log, args)}
    losses, times, shown = first.losses, first.times, first.log
    if resumed:
        found = sorted(f.name for f in folder.glob("checkpoint-*"))
        if f"checkpoint-{SAVE_EVERY}" not in found:
            raise CellFailed(f"killed after step {REPEATED}, it left {found}")
        cell["learning rates"] = _rates(folder / f"checkpoint-{SAVE_EVERY}", shipped)
        again = _train(command, timeout, log and log.with_suffix(".again.log"), None)
        if f"resumes from checkpoint-{SAVE_EVERY}" not in again.log or min(again.losses, default=0) != REPEATED:
            raise CellFailed(
                f"it did not go on from checkpoint-{SAVE_EVERY}: first step {min(again.losses, default=0)}"
            )
        apart = abs(again.losses[REPEATED] - first.losses[REPEATED]) / first.losses[REPEATED]
        cell["repeated step"] = {"loss": first.losses[REPEATED], "again": again.losses[REPEATED], "apart": apart}
        if not apart <= TOLERANCE:
            raise CellFailed(f"step {REPEATED} had loss {first.losses[REPEATED]}, resumed {again.losses[REPEATED]}")
        losses, times, shown = {**first.losses, **again.losses}, again.times, again.log
    if sorted(losses) != list(range(1, args.steps + 1)) or not all(map(math.isfinite, losses.values())):
        raise CellFailed(f"losses of {args.steps} steps: {losses}")
    saved = [f.name for f in folder.iterdir() if f.suffix in (".safetensors", ".bin") and f.name != "training_args.bin"]
    if not saved:
        raise CellFailed(f"no weights were saved in {folder.name}")
    patches = re.findall(r"^(?:patches|compat patches): (.*)$", shown, re.M)
    steps = sorted(times.values())
    gaps = sorted(b - a for a, b in itertools.pairwise(steps[1:]))
    batch = shipped["per_device_train_batch_size"] * shipped["gradient_accumulation_steps"]
    cell |= {"losses": list(losses.values()), "saved": sorted(saved), "first step s": round(steps[0], 1)}
    cell |= {"patches": patches[0].split(", ") if patches else []}
    if gaps:
        cell["median step s"] = round(gaps[len(gaps) // 2], 3)
        cell["samples/s"] = round(batch * processes / gaps[len(gaps) // 2], 2)
    return cell


def _engine(log: str, args: argparse.Namespace) -> str:
    engine = re.search(r"^engine: ((\w+)(?:, ZeRO stage (\d+))?, world size (\d+).*)$", log, re.M)
    expected = ("DeepSpeedEngine", "3", str(args.num_gpus or args.num_processes))
    if engine is None or engine.groups()[1:] != expected:
        raise CellFailed(f"not the engine of the file: {engine and engine[1]}")
    return engine[1]


def _rates(checkpoint: Path, shipped: dict) -> list[float]:
    """The optimizer's learning rates, by the schedule that was saved with it."""
    import torch

    rates = sorted(set(torch.load(checkpoint / "scheduler.pt", weights_only=False)["base_lrs"]))
    keys = ("learning_rate", "mm_vision_tower_lr", "mm_projector_lr")
    expected = sorted({float(shipped[key]) for key in keys if key in shipped})
    if rates != expected:
        raise CellFailed(f"learning rates {rates}, the file has {expected}")
    return rates


def _train(command: list[str], timeout: float, log: Path | None, kill_after: int | None) -> Training:
    """Start the launcher; with ``kill_after`` all of it is killed when that step is logged."""

    def at_step(training: Training, step: int) -> None:
        if step == kill_after:
            training.kill()

    found = train(command, timeout, log, at_step)
    if found.left:
        raise CellFailed(f"processes outlived the launcher: {found.left}")
    if kill_after not in found.losses and found.status:
        stopped = f"not finished after {timeout:.0f} s, step {max(found.losses, default=0)}"
        raise CellFailed(stopped if found.status == LATE else last_error(found.log))
    return found


# ---------------------------------------------------------------- the table


def markdown(cells: dict[str, dict]) -> str:
    """A row for each configuration and host, a column for each version of transformers ("x2": two ranks); failures."""
    order = lambda v: [int(part) for part in re.findall(r"\d+", v)]  # noqa: E731
    columns = sorted({c["versions"]["transformers"] for c in cells.values()}, key=order)
    rows: dict[tuple[str, ...], dict[str, dict]] = {}
    for cell in cells.values():
        device = "GPU" if "GPU" in cell["where"] else "CPU"
        row = rows.setdefault((cell["config"], cell["host"], f"{cell['size']}, {device}"), {})
        row[cell["versions"]["transformers"]] = cell
    lines = ["| configuration | LLaVA | models | " + " | ".join(columns) + " | date |"]
    lines += ["|" + "---|" * (len(columns) + 4)]
    failures = []
    for key, row in sorted(rows.items(), key=lambda item: ("_pretrain" not in item[0][0], item[0])):
        shown = [_shown(row[v]) if v in row else "-" for v in columns]
        lines.append(f"| {' | '.join([*key, *shown])} | {max(c['date'] for c in row.values())} |")
        for version, cell in row.items():
            if cell["result"] != "pass":
                failures.append(f"- {key[0]}, transformers {version}: `{cell['reason']}`")
    return "\n".join(lines + (["", *failures] if failures else [])) + "\n"


def _shown(cell: dict) -> str:
    ranks = re.search(r"\d+", cell["where"])[0]
    return f"{cell['result']}{', resumed' if 'repeated step' in cell else ''} x{ranks}"


if __name__ == "__main__":
    sys.exit(main())
