"""LLaVA-NeXT, unedited, against versions of transformers and ways to train: train, save, reload, generate.

  python benchmarks/host_matrix.py --host HEAD=/clones/LLaVA-NeXT --host b42941c=/clones/LLaVA-NeXT-b42941c \
      --interpreter /envs/t440/bin/python --interpreter /envs/t517/bin/python --json matrix.json --markdown matrix.md

Each cell is a real run on the CPU with tiny random models: `llava-packing train` on the unedited clone (one process
without DeepSpeed, or two gloo processes under ZeRO-2 or ZeRO-3), the tower's own folder taken away, then, in a new
process, the host's `load_pretrained_model` and `generate`. A cell passes if
  - the launcher reports the engine that was asked for, every step a finite loss,
  - every tensor of the tower after the reload equals the one in memory when training ended, to the last bit,
  - every tensor in the checkpoint's files equals the loaded one, and nothing is left on meta,
  - `generate` gives the same tokens as a loop without a cache.
Every finished cell is written to --json at once; one that is in there already is not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

from runs import BENCHMARKS, REPOSITORY, CellFailed, git, last_error

from llava_packing_tower.utils.files import write_text

STAGES = {"single": None, "ZeRO-2": 2, "ZeRO-3": 3}
STEPS = 3
DISTRIBUTIONS = ("transformers", "accelerate", "deepspeed", "torch", "tokenizers", "huggingface_hub", "numpy")


def main() -> int:
    args = _arguments()
    hosts = dict(pair.split("=", 1) for pair in args.host)
    cells = json.loads(args.json.read_text()) if args.json.is_file() else {}
    project = git(REPOSITORY, "rev-parse", "--short", "HEAD")
    with tempfile.TemporaryDirectory(prefix="host_matrix_") as scratch:
        workspace = Path(scratch) / "workspace"
        _python(sys.executable, "-c", _MAKE, str(workspace), environment=_environment())
        for python in args.interpreter:
            versions = _versions(python)
            for title, clone in hosts.items():
                commit = git(clone, "rev-parse", "--short", "HEAD")
                for stage in args.stage or STAGES:
                    key = f"{title} | {versions['transformers']} | {stage}"
                    if key in cells and not (args.again and cells[key]["result"] != "pass"):
                        continue
                    cell = {"host": title, "commit": commit, "stage": stage, "versions": versions, "project": project}
                    began = time.monotonic()
                    output = Path(scratch) / "cell"
                    shutil.rmtree(output, ignore_errors=True)
                    try:
                        cell |= run_cell(python, clone, STAGES[stage], workspace, output, args.timeout)
                        cell["result"] = "pass"
                    except CellFailed as failure:
                        cell |= {"result": "FAIL", "reason": str(failure)}
                    if git(clone, "status", "--porcelain", "--untracked-files=no"):
                        cell |= {"result": "FAIL", "reason": "the clone's own files were changed"}
                    cell |= {"seconds": round(time.monotonic() - began), "date": date.today().isoformat()}
                    cells[key] = cell
                    write_text(args.json, json.dumps(cells, indent=1) + "\n")
                    print(f"{key}: {cell['result']} {cell.get('reason', '')} ({cell['seconds']} s)", flush=True)
    table = markdown(cells)
    print(table)
    if args.markdown:
        write_text(args.markdown, table)
    return int(any(cell["result"] != "pass" for cell in cells.values()))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", action="append", required=True, metavar="TITLE=CLONE", help="may be repeated")
    parser.add_argument("--interpreter", action="append", required=True, metavar="PYTHON", help="may be repeated")
    parser.add_argument("--stage", action="append", choices=STAGES, help="may be repeated (default: all)")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="results, read and extended")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="the table")
    parser.add_argument("--again", action="store_true", help="run cells again that did not pass")
    parser.add_argument("--timeout", type=float, default=300, help="seconds for each of the two halves of a cell")
    return parser.parse_args()


_MAKE = "import sys, pathlib, host_matrix_parts as p; p.make_workspace(pathlib.Path(sys.argv[1]))"


# ---------------------------------------------------------------- one cell


def run_cell(python: str, clone: str, stage: int | None, workspace: Path, output: Path, timeout: float) -> dict:
    """Train, reload, compare. Raises :class:`CellFailed`."""
    tower = output / "vit_packing_tiny"
    shutil.copytree(workspace / tower.name, tower)
    checkpoint = output / "llava_qwen_packing"
    words = ["train", str(workspace / "config.yaml"), "--output_dir", str(checkpoint), "--vision_tower", str(tower)]
    words += ["--max_steps", str(STEPS), "--num_processes", "1" if stage is None else "2"]
    words += [] if stage is None else ["--deepspeed", str(REPOSITORY / "configs" / f"zero{stage}.json")]
    environment = _environment(clone)
    log = _python(python, "-m", "llava_packing_tower", *words, environment=environment, timeout=timeout)
    engine = re.search(r"^engine: (\w+)(?:, ZeRO stage (\d+))?, world size (\d+)", log, re.M)
    if engine is None:
        raise CellFailed("the run named no engine")
    ran = (engine[1] == "DeepSpeedEngine", int(engine[2]) if engine[2] else None, int(engine[3]))
    if ran != (stage is not None, stage, 1 if stage is None else 2):
        raise CellFailed(f"not what was asked for: {engine[0]}")
    losses = [float(loss) for loss in re.findall(r"^step +\d+/\d+  loss (\S+)", log, re.M)]
    if len(losses) != STEPS or not all(math.isfinite(loss) and loss > 0 for loss in losses):
        raise CellFailed(f"losses of {STEPS} steps: {losses}")
    patches = re.search(r"^compat patches: (.*)$", log, re.M)[1].split(", ")

    trained = json.loads((checkpoint / "packing_tower.json").read_text())["tensors"]
    shutil.rmtree(tower)
    image = str(workspace / "images" / "3.png")
    reload = str(BENCHMARKS / "host_reload.py")
    shown = _python(python, reload, str(checkpoint), image, environment=environment, timeout=timeout)
    loaded = json.loads(shown.splitlines()[-1])
    differing = [
        name for name in trained.keys() | loaded["tensors"].keys() if trained.get(name) != loaded["tensors"].get(name)
    ]
    if differing:
        raise CellFailed(
            f"{len(differing)} of {len(trained)} tower tensors differ after the reload, e.g. {min(differing)}"
        )
    if loaded["differing"] or loaded["meta"] or not loaded["files"]:
        raise CellFailed(f"{len(loaded['differing'])} of {loaded['files']} tensors are not the checkpoint's")
    if loaded["answer"] != loaded["without cache"]:
        raise CellFailed(f"generate gave {loaded['answer']}, without a cache {loaded['without cache']}")
    return {
        "engine": engine[0].removeprefix("engine: "),
        "losses": losses,
        "tower tensors": len(trained),
        "tensors": loaded["files"],
        "patches": sorted({*patches, *loaded["patches"]}),
    }


def _environment(clone: str | None = None) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(BENCHMARKS)]),
        "LLAVA_NEXT_DIR": clone or "",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def _python(python: str, *words: str, environment: dict[str, str], timeout: float = 300) -> str:
    """Run a Python process; returns its output. Raises :class:`CellFailed` with the error it died of."""
    # A session of its own: a launcher that is out of time takes its ranks along.
    process = subprocess.Popen(
        [python, *words],
        env=environment,
        cwd=REPOSITORY,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        shown, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        process.communicate()
        raise CellFailed(f"not finished after {timeout:.0f} s") from None
    if process.returncode:
        if os.environ.get("HOST_MATRIX_LOG"):
            Path(os.environ["HOST_MATRIX_LOG"]).write_text(shown)
        raise CellFailed(last_error(shown))
    return shown


def _versions(python: str) -> dict[str, str]:
    script = (
        "import json, sys\nfrom importlib.metadata import version\n"
        f"print(json.dumps({{'python': sys.version.split()[0], **{{n: version(n) for n in {DISTRIBUTIONS!r}}}}}))"
    )
    return json.loads(subprocess.run([python, "-c", script], capture_output=True, text=True, check=True).stdout)


# ---------------------------------------------------------------- the table


def markdown(cells: dict[str, dict]) -> str:
    """The cells as a table: one row per host and environment, one column per way to train; failures below."""
    rows: dict[tuple, dict[str, dict]] = {}
    for cell in cells.values():
        v = cell["versions"]
        key = (cell["host"], cell["commit"], v["transformers"], v["accelerate"], v["deepspeed"])
        rows.setdefault(key, {})[cell["stage"]] = cell
    lines = [
        f"| LLaVA-NeXT | transformers | accelerate | DeepSpeed | {' | '.join(STAGES)} | date |",
        "|" + "---|" * (5 + len(STAGES)),
    ]
    failures = []
    for (title, commit, *versions), row in sorted(rows.items(), key=lambda item: (item[0][0], _order(item[0][2]))):
        shown = [row[stage]["result"] if stage in row else "not run" for stage in STAGES]
        days = sorted({cell["date"] for cell in row.values()})
        name = title if title == commit else f"{title} ({commit})"
        lines.append(f"| {' | '.join([name, *versions, *shown, days[-1]])} |")
        for stage, cell in row.items():
            if cell["result"] != "pass":
                failures.append(f"- {name}, transformers {versions[0]}, {stage}: `{cell['reason']}`")
    others = sorted({(c["versions"]["torch"], c["versions"]["python"]) for c in cells.values()})
    lines += ["", "; ".join(f"torch {torch}, Python {python}" for torch, python in others) + ", CPU, gloo."]
    return "\n".join(lines + (["", *failures] if failures else [])) + "\n"


def _order(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))


if __name__ == "__main__":
    sys.exit(main())
