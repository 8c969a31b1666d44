"""A checkpoint with a frozen tower whose own folder is gone: LLaVA saves the whole model, the tower with it."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..loading import CONFIG_NAME, WeightFiles, read_json, resolve_folder, write_json
from ..tower_names import strip_prefix
from .tuning import has_weights

logger = logging.getLogger(__name__)


@contextmanager
def self_contained(folder: Path) -> Iterator[Path]:
    """The folder to load in place of ``folder``: itself, unless it points to a tower folder that is gone and has the
    tower's tensors; then a view of it whose config says that the weights are here. Nothing of ``folder`` is changed.
    """
    config = read_json(folder / CONFIG_NAME)
    saved = config.get("mm_packing_config") or {}
    if saved.get("weights") != "folder" or _is_there(str(config.get("mm_vision_tower"))):
        yield folder
        return
    if not has_weights(folder) or not any("vision_tower." in name for name in WeightFiles(folder).shapes()):
        yield folder  # loading it will name the folder that is missing
        return
    logger.warning(
        "%s is not here: the frozen tower has the weights that were saved in %s, in their precision",
        config["mm_vision_tower"],
        folder,
    )
    with tempfile.TemporaryDirectory(prefix="llava_packing_") as name:
        view = Path(name)
        for file in folder.iterdir():
            if file.name != CONFIG_NAME:
                (view / file.name).symlink_to(file.resolve())
        config["mm_packing_config"] = {**saved, "weights": "checkpoint"}
        config["unfreeze_mm_vision_tower"] = True  # LLaVA 1.x then leaves the tower to the checkpoint's files
        write_json(config, view / CONFIG_NAME)
        yield view


def _is_there(tower: str) -> bool:
    try:
        resolve_folder(strip_prefix(tower))
    except ValueError:
        return False
    return True
