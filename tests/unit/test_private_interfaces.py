"""Private interfaces of other packages: only those of the table are used, and each is still there."""

import ast
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from llava_packing_tower.attention import flash_attn_functions
from llava_packing_tower.kernels import matmul_gelu

ROOT = Path(__file__).parents[2] / "llava_packing_tower"
# What a forward, a backward and a conversion go through. Beyond them stand the integration, whose patches name private
# methods of the hosts and of transformers (docs/hosts.md), and the tools.
FOLDERS = ("data", "kernels", "attention", "models", "towers", "multimodal", "checkpoint", "convert", "utils")
# file: the private names that it may use. Each file says for which versions, and what is done without them.
ALLOWED = {
    # By getattr: _init_fn of torch's custom operators, two functions of flash-attn 2.
    "attention/flash_attn_functions.py": set(),
    "kernels/matmul_gelu.py": {"_addmm_activation"},
    "models/runtime/module_state.py": {"_modules", "_parameters", "_forward_hooks"},
    "checkpoint/weights.py": {"_parameters"},
}
OWN = ("self", "cls", "super")
# Hooks that transformers asks a model class to define.
OVERRIDES = {"_init_weights", "_no_split_modules", "_set_gradient_checkpointing"}


def own_names(tree: ast.AST) -> set[str]:
    """Private names that a file defines itself: functions, classes, attributes of its own objects."""
    names = {n.name for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    names |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)}
    names |= {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return names | {
        n.target.id for n in ast.walk(tree) if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)
    }


def private_names(source: str) -> set[str]:
    """Private attributes that a source reads of objects that are not its own, and private names that it imports."""
    tree, found = ast.parse(source), set()
    own = own_names(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and not (isinstance(node.value, ast.Name) and node.value.id in OWN):
            found.add(node.attr)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module != "__future__":
            found |= {alias.name for alias in node.names}
    return {n for n in found if n.startswith("_") and not n.startswith("__")} - own - OVERRIDES


FILES = [f for folder in FOLDERS for f in sorted((ROOT / folder).rglob("*.py"))]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_no_private_interface_outside_of_the_table(file):
    found = private_names(file.read_text(encoding="utf-8"))
    assert found <= ALLOWED.get(file.relative_to(ROOT).as_posix(), set())


def test_private_names_are_seen():
    source = (
        "import torch\nfrom torch._C import _x\nclass A:\n    def f(self):\n        self._a = torch._addmm_activation\n"
    )
    assert private_names(source) == {"_x", "_addmm_activation"}


def test_what_the_table_names_is_still_there():
    module = nn.Linear(2, 2)
    assert all(hasattr(module, name) for name in ALLOWED["models/runtime/module_state.py"])
    assert matmul_gelu.HAS_EPILOGUE, f"torch {torch.__version__} is beyond {matmul_gelu.KNOWN}: try it, and raise KNOWN"


@pytest.mark.parametrize("epilogue, tolerance", [(True, 1e-3), (False, 1e-6)])
def test_linear_gelu(monkeypatch, epilogue, tolerance):
    """Both ways against float64; ragged shapes. On a CPU the first has the exact GELU, which differs by up to 5e-4."""
    monkeypatch.setattr(matmul_gelu, "HAS_EPILOGUE", epilogue)
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*size, generator=generator) for size in ((7, 5), (11, 5), (11,)))
    exact = nn.functional.gelu(nn.functional.linear(x.double(), weight.double(), bias.double()), approximate="tanh")
    assert (matmul_gelu.linear_gelu(x, weight, bias) - exact).abs().max() < tolerance


@pytest.mark.skipif(not hasattr(torch.library, "custom_op"), reason="torch before 2.4 has no custom operators")
def test_the_function_inside_of_a_custom_operator():
    """As flash-attn makes its operators; with other parameters the public function is called."""

    def varlen(
        q: torch.Tensor, cu_seqlens_q: torch.Tensor, max_seqlen_q: int, window_size_left: int, softcap: float
    ) -> torch.Tensor:
        return q * softcap

    def other(q: torch.Tensor, softcap: float) -> torch.Tensor:
        return q * softcap

    made = [torch.library.custom_op(f"llava_packing_test::{f.__name__}", f, mutates_args=()) for f in (varlen, other)]
    names = ("_flash_attn_varlen_forward", "_flash_attn_varlen_backward")
    right = SimpleNamespace(**dict.fromkeys(names, made[0]))
    assert flash_attn_functions.functions(right) == (varlen, varlen)
    assert flash_attn_functions.functions(SimpleNamespace(**dict(zip(names, made)))) == (None, None)
    assert flash_attn_functions.functions(SimpleNamespace()) == (None, None)
