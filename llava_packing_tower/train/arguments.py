"""The keys of a configuration as arguments of the installed host: names, types, and the words on its command line."""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterable, Mapping

from ..integrations.llava.arguments_table import PLUGIN_ARGUMENTS
from ..integrations.llava.host import Argument, FoundHost, host_arguments
from ..integrations.llava.registry import all_hosts
from ..utils.errors import UsageError

ALIASES = {"mm_vision_tower": "vision_tower"}
# Names that transformers changed: either is taken, whichever of the two the installed version knows.
RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "eval_strategy": "evaluation_strategy",
    "no_cuda": "use_cpu",
    "use_cpu": "no_cuda",
}
REQUIRED = ("model_name_or_path", "vision_tower", "data_path", "output_dir")
LONGEST, LONGEST_NAME, MOST = 4096, 255, 2**63
"""Of a text, of a name in a path, and of a number: what a file system or a command line can hold."""
NAMES_FILES = re.compile(r"path|folder|dir|tower$|adapter|deepspeed")
TRUE, FALSE = ("true", "yes", "1", "y", "t"), ("false", "no", "0", "n", "f")


def known_arguments(found: FoundHost) -> dict[str, Argument]:
    """The host's own arguments and those that the plugin adds where the host lacks them."""
    known = {a.name: Argument(a.name, a.group, a.annotation, repr(a.default)) for a in PLUGIN_ARGUMENTS}
    return {**known, **host_arguments(found)}


def resolve(values: Mapping[str, object], known: Mapping[str, Argument], found: FoundHost) -> dict[str, object]:
    """``values`` under the host's names, nulls left out.

    Raises :class:`UsageError` for a key that the host does not know (with the nearest that it does), a value of the
    wrong type, or a required key that is missing.
    """
    resolved: dict[str, object] = {}
    for key, value in values.items():
        name = _known_name(key, known)
        if name is None:
            others = [host.title for host in all_hosts() if host != found.host and key in host.own_arguments]
            hint = f" ({', '.join(others)} has it)" if others else ""
            raise UsageError(
                f"unknown key {key!r}: {found.host.title} {found.version} has no such argument{hint}; "
                f"the nearest is {nearest(key, known)!r}"
            )
        if name in resolved:
            raise UsageError(f"{key!r} is given twice, also as {name!r}")
        if value is not None:
            resolved[name] = _checked(key, value, known[name])
    for name in REQUIRED:
        if resolved.get(name) in (None, ""):
            raise UsageError(f"{name} is missing")
    return resolved


def _known_name(key: str, known: Mapping[str, Argument]) -> str | None:
    """The name under which the installed versions know a key of the YAML."""
    name = ALIASES.get(key, key)
    if name in known:
        return name
    if name == "warmup_ratio" and "float" in known["warmup_steps"].annotation:
        return "warmup_steps"  # transformers 5: below 1, it is the ratio
    return RENAMED[name] if RENAMED.get(name) in known else None


def nearest(key: str, known: Iterable[str]) -> str:
    """The known key that looks most like ``key``."""
    return max((*known, *ALIASES), key=lambda name: difflib.SequenceMatcher(None, key, name).ratio())


def _checked(key: str, value: object, argument: Argument) -> object:
    kind = argument.annotation.removeprefix("Optional[").removesuffix("]").removesuffix(" | None")
    if isinstance(value, list) and kind in ("bool", "int", "float", "str"):
        raise UsageError(f"{key}: expected one value, got {len(value)}: {value!r:.60}")
    if kind == "str" and isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if isinstance(value, str) and not _is_text(value):
        raise UsageError(f"{key}: expected a text of up to {LONGEST} bytes, got {value!r:.60}")
    if isinstance(value, str) and NAMES_FILES.search(key) and max(map(len, value.split("/"))) > LONGEST_NAME:
        raise UsageError(f"{key}: no file has a name of more than {LONGEST_NAME} letters, got {value!r:.60}")
    if kind in ("bool", "str | bool"):  # transformers reads the second as a bool on a command line
        if str(value).lower() not in TRUE + FALSE:
            raise UsageError(f"{key}: expected true or false, got {value!r}")
        return str(value).lower() in TRUE
    if isinstance(value, bool) and "bool" not in argument.annotation:
        raise UsageError(f"{key}: YAML reads yes, no, on and off as true and false; put the value in quotes")
    if kind in ("int", "float"):
        try:
            number = {"int": int, "float": float}[kind](str(value))
            if abs(number) < MOST or (key == "max_grad_norm" and number > 0):  # where infinity means no limit
                return number
        except (ValueError, OverflowError):
            pass
        raise UsageError(f"{key}: expected {'an integer' if kind == 'int' else 'a number'}, got {value!r:.60}")
    if kind == "str" and not isinstance(value, str):
        if isinstance(value, dict):
            raise UsageError(f"{key}: expected a text, got {value!r:.60}")
        return str(value)
    return value


def _is_text(value: str) -> bool:
    """Whether a text can be a word of a command line: a null byte and half a surrogate pair cannot."""
    try:
        return len(value.encode()) <= LONGEST and "\0" not in value
    except UnicodeEncodeError:
        return False


def expand_paths(values: Mapping[str, object]) -> dict[str, object]:
    """The values with ``~`` replaced in paths, also of each ``packing:`` tower: a shell does so, the host does not."""

    def expanded(value: str) -> str:
        return re.sub(r"(?i)(^|packing:)(~[^/\s]*)", lambda found: found[1] + os.path.expanduser(found[2]), value)

    return {
        name: expanded(value) if isinstance(value, str) and NAMES_FILES.search(name) else value
        for name, value in values.items()
    }


def to_argv(values: Mapping[str, object]) -> list[str]:
    """The values as command-line words for the host's own parser."""
    words: list[str] = []
    for name, value in values.items():
        words.append(f"--{name}")
        if isinstance(value, list | tuple):
            words += map(str, value)
        else:
            words.append(json.dumps(value) if isinstance(value, dict) else str(value))
    return words
