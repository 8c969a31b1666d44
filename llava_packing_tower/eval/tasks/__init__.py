"""The tasks that this package brings, one folder each, in lmms-eval's YAML. `--include_path` points here."""

from pathlib import Path

FOLDER = Path(__file__).parent
OWN_TASKS = ("smoke",)
