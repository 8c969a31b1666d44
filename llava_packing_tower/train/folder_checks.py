"""The folders and files that a training configuration names, before anything is loaded. No torch here.

Each check raises :class:`UsageError` that names the key and the file.
"""

from __future__ import annotations

import ast
import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

from ..integrations.llava.host import FoundHost, syntax
from ..towers.names import FUSED, PACKING, tower_kind, tower_names
from ..utils.errors import UsageError
from ..utils.files import once, user_path

CONFIG = "config.json"


def check_folders(values: Mapping[str, object], found: FoundHost) -> None:
    """Tower, decoder, adapter and output. A name that is no folder here may be a hub id, ``owner/name``."""
    for key, name in (
        *(("vision_tower", name) for name in tower_names(str(values["vision_tower"]))),
        ("model_name_or_path", str(values["model_name_or_path"])),
    ):
        folder = user_path(name)
        if folder.is_dir():
            if not (folder / CONFIG).is_file():
                raise UsageError(f"{key}: folder {name} has no {CONFIG}")
            for file in sorted(folder.glob("*.json")):
                _read_json(key, file)
        elif "/" not in name and not (key == "vision_tower" and folder.is_file()):  # weights as their authors give them
            raise UsageError(f"{key}: {name} is neither a folder here nor a hub id, owner/name")
    if not values.get("model_class_name"):  # LLaVA-NeXT's own argument, which names the class
        check_decoder(str(values["model_name_or_path"]), found)
    if adapter := values.get("pretrain_mm_mlp_adapter"):
        check_adapter(user_path(str(adapter)))
    check_output(user_path(str(values["output_dir"])))


def _read_json(key: str, file: Path) -> dict:
    if not file.is_file():
        raise UsageError(f"{key}: {file} is not a regular file")
    try:
        content = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=once if file.name == CONFIG else None)
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{key}: {file} is damaged: {error}") from error
    if file.name == CONFIG and not isinstance(content, dict):
        raise UsageError(f"{key}: {file} must hold a JSON object, found {type(content).__name__}")
    return content


def check_encoders(values: Mapping[str, object]) -> None:
    """Packing towers in folders: the config.json must be that of a family, with values that a model can be made from.
    A folder whose config.json names no model is told by its weights. Needs torch."""
    name = str(values["vision_tower"])
    folders = [tower for tower in tower_names(name) if (user_path(tower) / CONFIG).is_file()]
    if not folders or tower_kind(name) not in (PACKING, FUSED):
        return
    from ..towers.packing_tower import HEVCViTPackingVisionTower

    for tower in folders:
        selected = SimpleNamespace(mm_vision_select_layer=values.get("mm_vision_select_layer", -1))
        try:
            HEVCViTPackingVisionTower(tower, selected, delay_load=True)
        except ValueError as error:
            raise UsageError(f"vision_tower: {error}") from error


def check_decoder(name: str, found: FoundHost) -> None:
    """A decoder that the host has no class for, or whose name has none of the words by which it chooses one."""
    words = path_words(found)
    if words and not any(word in name.lower() for word in words):
        raise UsageError(
            f"model_name_or_path: {found.host.title} chooses the model class by a word in this path, and {name} has "
            f"none of {', '.join(words)}: rename the folder, or make a link to it"
        )
    file = user_path(name) / CONFIG
    config = _read_json("model_name_or_path", file) if file.is_file() else {}
    model_type = config.get("model_type")
    if model_type is None:
        return
    from ..integrations.llava.model_class import check_host_has, class_name  # needs torch

    own = class_name(config, found.host, plain=True)
    if own is None:
        raise UsageError(f"model_name_or_path: {file} says model_type {model_type}, for which LLaVA has no decoder")
    try:
        check_host_has(found, own, name)
    except ValueError as error:
        raise UsageError(f"model_name_or_path: {error}") from error


def path_words(found: FoundHost) -> tuple[str, ...]:
    """The words, one of which a host's ``get_model`` must find in ``model_name_or_path``; read without running it.

    Those alone for which ``train`` makes a tokenizer (LLaVA-NeXT makes none for "gemma"). Empty for LLaVA 1.x, which
    takes every other name for a Llama.
    """
    tree = syntax(found.file(found.host.train))
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    known = _words_with_tokenizer(functions["train"]) if "train" in functions else None
    for function in filter(None, [functions.get("get_model")]):
        for node in (n for n in ast.walk(function) if isinstance(n, ast.If)):
            tests, otherwise = _chain(node)
            words = [word for test in tests for word in _words_in_path(test) if known is None or word in known]
            if words and any(isinstance(n, ast.Raise) for n in otherwise):
                return tuple(dict.fromkeys(words))
    return ()


def _words_with_tokenizer(train: ast.FunctionDef) -> set[str] | None:
    """The words for which ``train`` makes a tokenizer; None if it makes one for every path."""
    found: set[str] = set()
    for node in (n for n in train.body if isinstance(n, ast.If)):
        tests, otherwise = _chain(node)
        words = [word for test in tests for word in _words_in_path(test)]
        if words and otherwise:
            return None
        found |= set(words)
    return found or None


def _chain(node: ast.If) -> tuple[list[ast.expr], list[ast.stmt]]:
    """The conditions of an ``if`` with its ``elif``, and what stands under ``else``."""
    tests = [node.test]
    while len(node.orelse) == 1 and isinstance(node.orelse[0], ast.If):
        node = node.orelse[0]
        tests.append(node.test)
    return tests, node.orelse


def _words_in_path(test: ast.AST) -> list[str]:
    """The words of ``"llama" in model_args.model_name_or_path.lower()`` and the like."""
    compared = (n for n in ast.walk(test) if isinstance(n, ast.Compare) and isinstance(n.ops[0], ast.In))
    return [
        str(n.left.value).lower()
        for n in compared
        if isinstance(n.left, ast.Constant) and "model_name_or_path" in ast.unparse(n.comparators[0])
    ]


def check_reference(values: Mapping[str, object], zero_stage: int | None) -> None:
    """Raises :class:`UsageError` where DPO would compare with a projector of other random weights: under ZeRO-3 the
    reference is no copy of the model, but loaded and given its projector once more."""
    file = user_path(str(values["model_name_or_path"])) / "config.json"
    if zero_stage != 3 or values.get("pretrain_mm_mlp_adapter") or not file.is_file():
        return
    if "mm_projector_type" not in _read_json("model_name_or_path", file):
        raise UsageError(
            f"trainer: dpo under ZeRO-3 loads the reference model from model_name_or_path, and {file.parent} has no "
            f"projector: each would get random weights of its own. Start from a LLaVA checkpoint, or give "
            f"pretrain_mm_mlp_adapter"
        )


def check_adapter(file: Path) -> None:
    """Refuse a projector that is not a complete file of ``torch.save``: a zip archive, or a pickle of old versions."""
    if not file.is_file():
        raise UsageError(f"pretrain_mm_mlp_adapter: {file} does not exist")
    with file.open("rb") as stream:
        start = stream.read(2)
    if not zipfile.is_zipfile(file) and start != b"\x80\x02":
        raise UsageError(f"pretrain_mm_mlp_adapter: {file} is not a complete file of torch.save")


def check_output(folder: Path) -> None:
    """An output folder that cannot be made or written into."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise UsageError(f"output_dir: {there} is a file, not a folder")
    if not os.access(there, os.W_OK):
        raise UsageError(f"output_dir: {there} is not writable")
