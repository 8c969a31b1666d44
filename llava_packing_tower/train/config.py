"""Reading a training YAML and ``--key value`` words; nothing of a host is needed here."""

from __future__ import annotations

import os
from collections.abc import Hashable, Sequence

import yaml

from ..utils.errors import UsageError


class _Loader(yaml.SafeLoader):
    """YAML that refuses a key given twice (the first would be ignored silently)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: set[object] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=deep)
            if not isinstance(key, Hashable):
                raise UsageError(f"{self.name}, line {key_node.start_mark.line + 1}: a key must be text, got {key!r}")
            if key in seen:
                raise UsageError(f"{self.name}, line {key_node.start_mark.line + 1}: {key} is given twice")
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_yaml(file: str | os.PathLike) -> dict[str, object]:
    """The mapping in a YAML file. Raises :class:`UsageError` if there is none."""
    if os.path.exists(file) and not os.path.isfile(file):
        raise UsageError(f"{file} is not a regular file")
    try:
        with open(file, encoding="utf-8") as stream:
            content = yaml.load(stream, _Loader)
    except UnicodeDecodeError as error:
        raise UsageError(f"{file} is not UTF-8: {error}") from error
    except OSError as error:
        raise UsageError(f"cannot read {file}: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date of the 99th is a ValueError
        raise UsageError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UsageError(f"{file} must hold `key: value` lines, found {type(content).__name__}")
    return {str(key): value for key, value in content.items()}


def read_overrides(words: Sequence[str]) -> dict[str, object]:
    """``--key value``, ``--key=value``, ``--key a b`` and a bare ``--key`` (true) as a mapping.

    The value ``null`` unsets a key of the YAML, as it does there.
    """
    values: dict[str, object] = {}
    position = 0
    while position < len(words):
        word = words[position]
        if not word.startswith("--"):
            raise UsageError(f"unexpected {word!r}: arguments of the host are written --key value")
        key, equals, value = word[2:].partition("=")
        position += 1
        given = [value] if equals else []
        while not equals and position < len(words) and not words[position].startswith("--"):
            given.append(words[position])
            position += 1
        values[key] = (None if given[0] == "null" else given[0]) if len(given) == 1 else given or True
    return values
