"""From a folder name or hub id to a local folder. Of a hub repository, only the files that will be read are fetched."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ..utils.files import CONFIG_NAME, read_json, user_path
from ..utils.hub import check_is_here
from .weights import PICKLED, SAFETENSORS, only

DESCRIPTIONS = (CONFIG_NAME, "preprocessor_config.json", "processor_config.json")
INDEXES = (f"{SAFETENSORS}.index.json", f"{PICKLED}.index.json")


Part = Callable[[dict], str | None]
"""The content of a config.json to the pattern of the tensors that are wanted, see :class:`WeightFiles`; None: all."""


def resolve_folder(
    name_or_path: str | os.PathLike,
    subfolder: str = "",
    more: Iterable[str] = (),
    part: Part = lambda raw: None,
    **hub: Any,
) -> Path:
    """A local folder for a folder name or a hub id (downloaded through huggingface_hub, or taken from its cache), or
    ``subfolder`` in it.

    Of a hub id, the configuration, the image processor and one save of the weights are fetched: the shards that an
    index names, else the one safetensors file, else the same of ``pytorch_model.bin``. ``part``: of the shards, only
    those that hold such tensors. ``more``: patterns of further files. ``hub`` (``revision``, ``token``, ``cache_dir``
    ...) goes to ``snapshot_download``.

    Raises ``ValueError`` where neither is found.
    """
    name = os.fspath(name_or_path)
    folder = user_path(name)
    if folder.is_dir():
        if not (folder / subfolder).is_dir():
            raise ValueError(f"checkpoint folder {name!r} has no subfolder {subfolder!r}")
        return folder / subfolder
    if folder.exists():
        raise ValueError(f"{name!r} is a file; a checkpoint folder is needed here")
    if "://" in name or name.startswith("hf-hub:"):
        raise ValueError(f"{name!r} is an address: give the hub id alone, owner/name")
    if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise ValueError(f"checkpoint folder {name!r} does not exist")
    check_is_here(name)
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        local = _fetch(name, subfolder, (*DESCRIPTIONS, *INDEXES, *more), hub)
        for base, index in zip((SAFETENSORS, PICKLED), INDEXES):
            shards = read_json(local / index).get("weight_map") if (local / index).is_file() else None
            if isinstance(shards, dict) and (local / CONFIG_NAME).is_file():
                shards, _ = only(shards, part(read_json(local / CONFIG_NAME)))
            wanted = sorted({str(file) for file in shards.values()}) if isinstance(shards, dict) else [base]
            local = _fetch(name, subfolder, wanted, hub)
            if all((local / file).is_file() for file in wanted):
                break
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise ValueError(f"{name!r} is neither a local folder nor a hub id that can be reached: {error}") from error
    if not local.is_dir():
        raise ValueError(f"{name!r} has no subfolder {subfolder!r}")
    return local


def resolve_path(name_or_path: str | os.PathLike, **hub: Any) -> Path:
    """As :func:`resolve_folder`; a weight file is itself, but one that lies in a checkpoint folder under the usual name
    is that folder."""
    path = user_path(os.fspath(name_or_path))
    if not path.is_file():
        return resolve_folder(name_or_path, **hub)
    whole = path.name in (SAFETENSORS, PICKLED) and (path.parent / CONFIG_NAME).is_file()
    return path.parent if whole else path


def _fetch(name: str, subfolder: str, files: Iterable[str], hub: dict[str, Any]) -> Path:
    from huggingface_hub import snapshot_download

    patterns = [f"{subfolder}/{file}" if subfolder else file for file in files]
    return Path(snapshot_download(name, allow_patterns=patterns, **hub)) / subfolder
