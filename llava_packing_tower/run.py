"""Run any script or module with the packing tower in LLaVA, for example LLaVA's own evaluation scripts.

    python -m llava_packing_tower.run -m llava.eval.model_vqa --model-path ...
    python -m llava_packing_tower.run path/to/script.py ...
    torchrun --nproc_per_node 8 -m llava_packing_tower.run path/to/script.py ...

`llava-packing run -- python -m llava.eval.model_vqa ...` is the same. On a machine without CUDA, `.cuda()` and
`device="cuda"` of tensors and modules mean the CPU: LLaVA's scripts ask for CUDA unconditionally.
"""

from __future__ import annotations

import functools
import runpy
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from .integrations.llava.refused import refused

USAGE = "usage: python -m llava_packing_tower.run (-m MODULE | SCRIPT.py) [ARGUMENTS ...]"


def main(argv: Sequence[str] | None = None) -> None:
    """Apply the hook, then run ``-m MODULE`` or ``SCRIPT.py`` as ``__main__`` with the words after it as ``sys.argv``.

    The train.py of a LLaVA is imported and its ``train()`` called: the hook changes what is imported.

    Exits with status 2 and one line for anything else.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    is_module = words[:1] == ["-m"]
    target = words[is_module : is_module + 1]
    if not target or target[0].startswith("-"):
        _refuse(USAGE)
    if not is_module and not Path(target[0]).is_file():
        _refuse(f"{target[0]}: no such file. {USAGE}")

    if why := refused(target[0]):
        _refuse(f"{target[0]}: {why}")

    # Before the hook, which puts LLAVA_DIR in front of it.
    sys.path[0] = str(Path.cwd() if is_module else Path(target[0]).resolve().parent)

    from .integrations.llava import install

    install.apply()
    without_cuda()
    sys.argv = words[is_module:]
    if (module := train_module(target[0])) is not None:
        sys.argv[0] = str(find_spec(module).origin)
        import_module(module).train()
    elif is_module:
        runpy.run_module(target[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(target[0], run_name="__main__")


def _refuse(what: str) -> NoReturn:
    print(what, file=sys.stderr)
    raise SystemExit(2)


def train_module(target: str) -> str | None:
    """The name of a LLaVA's train.py, given so (``geochat.train.train``) or as a script; None for anything else."""
    from .integrations.llava.registry import all_hosts, find_host

    for host in all_hosts():
        name = host.module(host.train)
        words = Path(*name.split(".")).with_suffix(".py").parts
        if target != name and Path(target).resolve().parts[-len(words) :] != words:
            continue
        try:
            found = find_host(host.package)
        except ValueError:
            continue  # it is not here, or left alone
        file = found.file(host.train)
        if found.host.name == host.name and (target == name or Path(target).resolve() == file.resolve()):
            return name if file.is_file() and "def train(" in file.read_text(encoding="utf-8") else None
    return None


def without_cuda() -> bool:
    """Without CUDA, keep tensors and modules on the CPU when they are sent to a GPU; returns whether this was done."""
    import torch

    if torch.cuda.is_available():
        return False
    print("no CUDA device here: what is sent to one stays on the CPU", file=sys.stderr)

    def stay(self, *args, **kwargs):
        return self

    def here(place: object) -> object:
        named = isinstance(place, str | torch.device) and str(place).partition(":")[0] == "cuda"
        return "cpu" if named else place

    for cls in (torch.Tensor, torch.nn.Module):
        cls.cuda = stay
        cls.to = _redirected(cls.to, here)
    return True


def _redirected(to: Callable, here: Callable[[object], object]) -> Callable:
    @functools.wraps(to)
    def redirected(self, *args, **kwargs):
        return to(self, *map(here, args), **{name: here(value) for name, value in kwargs.items()})

    return redirected


if __name__ == "__main__":
    main()
