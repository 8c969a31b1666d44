"""Imports point one way: a layer imports itself and the layers below it, never one above."""

import ast
from pathlib import Path

import pytest

PACKAGE = "llava_packing_tower"
ROOT = Path(__file__).parents[2] / PACKAGE
# From the bottom up. Layers in one line do not import each other.
LAYERS = (
    ("utils",),
    ("data",),
    ("attention", "kernels"),
    ("checkpoint",),
    ("models",),
    ("multimodal", "towers"),
    ("hf",),
    ("integrations",),
    ("convert", "eval", "export", "train"),
    ("tools",),
    ("cli",),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
# Loose modules: the package's own entry points, which may import anything.
ENTRY_POINTS = {"__init__", "__main__", "_renamed", "run"}


def imports(file: Path):
    """(line, absolute module) of each import of the package in a file, also inside of functions."""
    module = [PACKAGE, *file.relative_to(ROOT).with_suffix("").parts]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = module[: len(module) - node.level] if node.level else []
            full = ".".join([*base, *filter(None, [node.module])])
            # `from .. import x`: x is a module where there is such a file
            yield from ((node.lineno, f"{full}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)


def upward(file: Path):
    own = file.relative_to(ROOT).parts[0]
    for line, name in imports(file):
        parts = name.split(".")
        if parts[0] != PACKAGE or len(parts) < 3 or parts[1] == own:
            continue
        if parts[1] in LEVEL and LEVEL[parts[1]] >= LEVEL[own]:
            yield f"{file.relative_to(ROOT)}:{line} imports {name}"


def test_no_import_runs_upwards():
    files = [f for f in sorted(ROOT.rglob("*.py")) if f.relative_to(ROOT).parts[0] in LEVEL]
    assert len(files) > 100
    assert [found for file in files for found in upward(file)] == []


def test_every_folder_has_its_layer_and_no_module_is_loose():
    loose = {f.stem for f in ROOT.glob("*.py")} - ENTRY_POINTS
    assert loose == set()
    folders = {f.name for f in ROOT.iterdir() if f.is_dir() and f.name != "__pycache__"}
    assert folders == set(LEVEL) | {"configs", "train_scripts"} & folders


@pytest.mark.parametrize("level", range(1, len(LAYERS)))
def test_an_upward_import_is_seen(level, tmp_path, monkeypatch):
    folder = tmp_path / PACKAGE / LAYERS[level - 1][0]
    folder.mkdir(parents=True)
    (folder / "x.py").write_text(f"def f():\n    from ..{LAYERS[level][0]}.y import z\n")
    monkeypatch.setitem(globals(), "ROOT", tmp_path / PACKAGE)
    assert len(list(upward(folder / "x.py"))) == 1
