"""LLaVA's forks, unedited: what of the hook attaches to each.

  python benchmarks/forks.py --fork GeoChat=/clones/GeoChat --fork VILA=/clones/VILA --json forks.json
  python benchmarks/forks.py --fork OneVision-Encoder=/clones/OneVision-Encoder --interpreter /envs/t457/bin/python ...

Each fork is tried in a process of its own (benchmarks/fork_checks.py, which says what is tried). Results are added to
those in the JSON file, so that forks that need other versions of transformers can be tried one after the other.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

from runs import BENCHMARKS, REPOSITORY, git

from llava_packing_tower.utils.files import write_text

PARTS = ("builder", "native resolution", "text-only batches", "packed decoder", "training step", "reload", "training")
LONGEST = 60


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fork", action="append", required=True, metavar="TITLE=CLONE", help="may be repeated")
    parser.add_argument("--interpreter", default=sys.executable, help="the Python to try them with")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="results, read and extended")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="the table")
    parser.add_argument("--timeout", type=float, default=300, help="seconds for each fork")
    args = parser.parse_args()
    results = json.loads(args.json.read_text()) if args.json.is_file() else {}
    project = git(REPOSITORY, "rev-parse", "--short", "HEAD")
    for title, clone in (pair.split("=", 1) for pair in args.fork):
        commit = git(clone, "log", "-1", "--format=%h %cs")
        entry = {"commit": commit, "project": project, "date": date.today().isoformat()}
        entry["transformers"] = version(args.interpreter)
        entry |= check(args.interpreter, clone, args.timeout)
        results[title] = entry
        write_text(args.json, json.dumps(results, indent=1) + "\n")
        print(f"{title}: {entry}", flush=True)
    if args.markdown:
        write_text(args.markdown, markdown(results))
    print(markdown(results))
    return int(any("failed" in entry for entry in results.values()))


def check(python: str, clone: str, timeout: float) -> dict:
    """The report of one fork; ``failed`` with the last line of what it said where there is none."""
    environment = {name: value for name, value in os.environ.items() if name not in ("LLAVA_DIR", "LLAVA_NEXT_DIR")}
    environment |= {"PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"PYTHONDONTWRITEBYTECODE": "1"}
    with tempfile.TemporaryDirectory(prefix="forks_") as folder:
        words = [python, str(BENCHMARKS / "fork_checks.py"), folder, clone]
        try:
            ran = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=timeout)
        except subprocess.TimeoutExpired:
            return {"failed": f"not finished after {timeout:.0f} s"}
    lines = ran.stdout.strip().splitlines()
    if ran.returncode or not lines or not lines[-1].startswith("{"):
        return {"failed": (ran.stderr.strip().splitlines() or lines or ["no output"])[-1][:300]}
    return json.loads(lines[-1])


def version(python: str) -> str:
    code = "import importlib.metadata as m; print(m.version('transformers'))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def markdown(results: dict[str, dict]) -> str:
    """One row for each fork; notes below for what is off, and for what was replaced by empty packages."""
    lines = [f"| fork | commit | transformers | class | {' | '.join(PARTS)} |", "|" + "---|" * (4 + len(PARTS))]
    notes = []
    for title, entry in sorted(results.items()):
        cells = [title, entry["commit"], entry["transformers"], entry.get("class", "-")]
        if "builder" not in entry:
            cells += ["left alone" if "left alone" in entry else "failed"] + ["-"] * (len(PARTS) - 1)
            notes.append(f"- {title}: {entry.get('reason') or entry.get('failed')}")
        else:
            for part in PARTS:
                value = entry.get(part, "-")
                if isinstance(value, dict):
                    value = "none" if "none" in value else "yes"
                word, _, why = str(value).partition(": ")
                cells.append(word if len(word) < LONGEST else "failed")
                if why:
                    notes.append(f"- {title}, {part}: {why}")
        lines.append(f"| {' | '.join(cells)} |")
        if stubs := entry.get("stubs") or (entry.get("left alone") or {}).get("stubs"):
            notes.append(f"- {title}: not installed, and empty here: {', '.join(stubs)}")
    return "\n".join([*lines, "", *notes]) + "\n"


if __name__ == "__main__":
    sys.exit(main())
