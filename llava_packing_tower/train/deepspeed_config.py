"""The DeepSpeed configuration of a run: where it is found, and what can be said of it without torch or DeepSpeed."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from ..utils.errors import UsageError
from ..utils.files import once, read_json_value, user_path
from ..utils.versions import install_command
from .deepspeed_keys import Section, known_keys

CONFIGS = Path(__file__).parents[1] / "configs"
"""The configurations that the package brings."""
COMMENTS = ("_", "//", "#")
"""How keys begin that are comments to their readers."""


def check_deepspeed(values: dict[str, object], beside: Path) -> int | None:
    """The ZeRO stage that ``deepspeed`` asks for (None: no DeepSpeed).

    ``deepspeed`` may also be a file beside the YAML, or one of those that the package brings; its path is made absolute
    in ``values``.
    """
    config = values.get("deepspeed")
    if config is None:
        return None
    if find_spec("deepspeed") is None:
        raise UsageError(f"deepspeed is requested, but it is not installed: {install_command('deepspeed')}")
    for flag in ("use_cpu", "no_cuda"):
        if values.get(flag):
            raise UsageError(
                f"{flag} silently switches DeepSpeed off. Remove it: without a GPU, the CPU is used anyway"
            )
    if isinstance(config, str):
        shipped = CONFIGS / Path(config).name  # also for configs/zero2.json as an example of ours has it
        file = next((f for f in (user_path(config), beside / config, shipped) if f.is_file()), None)
        if file is None:
            if config and user_path(config).exists():
                raise UsageError(f"deepspeed: {config} is not a regular file")
            known = ", ".join(sorted(f.name for f in CONFIGS.glob("*.json")))
            raise UsageError(
                f"deepspeed: {config} is neither in the current folder nor in {beside}; the package brings {known}"
            )
        values["deepspeed"] = str(file.resolve())
        try:
            config = read_json_value(file, once)
        except ValueError as error:
            raise UsageError(f"deepspeed: {error}") from error
    check_keys(config, values["deepspeed"])
    return zero_stage(config)


def check_keys(config: object, file: object) -> None:
    """Raises :class:`UsageError` for a DeepSpeed configuration that is none, or for a key that DeepSpeed does not read.

    Every value "auto" is transformers' to fill in.
    """
    where = f"deepspeed: {file}" if isinstance(file, str) else "deepspeed"
    if not isinstance(config, dict):
        raise UsageError(f"{where} must be a mapping, got {config!r:.80}")
    zero = config.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise UsageError(f"{where}: zero_optimization must be a mapping, got {zero!r:.80}")
    stage = zero.get("stage", 0)
    if type(stage) is not int or stage not in (0, 1, 2, 3):
        raise UsageError(f"{where}: zero_optimization.stage must be 0, 1, 2 or 3, got {stage!r:.80}")
    _check_section(config, (), where)


def _check_section(values: Mapping[str, object], section: Section, where: str) -> None:
    known = known_keys()
    for key, value in values.items():
        inner = (*section, key)
        if section in known and key not in known[section] and not key.startswith(COMMENTS):
            raise UsageError(f"{where}: {'.'.join(inner)} is unknown; {_instead(key, section, known)}")
        if isinstance(value, dict):
            _check_section(value, inner, where)
        elif inner in known and value is not None:
            raise UsageError(f"{where}: {'.'.join(inner)} must be a mapping, got {value!r}")


def _instead(key: str, section: Section, known: Mapping[Section, frozenset[str]]) -> str:
    """What may have been meant by a key that its section does not have."""
    if near := difflib.get_close_matches(key, known[section], n=1, cutoff=0.75):
        return f"the nearest is {near[0]!r}"
    if others := sorted(".".join(other) or "the top level" for other, keys in known.items() if key in keys):
        return f"it belongs to {' or '.join(others)}"
    closest = difflib.get_close_matches(key, known[section], n=1, cutoff=0)[0]
    return f"DeepSpeed {version('deepspeed')} does not know this key, the nearest is {closest!r}"


def zero_stage(config: Mapping[str, object]) -> int:
    """The ZeRO stage of a DeepSpeed configuration."""
    return int(config.get("zero_optimization", {}).get("stage", 0))
