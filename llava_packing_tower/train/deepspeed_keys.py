"""The keys that the installed DeepSpeed reads from its configuration.

DeepSpeed has no list of them: some sections are pydantic models, the others are read key by key, and a key that nobody
reads is ignored silently. So both are read from its source; importing it takes seconds.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

Section = tuple[str, ...]
"""Where a mapping is in the configuration: ``("zero_optimization", "offload_param")``; ``()`` is the whole."""
MODEL = "DeepSpeedConfigModel"
WHOLE = ("param_dict", "_param_dict", "config")
"""What DeepSpeed's ``runtime/config.py`` calls the whole configuration."""
READ_BY_KEY = (
    *("fp16", "bf16", "bfloat16", "optimizer", "scheduler", "activation_checkpointing", "aio", "flops_profiler"),
    *("timers", "data_types", "torch_autocast"),
)
"""Sections without a model whose keys are all read where the section is. The other ones go on to who uses them."""
FORMER = {("aio",): {"thread_count"}}
"""Keys in examples of DeepSpeed's documentation that have no effect in its newer versions."""


@functools.cache
def known_keys() -> dict[Section, frozenset[str]]:
    """The keys of each section that has fixed ones; empty without DeepSpeed, or with one that is laid out otherwise."""
    spec = find_spec("deepspeed")
    package = Path(spec.origin).parent if spec and spec.origin else None
    main = package and package / "runtime" / "config.py"
    if main is None or not main.is_file():
        return {}
    files = [*package.glob("**/*config*.py"), *package.glob("**/constants.py")]
    # Models of DeepSpeed's inference engines have other sections of the same names.
    trees = {file: _parse(file) for file in files if "v2" not in file.parts}
    reader = _Reader(trees)
    reader.read_file(trees[main], WHOLE)
    for node in trees[main].body:
        if isinstance(node, ast.ImportFrom):
            reader.read_imported({alias.name for alias in node.names})
    closed = {s for s in reader.keys if s in reader.models or not s or s in {(name,) for name in READ_BY_KEY}}
    return {s: frozenset(filter(str.isidentifier, reader.keys[s] | FORMER.get(s, set()))) for s in closed}


def _parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


