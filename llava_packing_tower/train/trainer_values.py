"""Values that transformers' trainer refuses on each rank, with a traceback, once torch is loaded. No torch here."""

from __future__ import annotations

import ast
import difflib
import functools
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from ..utils.errors import UsageError

INFINITY = float("inf")
BOUNDS: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("per_device_train_batch_size", "gradient_accumulation_steps", "ddp_timeout"), (1, INFINITY)),
    **dict.fromkeys(("learning_rate", "mm_vision_tower_lr", "mm_projector_lr", "weight_decay"), (0, INFINITY)),
    **dict.fromkeys(("dataloader_num_workers", "warmup_steps", "max_grad_norm", "adam_epsilon"), (0, INFINITY)),
    "seed": (0, 2**32 - 1),
    "warmup_ratio": (0, 1),
}
SHARES = ("adam_beta1", "adam_beta2")
"""At least 0 and below 1."""
NAMES = {
    "optim": ("training_args.py", "OptimizerNames"),
    "lr_scheduler_type": ("trainer_utils.py", "SchedulerType"),
}
"""Where transformers has the class of the names that a key may have."""

NEEDS = {
    "report_to": (("wandb", "wandb"), ("mlflow", "mlflow"), ("comet_ml", "comet_ml"), ("swanlab", "swanlab")),
    "optim": (("8bit", "bitsandbytes"), ("bnb", "bitsandbytes"), ("galore", "galore_torch")),
}
"""By key, words of its value and the packages that they need; transformers' trainer misses those on each rank."""


def check_trainer_values(values: Mapping[str, object]) -> None:
    """Raises :class:`UsageError` that names the key."""
    for name, (least, most) in BOUNDS.items():
        value = values.get(name)
        if isinstance(value, int | float) and not least <= value <= most:
            span = f"at least {least}" if most == INFINITY else f"{least} to {most}"
            raise UsageError(f"{name} must be {span}, got {value}")
    for name in SHARES:
        value = values.get(name)
        if isinstance(value, int | float) and not 0 <= value < 1:
            raise UsageError(f"{name} must be at least 0 and below 1, got {value}")
    if values.get("logging_steps") == 0 and values.get("logging_strategy", "steps") == "steps":
        raise UsageError("logging_steps must be above 0, got 0")
    epochs, steps = values.get("num_train_epochs", 1), values.get("max_steps", -1)
    # None at all is a way to make a LLaVA of its parts.
    if isinstance(epochs, int | float) and epochs < 0 and not (isinstance(steps, int) and steps > 0):
        raise UsageError(f"num_train_epochs must be at least 0, got {epochs}")
    _check_evaluation(values)
    for name in ("dataloader_prefetch_factor", "dataloader_persistent_workers"):
        if values.get(name) and not values.get("dataloader_num_workers"):
            raise UsageError(f"{name}: needs dataloader_num_workers above 0")
    _check_reports(values.get("report_to"))
    for name, needs in NEEDS.items():
        for word, package in needs:
            if word in str(values.get(name) or "") and find_spec(package) is None:
                raise UsageError(f"{name}: {values[name]} needs the package {package}, which is not installed")
    for name, where in NAMES.items():
        value, known = values.get(name), names_of(*where)
        if isinstance(value, str) and known and value not in known:
            nearest = max(known, key=lambda each: difflib.SequenceMatcher(None, value, each).ratio())
            raise UsageError(f"{name}: {value!r} is unknown; the nearest is {nearest!r}, of {', '.join(sorted(known))}")


def _check_reports(given: object) -> None:
    known = keys_of("integrations/integration_utils.py", "INTEGRATION_TO_CALLBACK")
    for name in given if isinstance(given, list | tuple) else [given]:
        if isinstance(name, str) and known and name not in {"", "all", "none", *known}:
            raise UsageError(f"report_to: {name!r} is unknown; known are none, all, {', '.join(sorted(known))}")
        if name == "tensorboard" and not any(map(find_spec, ("tensorboard", "tensorboardX"))):
            raise UsageError("report_to: tensorboard needs the package tensorboard, which is not installed")


def _check_evaluation(values: Mapping[str, object]) -> None:
    """What would ask the trainer for an evaluation: LLaVA gives it no data for one, and it fails when it is due."""
    for name in ("eval_strategy", "evaluation_strategy"):
        if values.get(name) not in (None, "no"):
            raise UsageError(
                f"{name}: LLaVA's train.py has no data to evaluate on, and would fail at the first evaluation; "
                f"`llava-packing eval` evaluates a checkpoint"
            )
    if values.get("eval_on_start"):
        raise UsageError("eval_on_start: LLaVA's train.py has no data to evaluate on")
    if values.get("lr_scheduler_type") == "reduce_lr_on_plateau":
        raise UsageError("lr_scheduler_type: reduce_lr_on_plateau needs evaluations, and LLaVA's train.py has no data")


def check_micro_batches(values: Mapping[str, object], samples: int, ranks: int) -> None:
    """Raises :class:`UsageError` where ``dataloader_drop_last`` drops the whole of so few samples."""
    batch = values.get("per_device_train_batch_size", 8)
    if values.get("dataloader_drop_last") and samples < batch * ranks:
        raise UsageError(
            f"dataloader_drop_last: {samples} samples are fewer than the {batch} x {ranks} of a micro-batch on every "
            f"process (per_device_train_batch_size x processes): nothing would be trained"
        )


@functools.cache
def names_of(file: str, enumeration: str) -> frozenset[str]:
    """The values of an enumeration in a file of the installed transformers, which is read, not imported; none if it is
    not there."""
    for node in _body(file):
        if isinstance(node, ast.ClassDef) and node.name == enumeration:
            values = [each.value for each in node.body if isinstance(each, ast.Assign)]
            return frozenset(v.value for v in values if isinstance(v, ast.Constant) and isinstance(v.value, str))
    return frozenset()


@functools.cache
def keys_of(file: str, variable: str) -> frozenset[str]:
    """The keys of a dictionary in a file of the installed transformers, in the same way."""
    for node in _body(file):
        named = isinstance(node, ast.Assign) and any(getattr(each, "id", None) == variable for each in node.targets)
        if named and isinstance(node.value, ast.Dict):
            return frozenset(key.value for key in node.value.keys if isinstance(key, ast.Constant))
    return frozenset()


def _body(file: str) -> list[ast.stmt]:
    spec = find_spec("transformers")
    folder = next(iter(spec.submodule_search_locations or ()), None) if spec else None
    if folder is None or not (source := Path(folder) / file).is_file():
        return []
    return ast.parse(source.read_text(encoding="utf-8")).body
