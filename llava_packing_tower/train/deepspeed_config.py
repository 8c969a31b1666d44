"""The DeepSpeed configuration of a run: where it is found, and what can be said of it without torch or DeepSpeed."""

from __future__ import annotations

import ast
import difflib
import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from ..utils.errors import UsageError
from ..utils.versions import install_command

CONFIGS = Path(__file__).parents[1] / "configs"
"""The configurations that the package brings."""


def check_deepspeed(values: dict[str, object], beside: Path) -> int | None:
    """The ZeRO stage that ``deepspeed`` asks for (None: no DeepSpeed).

    ``deepspeed`` may also be a file beside the YAML, or one of those that the package brings; its path is made absolute
    in ``values``.
    """
    config = values.get("deepspeed")
    if config is None:
        return None
    if find_spec("deepspeed") is None:
        raise UsageError(f"deepspeed is asked for, but it is not installed: {install_command('deepspeed')}")
    for flag in ("use_cpu", "no_cuda"):
        if values.get(flag):
            raise UsageError(
                f"{flag} silently switches DeepSpeed off. Leave it out: where there is no GPU, the CPU is used anyway"
            )
    if isinstance(config, str):
        shipped = CONFIGS / Path(config).name  # also for configs/zero2.json as an example of ours has it
        file = next((f for f in (Path(config).expanduser(), beside / config, shipped) if f.is_file()), None)
        if file is None:
            known = ", ".join(sorted(f.name for f in CONFIGS.glob("*.json")))
            raise UsageError(
                f"deepspeed: {config} is neither in the current folder nor in {beside}; the package brings {known}"
            )
        values["deepspeed"] = str(file.resolve())
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UsageError(f"deepspeed: {file} is not valid JSON: {error}") from error
    check_zero_keys(config, values["deepspeed"])
    return zero_stage(config)


def check_zero_keys(config: object, file: object) -> None:
    """Raises :class:`UsageError` for a DeepSpeed configuration that is none, or whose ZeRO keys DeepSpeed refuses.

    Every value "auto" is transformers' to fill in. DeepSpeed checks no keys outside of its sections.
    """
    where = f"deepspeed: {file}" if isinstance(file, str) else "deepspeed"
    zero = config.get("zero_optimization", {}) if isinstance(config, dict) else None
    if not isinstance(zero, dict):
        raise UsageError(f"{where} must be a mapping, and zero_optimization in it too")
    stage = zero.get("stage", 0)
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        raise UsageError(f"{where}: zero_optimization.stage must be 0, 1, 2 or 3, got {stage!r}")
    fields = _zero_fields()
    for key in zero:
        if fields and key not in fields:
            nearest = difflib.get_close_matches(key, fields, n=1, cutoff=0)[0]
            raise UsageError(f"{where}: zero_optimization.{key} is unknown; the nearest is {nearest!r}")


def _zero_fields() -> set[str]:
    """The keys of ``zero_optimization`` that the installed DeepSpeed has, read from its source: importing it takes
    seconds. Empty where its source is laid out otherwise."""
    spec = find_spec("deepspeed")
    file = Path(spec.origin).parent / "runtime" / "zero" / "config.py" if spec and spec.origin else None
    if file is None or not file.is_file():
        return set()
    fields: set[str] = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.name == "DeepSpeedZeroConfig":
            for item in node.body:
                if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                    fields.add(item.target.id)
                    fields |= {
                        word.value.value
                        for word in getattr(item.value, "keywords", ())
                        if word.arg == "alias" and isinstance(word.value, ast.Constant)
                    }
    return fields


def zero_stage(config: Mapping[str, object]) -> int:
    """The ZeRO stage of a DeepSpeed configuration."""
    return int(config.get("zero_optimization", {}).get("stage", 0))