class _Reader:
    """Collects what is read from a mapping: ``d[KEY]``, ``KEY in d``, ``d.get(KEY)``, ``f(d, KEY)``, ``Model(**d)``."""

    def __init__(self, trees: dict[Path, ast.Module]) -> None:
        self.keys: dict[Section, set[str]] = {}
        self.models: set[Section] = set()
        self.definitions: dict[str, list[ast.stmt]] = {}
        self.words: dict[str, set[str]] = {}  # constants by name
        for tree in trees.values():
            for node in tree.body:
                if isinstance(node, ast.FunctionDef | ast.ClassDef):
                    self.definitions.setdefault(node.name, []).append(node)
                elif isinstance(node, ast.Assign) and _text(node.value) is not None:
                    for target in node.targets:
                        self.words.setdefault(getattr(target, "id", ""), set()).add(_text(node.value))
        # Of the file that is read: variables that hold words; variables that hold sections, functions that return them.
        self.local: dict[str, set[str]] = {}
        self.sections: dict[str, set[Section]] = {}

    def read_file(self, tree: ast.AST, whole: tuple[str, ...]) -> None:
        self.local, self.sections = {}, {name: {()} for name in whole}
        for _ in range(3):  # a variable may be named after its first use: functions call each other in any order
            for node in ast.walk(tree):
                self._note_names(node)
        for node in ast.walk(tree):
            self._note_reads(node)

    def read_imported(self, names: set[str]) -> None:
        """Functions and classes that get the whole configuration as their first argument."""
        for name in names:
            for node in self.definitions.get(name, ()):
                function = next((n for n in _functions(node) if n.name in (name, "__init__")), None)
                parameters = [a.arg for a in function.args.args if a.arg != "self"] if function else []
                if parameters:
                    self.read_file(node, (parameters[0],))

    def _sections(self, node: ast.expr | None) -> set[Section]:
        """The sections that an expression may stand for."""
        if isinstance(node, ast.Name | ast.Attribute):
            return self.sections.get(node.id if isinstance(node, ast.Name) else node.attr, set())
        if isinstance(node, ast.IfExp):
            return self._sections(node.body)
        if isinstance(node, ast.DictComp):  # {key: param_dict.get(key) for key in (...)}
            return self._sections(node.value.func.value) if _is_get(node.value) else set()
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "keys":
            return self._sections(node.func.value)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            return self.sections.get(node.func.id, set())
        base, key = _access(node)
        return {(*section, word) for section in self._sections(base) for word in self._words(key)} if base else set()

    def _words(self, node: ast.expr | None) -> set[str]:
        text, name = _text(node), getattr(node, "id", "")
        return {text} if text is not None else self.local.get(name) or self.words.get(name, set())

    def _note_names(self, node: ast.AST) -> None:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            self.sections.setdefault(node.targets[0].id, set()).update(self._sections(node.value))
        elif isinstance(node, ast.FunctionDef):
            for returned in (n for n in ast.walk(node) if isinstance(n, ast.Return)):
                self.sections.setdefault(node.name, set()).update(self._sections(returned.value))
            for parameter, default in zip(reversed(node.args.args), reversed(node.args.defaults)):
                self.local.setdefault(parameter.arg, set()).update(self._words(default))
        elif isinstance(node, ast.comprehension | ast.For) and isinstance(node.iter, ast.Tuple | ast.List):
            for item in node.iter.elts:
                self.local.setdefault(getattr(node.target, "id", ""), set()).update(self._words(item))

    def _note_reads(self, node: ast.AST) -> None:
        base, key = _access(node)
        if isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.In | ast.NotIn):
            base, key = node.comparators[0], node.left
        if isinstance(node, ast.Call):
            for keyword in node.keywords:
                for section in self._sections(keyword.value) if keyword.arg is None else ():
                    self._note_model(getattr(node.func, "id", ""), section)
            if len(node.args) > 1 and base is None:
                base, key = node.args[:2]
        for section in self._sections(base):
            self.keys.setdefault(section, set()).update(self._words(key))

    def _note_model(self, name: str, section: Section) -> None:
        """The fields of a pydantic model, and of those in its fields."""
        for node in self.definitions.get(name, ()):
            if not isinstance(node, ast.ClassDef) or name == MODEL:
                continue
            for base in node.bases:
                self._note_model(getattr(base, "id", ""), section)
            for item in node.body:
                if not isinstance(item, ast.AnnAssign) or not isinstance(item.target, ast.Name):
                    continue
                aliases = {_text(word.value) for word in getattr(item.value, "keywords", ()) if word.arg == "alias"}
                self.models.add(section)
                self.keys.setdefault(section, set()).update({item.target.id} | aliases)
                for word in ast.walk(item.annotation):
                    if isinstance(word, ast.Name) and self._is_model(word.id):
                        self._note_model(word.id, (*section, item.target.id))

    def _is_model(self, name: str) -> bool:
        return any(
            getattr(base, "id", "") == MODEL or self._is_model(getattr(base, "id", ""))
            for node in self.definitions.get(name, ())
            if isinstance(node, ast.ClassDef)
            for base in node.bases
        )


def _functions(node: ast.stmt) -> Iterator[ast.FunctionDef]:
    return (n for n in ast.walk(node) if isinstance(n, ast.FunctionDef))


def _text(node: ast.AST | None) -> str | None:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def _is_get(node: ast.AST | None) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "get"


def _access(node: ast.AST | None) -> tuple[ast.expr | None, ast.expr | None]:
    """Mapping and key of ``d[key]`` or ``d.get(key)``."""
    if isinstance(node, ast.Subscript):
        return node.value, node.slice
    if _is_get(node) and node.args:
        return node.func.value, node.args[0]
    return None, None
