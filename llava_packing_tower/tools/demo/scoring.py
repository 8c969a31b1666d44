"""The trained checkpoint, scored by lmms-eval."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from rich.console import Console

from ...checkpoint.folder_hash import identity
from ...eval.preflight import check_installation
from ...eval.runner import Evaluation, run_task
from .report import NEEDED, Check

NAME = "lmms-eval"


def score(checkpoint: Path, output: Path, conversation: str, console: Console) -> Check | None:
    """Run the task `smoke`; passed if at least NEEDED of its answers match exactly. None without lmms-eval."""
    if find_spec("lmms_eval") is None:
        console.print("      left out: lmms-eval is not installed (requirements/eval.txt)", soft_wrap=True)
        return None
    try:
        check_installation()
        arguments = {"pretrained": checkpoint, "weights": identity(checkpoint), "conv_template": conversation}
        result = run_task(Evaluation(arguments, output), "smoke", console)
    except ValueError as error:
        return Check(NAME, False, str(error))
    if result.error is not None:
        return Check(NAME, False, f"smoke failed: {result.error}")
    value = result.metrics["exact_match"][0]
    detail = f"smoke: exact_match {value:.4g} over {result.samples} samples, {NEEDED} needed"
    return Check(NAME, value >= NEEDED, detail)
