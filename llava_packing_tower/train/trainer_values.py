"""Values that transformers' trainer refuses on each rank, with a traceback, once torch is loaded. No torch here."""

from __future__ import annotations

import ast
import difflib
import functools
import json
import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from ..integrations.llava.arguments_table import FAIL_WITH_IMAGES, MICRO_BATCHES
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
    "optim": (
        (r"(?<!torch_)8bit|bnb|paged|^lion|ademamix", "bitsandbytes"),
        (r"torch_\dbit", "torchao"),
        ("schedule_free", "schedulefree"),
        ("grokadamw", "grokadamw"),
        ("stable_adamw", "optimi"),
        ("npu", "torch_npu"),
        ("xla", "torch_xla"),
        ("apex", "apex"),
        ("anyprecision", "torchdistx"),
    ),
}
"""By key, patterns of its value and the packages that they need; transformers' trainer misses those on each rank."""


GIVEN = ("optimizer", "num_warmup_steps", "num_training_steps", "last_epoch")
"""What transformers gives a schedule by itself."""

NO_DATA = "LLaVA's train.py has no data to evaluate on"
IGNORED: dict[str, str] = {
    "resume_from_checkpoint": "LLaVA's train.py does not read it: a run resumes from the last complete checkpoint of "
    "its output_dir",
    "overwrite_output_dir": "LLaVA's train.py does not read it: a run resumes from what its output_dir has. Remove "
    "that, or use another output_dir to start again",
    "load_best_model_at_end": NO_DATA,
    "do_eval": NO_DATA,
    "do_predict": NO_DATA,
    "neftune_noise_alpha": "transformers adds its noise to the embeddings of a batch, and LLaVA looks up those of the "
    "words between images alone: it fails in the first step",
}
"""Arguments of transformers that LLaVA's train.py does not read, or fails with."""


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
    _check_schedule(values)
    for name, reason in IGNORED.items():
        if values.get(name):
            raise UsageError(f"{name}: {reason}")
    _check_dispatching(values)
    for name in ("dataloader_prefetch_factor", "dataloader_persistent_workers"):
        if values.get(name) and not values.get("dataloader_num_workers"):
            raise UsageError(f"{name}: needs dataloader_num_workers above 0")
    if re.search("galore|apollo|lomo", str(optimizer := values.get("optim"))):
        raise UsageError(f"optim: {optimizer} needs the model, and LLaVA's trainer makes its optimizer without it")
    _check_reports(values.get("report_to"))
    for name, needs in NEEDS.items():
        for pattern, package in needs:
            if re.search(pattern, str(values.get(name) or "")) and find_spec(package) is None:
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


def _check_schedule(values: Mapping[str, object]) -> None:
    """The schedule's own arguments, by the signature of its function: transformers makes it after the model."""
    kind, given = values.get("lr_scheduler_type", "linear"), values.get("lr_scheduler_kwargs") or {}
    parameters = schedule_parameters().get(str(kind))
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except ValueError:
            given = None
    if not isinstance(given, Mapping):
        raise UsageError(f"lr_scheduler_kwargs must be a mapping, got {values['lr_scheduler_kwargs']!r:.60}")
    if parameters is None:
        return
    if unknown := [name for name in given if name not in parameters]:
        raise UsageError(
            f"lr_scheduler_kwargs: {kind} has no {unknown[0]!r}, but {', '.join(parameters) or 'nothing to set'}"
        )
    missing = [name for name, needed in parameters.items() if needed and name not in given]
    if "min_lr_rate" in parameters and given.keys().isdisjoint(("min_lr", "min_lr_rate")):
        missing = ["min_lr_rate"]
    if missing:
        raise UsageError(f"lr_scheduler_type: {kind} needs {missing[0]} in lr_scheduler_kwargs")


def _check_dispatching(values: Mapping[str, object]) -> None:
    given = values.get("accelerator_config") or {}
    if isinstance(given, str) and given.startswith("{"):
        try:
            given = json.loads(given)
        except ValueError as error:
            raise UsageError(f"accelerator_config is no JSON: {error}") from error
    own = isinstance(given, Mapping) and given.get("dispatch_batches")
    if own or values.get("dispatch_batches"):  # an argument of its own until transformers 4.45
        raise UsageError(
            "dispatch_batches has one process cut batches for all, and images of several sizes, "
            "which LLaVA keeps in a list, are no batch to cut"
        )


def check_with_images(values: Mapping[str, object]) -> None:
    """Raises :class:`UsageError` for what fails in the first step with an image."""
    for name, reason in FAIL_WITH_IMAGES.items():
        if values.get(name):
            raise UsageError(f"{name}: {reason}")


def check_pairs(values: Mapping[str, object]) -> None:
    """Raises :class:`UsageError` for what only the packed training step keeps: DPO has another one."""
    for name in ("mm_packing_batch_tokens", "mm_packing_loss_average"):
        if (value := values.get(name)) not in (None, MICRO_BATCHES):
            raise UsageError(f"{name} {value} cannot be kept with trainer: dpo, whose batches are trl's own")


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


@functools.cache
def schedule_parameters() -> dict[str, dict[str, bool]]:
    """What ``lr_scheduler_kwargs`` may have for a schedule of the installed transformers, and whether it must: read in
    the same way. A schedule that takes anything is not among them."""
    body = _body("optimization.py")
    functions = {node.name: node.args for node in body if isinstance(node, ast.FunctionDef)}
    found = {}
    kinds = {name.upper(): name for name in names_of("trainer_utils.py", "SchedulerType")}
    for node in body:
        named = isinstance(node, ast.Assign) and any(
            getattr(each, "id", None) == "TYPE_TO_SCHEDULER_FUNCTION" for each in node.targets
        )
        for key, value in zip(node.value.keys, node.value.values) if named else ():
            kind, arguments = kinds.get(key.attr), functions.get(getattr(value, "id", ""))
            if kind is None or arguments is None or arguments.kwarg is not None:
                continue
            needed = len(arguments.args) - len(arguments.defaults)
            own = {argument.arg: n < needed for n, argument in enumerate(arguments.args)}
            found[kind] = {name: must for name, must in own.items() if name not in GIVEN}
    return found


def _body(file: str) -> list[ast.stmt]:
    spec = find_spec("transformers")
    folder = next(iter(spec.submodule_search_locations or ()), None) if spec else None
    if folder is None or not (source := Path(folder) / file).is_file():
        return []
    return ast.parse(source.read_text(encoding="utf-8")).body
