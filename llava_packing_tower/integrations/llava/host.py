"""What a host is: a LLaVA that this package plugs into without editing it."""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path


@dataclass(frozen=True)
class Host:
    """One kind of LLaVA. ``recognises`` looks at files only: nothing of the host is imported to find it."""

    name: str
    title: str
    package: str
    recognises: Callable[[Path], bool]
    install: str
    distribution: str | None = None
    """What its package is called on PyPI, where that is not the package's own name."""
    own_arguments: tuple[str, ...] = ()
    """Arguments of train.py that users know from this host and miss in others; for messages alone."""


@dataclass(frozen=True)
class FoundHost:
    """A host on this machine: its kind, the folder of its package, and its version as it states it itself."""

    host: Host
    root: Path
    version: str

    @property
    def package(self) -> str:
        return self.host.package

    def __str__(self) -> str:
        return f"{self.host.title} {self.version} ({self.root})"


@dataclass(frozen=True)
class Argument:
    """One argument of a dataclass as its source states it: the text of its annotation and of its default."""

    name: str
    group: str
    annotation: str
    default: str


GROUPS = ("ModelArguments", "DataArguments", "TrainingArguments")


def dataclass_arguments(file: Path, name: str) -> dict[str, Argument]:
    """The fields of dataclass ``name`` in a source file, read without running it (milliseconds, no torch).

    Raises ``ValueError`` where the file has no such class.
    """
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            fields = (n for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name))
            return {
                f.target.id: Argument(
                    f.target.id, name, ast.unparse(f.annotation), ast.unparse(f.value) if f.value else ""
                )
                for f in fields
            }
    raise ValueError(f"{file} defines no class {name}")


def host_arguments(found: FoundHost) -> dict[str, Argument]:
    """Every argument of the host's own three dataclasses, those of ``transformers.TrainingArguments`` included."""
    train = found.root / "train" / "train.py"
    arguments: dict[str, Argument] = {}
    base = find_spec("transformers")
    if base is None or not base.submodule_search_locations:
        raise ValueError("transformers is not installed")
    arguments.update(
        dataclass_arguments(Path(base.submodule_search_locations[0]) / "training_args.py", "TrainingArguments")
    )
    for group in GROUPS:
        arguments.update(dataclass_arguments(train, group))
    return arguments
