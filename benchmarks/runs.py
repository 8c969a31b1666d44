"""What the benchmarks that start LLaVA in other processes share: paths, environment, versions, why a run failed."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parent
REPOSITORY = BENCHMARKS.parent
CONFIGS = REPOSITORY / "configs"
DISTRIBUTIONS = ("transformers", "accelerate", "deepspeed", "torch", "peft", "tokenizers", "huggingface_hub", "numpy")


class CellFailed(Exception):
    """Why a cell is not a pass, in one line."""


def environment() -> dict[str, str]:
    """That of this process, with the package and the benchmarks importable, and nothing asked of the hub."""
    path = [str(REPOSITORY), str(BENCHMARKS), *filter(None, [os.environ.get("PYTHONPATH")])]
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONDONTWRITEBYTECODE": "1"}
    return {"OMP_NUM_THREADS": "1", **os.environ, **quiet, "PYTHONPATH": os.pathsep.join(path)}


def versions(python: str) -> tuple[dict[str, str], str]:
    """Versions of the libraries that an interpreter has, and the LLaVA that it finds."""
    script = (
        "import json, sys\nfrom llava_packing_tower.utils.versions import installed\n"
        "from llava_packing_tower.integrations.llava.registry import find_host\n"
        f"found = find_host()\nversions = {{n: installed(n) for n in {DISTRIBUTIONS!r}}}\n"
        "print(json.dumps([{'python': sys.version.split()[0], **versions}, f'{found.host.title} {found.version}']))"
    )
    shown = subprocess.run([python, "-c", script], capture_output=True, text=True, check=True, env=environment())
    return tuple(json.loads(shown.stdout.splitlines()[-1]))


def git(folder: str | Path, *words: str) -> str:
    """What git prints in a clone, without the end of the line."""
    return subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=True).stdout.strip()


def last_error(log: str) -> str:
    """The line that tells why a run ended, of at most 300 characters: its own last error before torchrun's about it."""
    errors = re.findall(r"^(?:\[rank\d+\]: *)?(\w[\w.]*(?:Error|Exception|Interrupt)\b.*)$", log, re.M)
    own = [error for error in errors if not error.startswith("torch.distributed.elastic")]
    return (own or log.strip().splitlines() or ["no output"])[-1][:300]
