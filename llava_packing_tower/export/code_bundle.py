"""The code of an exported model as flat files beside its weights, for ``trust_remote_code`` without this package.

The modules that the four Auto classes need are found from their imports and copied, each into one file; relative
imports are written anew. Triton's kernels stay out (blocks run eager without them). Packages that are imported inside
of functions are imported by name there, so that transformers does not ask for them.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from .content import CLASSES

PREFIX = "llava_packing_"
ROOT = Path(__file__).parents[1]
PACKAGE = ROOT.name
ENTRIES = tuple(dict.fromkeys(f"hf.{place.partition(':')[0]}" for place in CLASSES.values()))
LEFT_OUT = ("kernels.triton",)
NEEDED = ("torch", "transformers", "numpy", "PIL", "einops", "safetensors", "huggingface_hub")
"""Packages of which every user of an export with code must have an installation; einops is not one of transformers'."""
# Modules that are imported by a name that is made at run time -> what makes it, here and in flat files.
DYNAMIC = {
    "attention.dispatch": (
        'import_module(f".{BACKENDS[name]}", __package__)',
        f'import_module(f".{PREFIX}attention_{{BACKENDS[name]}}", __package__)',
    ),
    "models.registry": (
        "import_module(module, __package__)",
        f"import_module(f\".{PREFIX}models{{module.replace('.', '_')}}\", __package__)",
    ),
}


def write_code(folder: Path, family: type) -> None:
    """Write the files. family: the class of the tower. Raises ``ValueError`` for a family of another package.

    All families of this package are in it: transformers reads the config of a second such folder by the first's code.
    """
    tower = family.__module__
    if not tower.startswith(f"{PACKAGE}."):
        raise ValueError(
            f"the tower {family.__name__} is of the package {tower.partition('.')[0]}: leave out --with_code"
        )
    from ..attention.dispatch import BACKENDS
    from ..models.registry import CLASSES

    families = [f"models{target.partition(':')[0]}" for target in CLASSES]
    dynamic = [*families, *(f"attention.{module}" for module in BACKENDS.values())]
    modules = closure([*ENTRIES, *dynamic])
    for module in modules:
        text = flattened(module)
        if module in ENTRIES:
            text += _files(sorted(set(modules) - {module}))
        (folder / f"{flat_name(module)}.py").write_text(text, encoding="utf-8")


def flat_name(module: str) -> str:
    return PREFIX + module.replace(".", "_")


def _files(modules: list[str]) -> str:
    """transformers copies the files that a file imports itself, wherever it does."""
    lines = "\n".join(f"    from .{flat_name(module)} import __name__ as _" for module in modules)
    return f"\n\ndef _files() -> None:  # never called: so that all files are found\n{lines}\n"


def closure(modules: list[str]) -> list[str]:
    """These modules of the package and all that they import, by their names below it."""
    found: set[str] = set()
    waiting = list(modules)
    while waiting:
        module = waiting.pop()
        if module in found or module in LEFT_OUT:
            continue
        found.add(module)
        for node in ast.walk(ast.parse(source(module))):
            if isinstance(node, ast.ImportFrom) and node.level:
                waiting += [target for target, _ in targets(module, node)]
    return sorted(found)


def source(module: str) -> str:
    return _file(module).read_text(encoding="utf-8")


def _file(module: str) -> Path:
    path = ROOT.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def targets(module: str, node: ast.ImportFrom) -> Iterator[tuple[str, ast.alias | None]]:
    """The modules that a relative import names: each with None if names are taken from it, or with the name that it
    has as a whole."""
    parts = module.split(".")
    parts = parts if _file(module).name == "__init__.py" else parts[:-1]
    parts = parts[: len(parts) - (node.level - 1)] if node.level > 1 else parts
    base = ".".join([*parts, *([node.module] if node.module else [])])
    for alias in node.names:
        whole = f"{base}.{alias.name}".lstrip(".")
        path = ROOT.joinpath(*whole.split("."))
        if path.is_dir() or path.with_suffix(".py").is_file():
            yield whole, alias
        else:
            yield base, None


def flattened(module: str) -> str:
    """The source of a module for a folder in which all modules are files beside each other."""
    text = source(module)
    lines = text.splitlines()
    for node in sorted(ast.walk(ast.parse(text)), key=lambda n: -getattr(n, "lineno", 0)):
        if isinstance(node, ast.ImportFrom) and node.level:
            new = _relative(module, node)
        elif isinstance(node, ast.Import | ast.ImportFrom) and node.col_offset and _package(node) not in _known():
            new = _by_name(node)
        else:
            continue
        indent = " " * node.col_offset
        lines[node.lineno - 1 : node.end_lineno] = [indent + line for line in new]
    text = "\n".join(lines) + "\n"
    if module in DYNAMIC:
        old, new_text = DYNAMIC[module]
        if text.count(old) != 1:
            raise AssertionError(f"{module} has not one {old}")
        text = text.replace(old, new_text)
    return text


def _relative(module: str, node: ast.ImportFrom) -> list[str]:
    new: list[str] = []
    for target, alias in targets(module, node):
        if alias is not None:
            name = flat_name(target) if target not in LEFT_OUT else f"{PREFIX}left_out"
            new.append(f"from . import {name} as {alias.asname or alias.name}")
    taken = [alias for alias, (_, whole) in zip(node.names, targets(module, node)) if whole is None]
    if taken:
        base = next(target for target, whole in targets(module, node) if whole is None)
        new.append(f"from .{flat_name(base)} import {', '.join(ast.unparse(alias) for alias in taken)}")
    return new


def _package(node: ast.Import | ast.ImportFrom) -> str:
    return (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name).partition(".")[0]


def _known() -> set[str]:
    import sys

    return {*NEEDED, *sys.stdlib_module_names}


def _by_name(node: ast.Import | ast.ImportFrom) -> list[str]:
    """An optional package, imported inside of a function."""
    load = '__import__("importlib").import_module'
    if isinstance(node, ast.ImportFrom):
        return [f'{a.asname or a.name} = {load}("{node.module}").{a.name}' for a in node.names]
    return [
        f'{a.asname or a.name.partition(".")[0]} = {load}("{a.name if a.asname else a.name.partition(".")[0]}")'
        for a in node.names
    ]
