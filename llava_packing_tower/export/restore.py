"""`llava-packing import`: an export back to a LLaVA checkpoint, complete or absent."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.weights import WeightFiles, check_finite
from ..hf import INFO, MODEL_TYPE, ORIGIN
from ..utils.files import CONFIG_NAME, atomic_folder, check_free, read_json, write_json
from ..utils.progress import Bar, counted, growing, silent
from .names import DECODER, HEAD, HF_TOWER, SAME, llava_name


@dataclass(frozen=True)
class Imported:
    """What was written: its folder, its LLaVA class, and the dtype of its weights."""

    folder: Path
    class_name: str
    dtype: str


def restore(
    folder: Path, output: Path, origin: Path | None = None, max_shard_size: str = "5GB", bar: Bar = silent
) -> Imported:
    """Write the LLaVA checkpoint of an export.

    Args:
        origin: the export that ``folder`` was trained on further; needed where transformers saved ``folder``, which
            leaves out what belongs to LLaVA.
        bar: shows how far it is.

    Raises:
        ValueError: for a folder that is no export, tensors that belong to no LLaVA or are missing, or an output folder
            that has files; nothing is written.
    """
    check_free(output)
    config = read_config(folder)
    source = (origin or folder) / ORIGIN
    if not (source / CONFIG_NAME).is_file():
        raise ValueError(
            f"{origin or folder} has no folder {ORIGIN}, which `llava-packing export` writes: give the export that it "
            f"was trained on (--origin)"
        )
    if origin is not None and (reason := _differs(config, read_config(origin))):
        raise ValueError(f"{folder} was not trained on {origin}: they differ in {reason}")
    files = WeightFiles(folder)
    _check_names(files, folder, source.parent)
    tensors = {llava_name(name): files[name] for name in files.shapes()}
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    with bar("checking the weights") as moved:
        check_finite(counted(tensors.items(), moved, nbytes), folder)
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    content: dict[str, Any] = {**read_json(source / CONFIG_NAME), "torch_dtype": dtype}
    content.pop("dtype", None)
    named = content.get("architectures")
    if not isinstance(named, list) or not named:
        raise ValueError(f"{source / CONFIG_NAME}: architectures must name a class, got {named!r:.80}")
    from huggingface_hub import save_torch_state_dict

    with atomic_folder(output, is_new=True) as aside:
        for file in source.iterdir():
            if file.name not in (CONFIG_NAME, INFO):
                shutil.copyfile(file, aside / file.name)
        write_json(content, aside / CONFIG_NAME)
        with bar("writing the weights") as moved, growing(aside, moved, nbytes):
            save_torch_state_dict(
                {name: torch.clone(tensor) for name, tensor in tensors.items()},
                aside,
                max_shard_size=max_shard_size,
                metadata={"format": "pt"},
            )
    return Imported(output, str(named[0]), dtype)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of an export. Raises ``ValueError`` for another folder."""
    config = read_json(folder / CONFIG_NAME)
    if config.get("model_type") != MODEL_TYPE:
        raise ValueError(f"{folder} is not an export: its model_type is {config.get('model_type')!r:.80}")
    for part in ("text_config", "vision_config"):
        if not isinstance(config.get(part), dict):
            raise ValueError(f"{folder / CONFIG_NAME}: {part} must be a JSON object, got {config.get(part)!r:.80}")
    return config


def _differs(config: dict[str, Any], other: dict[str, Any]) -> str | None:
    """The first key in which two exports are other models."""
    keys = ("mm_projector_type", "mm_patch_merge_type", "mm_vision_select_layer", "mm_vision_select_feature")
    sizes = ("hidden_size", "num_hidden_layers", "vocab_size", "model_type", "patch_size")
    pairs = {key: (config.get(key), other.get(key)) for key in keys}
    for part in ("text_config", "vision_config"):
        pairs.update({f"{part}.{key}": (config[part].get(key), other[part].get(key)) for key in sizes})
    return next((f"{key}: {a!r} and {b!r}" for key, (a, b) in pairs.items() if a != b), None)


def _shapes_of(origin: Path) -> dict[str, tuple[int, ...]] | None:
    """Of the tensors that were exported, as the export notes them; None for one that was made before they were noted
    (0.2.0). Raises ``ValueError`` for a note that cannot be read."""
    file = origin / ORIGIN / INFO
    noted = read_json(file).get("tensors") if file.is_file() else None
    if noted is None:
        return None
    if not isinstance(noted, dict) or not all(isinstance(shape, list) for shape in noted.values()):
        raise ValueError(f"{file}: tensors must be names with their shapes, got {noted!r:.80}")
    return {name: tuple(shape) for name, shape in noted.items()}


def _check_names(files: WeightFiles, folder: Path, origin: Path) -> None:
    """Raises ``ValueError`` for tensors that a LLaVA has no place for, and for those that it lacks."""
    names = set(files.shapes())
    known = (HF_TOWER, DECODER, *SAME)
    strange = sorted(name for name in names if not name.startswith(known))
    wanted = _shapes_of(origin)
    if wanted is None and origin != folder:
        wanted = WeightFiles(origin).shapes()
    if wanted is not None:
        strange += sorted(names - wanted.keys() - {HEAD} - set(strange))
        if missing := sorted(wanted.keys() - names - {HEAD}):
            raise ValueError(f"{folder} lacks {len(missing)} tensors of the export, for example {missing[0]}")
        other = [name for name, shape in files.shapes().items() if shape != wanted.get(name, shape)]
        if other:
            raise ValueError(
                f"{folder}: {len(other)} tensors have other shapes than in the export, for example {other[0]}: "
                f"{files.shapes()[other[0]]}, not {wanted[other[0]]}"
            )
    if strange:
        raise ValueError(
            f"{folder} has {len(strange)} tensors that a LLaVA does not have, for example {strange[0]} (an adapter, or "
            f"quantized weights? merge them first)"
        )
