"""Examine this machine: the host, versions, defects and compat patches, attention backends, the tower, collectives.

Every backend is really run and compared with the eager one; the host is imported in a process of its own. Exit status 0
if all checks pass, 1 if something cannot work; each finding names the command that fixes it.

  llava-packing doctor
  llava-packing doctor --json > machine.json
"""

from __future__ import annotations

import argparse
import json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON object in place of the lines")


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
