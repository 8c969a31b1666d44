"""Examine this machine: the host, versions, defects and compat patches, attention backends, the tower, collectives.

Every backend is run and compared with the eager one. The host is imported in a separate process. Each finding names a
command that fixes it. The exit status is 0 if nothing is broken, and 1 if something cannot work.

  llava-packing doctor
  llava-packing doctor --json > machine.json
"""

from __future__ import annotations

import argparse
import json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")


def run(args: argparse.Namespace) -> int:
    from ..tools.doctor.run import examine

    report = examine() if args.json else examine(lambda line: print(line, flush=True))
    if args.json:
        print(json.dumps(report, indent=1))
        return int(not report["ok"])
    for finding in report["findings"]:
        print(f"\n{finding['level'].upper()} {finding['topic']}: {finding['text']}")
        if finding["command"]:
            print(f"  Fix: {finding['command']}")
    print("\nAll checks passed" if report["ok"] else "\nSome checks failed")
    return int(not report["ok"])
