"""What an evaluation needs, checked before anything is loaded."""

from __future__ import annotations

import os
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

from ..hf import MODEL_TYPE
from ..integrations.llava.registry import find_host
from ..towers.names import FUSED, PACKING, tower_kind
from ..towers.saved_tower import saved_in
from ..utils.files import CONFIG_NAME, read_json
from ..utils.versions import Run, filelock, impossible, installed, unmet
from . import MODEL
from . import __name__ as package

PINNED = "lmms-eval==0.7.3"
INSTALL = f"pip install --no-deps {PINNED}"
# What lmms-eval's command and tasks import; some of it only after the whole run.
MODULES = {
    "datasets": "datasets",
    "evaluate": "evaluate",
    "loguru": "loguru",
    "pytablewriter": "pytablewriter",
    "sacrebleu": "sacrebleu",
    "portalocker": "portalocker",
    "lxml": "lxml",
    "pytz": "pytz",
    "tenacity": "tenacity",
    "accelerate": "accelerate",
    "pandas": "pandas",
}


def check_installation(host: bool = True) -> None:
    """Raises ``ValueError``, with the commands that fix it, where lmms-eval and the host cannot run together here.

    host: whether a LLaVA is needed; exports do without.
    """
    if find_spec("lmms_eval") is None:
        raise ValueError(
            f"lmms-eval is not installed:\n  {INSTALL}\n  pip install {' '.join(MODULES.values())}\n"
            f"(or, in a clone of this repository: pip install datasets; pip install --no-deps -r requirements/eval.txt)"
        )
    problems = []
    missing = [name for module, name in MODULES.items() if find_spec(module) is None]
    if missing:
        problems.append(f"packages that lmms-eval imports are missing:\n  pip install {' '.join(missing)}")
    for need, found in unmet("lmms-eval"):
        if need.startswith("transformers"):
            problems.append(
                f"lmms-eval {installed('lmms-eval')} needs {need}, and {found} is installed:\n  pip install '{need}'"
            )
    problems += map(str, [*filelock(), *impossible(Run())])
    if problems:
        raise ValueError("\n".join(problems))
    if host:
        find_host()


def plugin_environment() -> dict[str, str]:
    """The variables that make lmms-eval find the model; none where it finds the installed package by entry points."""
    known = any(entry.name == MODEL for entry in entry_points(group="lmms_eval.models"))
    if known and find_spec("lmms_eval.models.registry_v2") is not None:
        return {}
    others = [name for name in os.environ.get("LMMS_EVAL_PLUGINS", "").split(",") if name and name != package]
    return {"LMMS_EVAL_PLUGINS": ",".join([*others, package])}


def check_checkpoint(checkpoint: Path, base: Path | None) -> None:
    """Raises ``ValueError`` for anything but a LLaVA checkpoint with a packing tower and its weights, or an export."""
    from ..integrations.llava.checkpoint_files import names_in_files
    from ..integrations.llava.model_class import check_host_has, class_name
    from .hf_inference import check_export

    if not (checkpoint / CONFIG_NAME).is_file():
        raise ValueError(f"{checkpoint} is not a checkpoint: it has no {CONFIG_NAME}")
    config = read_json(checkpoint / CONFIG_NAME)
    if config.get("model_type") == MODEL_TYPE:
        check_export(checkpoint)
        return
    found = find_host()
    key = found.host.tower_settings[0]
    tower = str(config.get(key) or "")
    if tower_kind(tower, config.get("mm_packing_config")) not in (PACKING, FUSED):
        raise ValueError(
            f"{checkpoint} has no packing tower: {key} in its {CONFIG_NAME} is {tower!r}. Use lmms-eval's own "
            f"models llava or llava_onevision"
        )
    check_host_has(found, class_name(config, found.host), checkpoint)
    in_checkpoint = saved_in(checkpoint / CONFIG_NAME, config).get("weights") == "checkpoint"
    if in_checkpoint and not any("vision_tower." in name for name in names_in_files(checkpoint, base)):
        raise ValueError(
            f"{checkpoint} should contain the weights of its vision tower, but none of its files has a "
            f"vision_tower tensor: an evaluation would use random weights"
        )
