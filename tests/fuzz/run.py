"""Damage the files that a user gives, and see that every reader ends in its content or in one line that names the file.

    python tests/fuzz/run.py --seconds 60
    python tests/fuzz/run.py --mutations 20000 --seed 7

Inputs that found something are written to --keep (default: tests/fuzz/inputs/READER), where tests/unit/test_fuzz.py
reads them from then on. The exit status is 1 if there are findings.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
import random
import resource
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path[:0] = [str(Path(__file__).parents[1] / "helpers")]

from fuzz_readers import READERS, Finding, check, prepare  # noqa: E402
from mutations import mutate  # noqa: E402

INPUTS = Path(__file__).parent / "inputs"
GB = 1 << 30


def resident() -> int:
    """The largest resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after this time")
    parser.add_argument("--mutations", type=int, default=sys.maxsize, help="stop after this many mutations")
    parser.add_argument("--seed", type=int, default=None, help="(default: the time)")
    parser.add_argument("--readers", nargs="+", default=list(READERS), choices=READERS, metavar="READER")
    parser.add_argument("--keep", type=Path, default=INPUTS, help="where inputs that found something go")
    args = parser.parse_args()
    seed = int(time.time()) if args.seed is None else args.seed
    rng = random.Random(seed)
    sys.stdout.reconfigure(errors="backslashreplace")
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    counts: Counter[str] = Counter()
    found: set[tuple[str, str]] = set()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        good = {name: prepare(name, Path(scratch) / name) for name in args.readers}
        # An allocation beyond this fails at once, in place of bringing the machine down.
        limit = resident() + 16 * GB
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        most, number, growth = resident(), 0, 0
        while number < args.mutations and time.monotonic() - start < args.seconds:
            name = args.readers[number % len(args.readers)]
            number += 1
            content = mutate(good[name], rng)
            try:
                refused = check(name, Path(scratch) / name, content)
                if resident() - most > GB:
                    raise Finding(f"took {(resident() - most) / GB:.1f} GB")
                counts["accepted" if refused is None else "refused"] += 1
            except Finding as finding:
                counts["findings"] += 1
                kind = (name, str(finding).replace(scratch, "")[:70])
                if kind not in found:
                    found.add(kind)
                    file = args.keep / name / hashlib.sha256(content).hexdigest()[:12]
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_bytes(content)
                    print(f"{name}: {finding}\n  {file}", flush=True)
            growth = max(growth, resident() - most)
            most = max(most, resident())
    took = time.monotonic() - start
    came = ", ".join(f"{counts[what]} {what}" for what in ("accepted", "refused", "findings"))
    memory = f"{most / GB:.2f} GB, at most {growth / GB:.2f} GB for one file"
    print(f"seed {seed}: {number} mutations of {len(args.readers)} readers in {took:.0f} s: {came}; {memory}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
