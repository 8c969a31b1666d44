"""The texts that stand in the code, for tests of what the documentation quotes."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "llava_packing_tower"


@functools.cache
def messages() -> list[str]:
    """Every text in the code, with ``...`` for what is filled in."""
    found = []
    for file in PACKAGE.rglob("*.py"):
        found += [template(node) for node in ast.walk(ast.parse(file.read_text("utf-8")))]
    return [text for text in found if text]


def template(node: ast.AST) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"%(\.\d)?[sdrf]", "...", node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(template(part) if isinstance(part, ast.Constant) else "..." for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return template(node.left) + template(node.right)
    return ""
