"""Loss curves of `llava-packing train` with the packed step beside LLaVA-NeXT's own step, on the same samples.

  LLAVA_NEXT_DIR=... python benchmarks/training_curves.py --photos FOLDER --out curves.json --plot curves.png

Three runs of ``train_speed.py`` with one seed: ``host`` (LLaVA's own step: padded, all logits, unfused, the order of
its sampler), ``packed`` (everything that is on by default, dealing among it), both in bfloat16, and ``float32``: the
host's step once more, in float32 without tf32. Its curve is another one: weights in bfloat16 follow their masters only
once several steps have moved them by half a digit. The packed curve passes if its distance from the host's is at
most a tenth of what bfloat16 makes, the distance between host and float32: the root mean square over all steps, and
over the last ten. A run that ended well is not repeated when the file has it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
from datetime import date
from pathlib import Path

import train_speed
from runs import REPOSITORY, versions

from llava_packing_tower.utils.files import write_text

HOST, PACKED, FLOAT32 = "host", "packed", "float32"
LAST = 10
PRINTED = 5e-5
"""Half a digit of the losses on the console."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="curves and differences, JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="a figure, PNG")
    parser.add_argument("--gpus", type=int, default=2, help="(default: 2)")
    parser.add_argument("--deepspeed", default="zero2", help="configuration in configs/, or a file (default: zero2)")
    parser.add_argument("--batch", type=int, default=2, help="samples of a micro-batch (default: 2)")
    parser.add_argument("--accumulate", type=int, default=4, help="micro-batches of a step (default: 4)")
    parser.add_argument("--steps", type=int, default=50, help="(default: 50)")
    parser.add_argument("--limit", type=float, default=180, help="seconds for each run (default: 180)")
    parser.add_argument("--photos", metavar="FOLDER", help="photographs to make images from (default: noise)")
    parser.add_argument("--documents", type=float, default=0.1, help="share of samples with a document (default: 0.1)")
    parser.add_argument("--workspace", type=Path, metavar="FOLDER", help="models and data, kept (default: a new one)")
    parser.add_argument("--logs", type=Path, metavar="FOLDER", help="keep what each run printed")
    parser.add_argument("--only", default="host,packed,float32", help="which runs, joined by commas (default: all)")
    parser.add_argument("--cpu", action="store_true", help="tiny models on this machine's processor")
    args = parser.parse_args()
    content = json.loads(args.out.read_text()) if args.out.is_file() else {"runs": {}}
    with tempfile.TemporaryDirectory(prefix="training_curves_") as scratch:
        workspace = args.workspace or Path(scratch) / "workspace"
        if not (workspace / "mix.json").is_file():
            train_speed.make_workspace(workspace, args)
        for name in args.only.split(","):
            if content["runs"].get(name, {}).get("exit status") == 0:
                continue
            asked = words(name, args)
            row = {"run": asked, "date": date.today().isoformat(), "versions": versions(sys.executable)[0]}
            row |= train_speed.run(asked, workspace, Path(scratch) / "output", args)
            content["runs"][name] = row
            write_text(args.out, json.dumps(content, indent=1) + "\n")
            losses = losses_of(row)
            last = losses[max(losses)] if losses else None
            print(f"{name}: status {row['exit status']}, {len(losses)} steps, {row['seconds']} s, last loss {last}")
            if row["exit status"]:
                print(row["tail"])
    content |= compare({name: losses_of(row) for name, row in content["runs"].items()})
    for name, found in content["distances"].items():
        print(f"{name} from {HOST}: {found['rms']:.2e} over all steps, {found['rms of the last']:.2e} over the last")
    print(content.get("verdict", "not all runs are there"))
    write_text(args.out, json.dumps(content, indent=1) + "\n")
    if args.plot and content["runs"]:
        plot(content, args.plot)
    return int(content.get("met") is not True)


def words(name: str, args: argparse.Namespace) -> dict[str, str]:
    """A run in the words of ``train_speed.py``."""
    asked = {"name": name, "gpus": str(args.gpus), "deepspeed": args.deepspeed, "batch": str(args.batch)}
    asked |= {"path": PACKED if name == PACKED else HOST, "gradient_accumulation_steps": str(args.accumulate)}
    if name == FLOAT32:
        asked |= {"bf16": "false", "tf32": "false", "attn_implementation": "sdpa"}
    return asked


def losses_of(row: dict) -> dict[int, float]:
    return {int(step): loss for step, loss in row["losses"].items()}


def compare(curves: dict[str, dict[int, float]]) -> dict:
    """The distance of each curve from the host's, step by step and as a root mean square; the verdict, if all ran."""
    host = curves.get(HOST, {})
    found = {}
    for name in (PACKED, FLOAT32):
        steps = sorted(host.keys() & curves.get(name, {}).keys())
        if not steps:
            continue
        apart = [curves[name][step] - host[step] for step in steps]
        found[name] = {
            "by step": {step: round(value, 6) for step, value in zip(steps, apart)},
            "mean": sum(apart) / len(apart),
            "rms": _rms(apart),
            "rms of the last": _rms(apart[-LAST:]),
            "largest": max(map(abs, apart)),
        }
    content: dict = {"distances": found}
    if len(found) == 2:
        kinds = ("rms", "rms of the last")
        met = all(found[PACKED][kind] <= max(found[FLOAT32][kind] / 10, PRINTED) for kind in kinds)
        said = "within" if met else "NOT within"
        content |= {"met": met, "verdict": f"the packed curve is {said} a tenth of the distance that bfloat16 makes"}
    return content


def _rms(values: list[float]) -> float:
    return math.sqrt(sum(value**2 for value in values) / len(values))


def plot(content: dict, file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, 1, figsize=(7, 6), sharex=True)
    looks = {HOST: ("LLaVA-NeXT's own step", "#9aa5b1"), PACKED: ("packed, dealt", "#1a7f5a")}
    looks[FLOAT32] = ("its own step in float32", "#c9803a")
    for name, row in content["runs"].items():
        losses = losses_of(row)
        above.plot(list(losses), list(losses.values()), label=looks[name][0], color=looks[name][1], linewidth=1.2)
    for name, found in content["distances"].items():
        apart = {int(step): value for step, value in found["by step"].items()}
        below.plot(list(apart), list(apart.values()), label=looks[name][0], color=looks[name][1], linewidth=1.2)
    above.set_ylabel("loss")
    below.set_ylabel("loss, less that of LLaVA-NeXT's own step")
    below.set_xlabel("optimizer step")
    for axis in (above, below):
        axis.legend(fontsize=8, frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    os.chdir(REPOSITORY)
    sys.exit(main())
