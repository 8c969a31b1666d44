"""Compat patches of LLaVA-NeXT's ``train_dpo``."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from ....data.samples import load_samples
from ..methods import Call, add_step
from ..patcher import Patches
from . import compat_patch
from .trainer import _source


def load(path: str) -> list[dict]:
    """The samples of a JSON or JSON-lines file."""
    return load_samples(Path(path))


def no_video_reader(*args: object, **kwargs: object) -> object:
    raise ImportError("decord is not installed: this training reads no videos without it")


STAND_INS: dict[str, dict[str, object]] = {
    "data_processing": {"__path__": []},
    "data_processing.utils": {"load_json": load, "load_jsonl": load},
    "decord": {"VideoReader": no_video_reader, "cpu": no_video_reader},
}


def _missing(train: ModuleType) -> list[str]:
    """Modules of STAND_INS that a file imports and that are not there."""
    tree = ast.parse(Path(str(train.__file__)).read_text(encoding="utf-8"))
    asked = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    tops = {name.split(".")[0] for name in asked if name in STAND_INS and name.split(".")[0] not in sys.modules}
    lacking = {top for top in tops if find_spec(top) is None}
    return [name for name in STAND_INS if name.split(".")[0] in lacking]


@compat_patch(
    module="{train}",
    reason="train_dpo imports data_processing, which its repository does not have, and decord, which only videos need",
    defect=lambda train: train.__name__.endswith("train_dpo") and bool(_missing(train)),
    before=True,
)
def dpo_imports(train: ModuleType, patches: Patches) -> None:
    for name in _missing(train):
        module = ModuleType(name)
        vars(module).update(STAND_INS[name])
        patches.set_item(sys.modules, name, module)


@compat_patch(
    module="{train}",
    reason="train_dpo looks for 'zero3' in the name of DeepSpeed's configuration, and fails where there is none; "
    "whether ZeRO-3 is used decides instead",
    defect=lambda train: '"zero3" in training_args.deepspeed' in _source(getattr(train, "get_model", None)),
)
def without_deepspeed(train: ModuleType, patches: Patches) -> None:
    from ....checkpoint.weights import zero3_enabled

    def named(call: Call) -> Iterator[None]:
        arguments = call.arguments["training_args"]
        kept = arguments.deepspeed
        arguments.deepspeed = "zero3" if zero3_enabled() else ""
        try:
            yield
        finally:
            arguments.deepspeed = kept

    add_step(train, "train.get_model", "without_deepspeed", named, patches)


@compat_patch(
    module="{train}",
    reason="train_dpo has no argument add_faster_video, which LLaVA-NeXT's models ask for; it is false",
    defect=lambda train: train.__name__.endswith("train_dpo") and not hasattr(train.ModelArguments, "add_faster_video"),
)
def dpo_arguments(train: ModuleType, patches: Patches) -> None:
    patches.set(train.ModelArguments, "add_faster_video", False)
