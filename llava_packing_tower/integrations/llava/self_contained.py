"""A checkpoint with a frozen tower loads wherever it is read from, and where the tower's own folder is gone."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ...checkpoint.weights import WeightFiles
from ...towers.names import strip_prefix
from ...towers.saved_tower import frozen_folder, saved_in, tower_fingerprint
from ...utils.files import CONFIG_NAME, read_json, user_path, write_json
from .checkpoint_files import has_weights

logger = logging.getLogger(__name__)


@contextmanager
def self_contained(folder: Path, key: str = "mm_vision_tower") -> Iterator[Path]:
    """The folder to load in place of ``folder``: itself, unless its frozen tower is not found under its name from here.

    Then it is a view of ``folder``, with a config that says where the tower is: in the folder it was trained from
    (also of a relative name, seen from where the checkpoint is), else in the checkpoint's own files. Nothing of
    ``folder`` is changed.

    key: where config.json names the tower.
    """
    config = read_json(folder / CONFIG_NAME)
    saved, name = saved_in(folder / CONFIG_NAME, config), str(config.get(key))
    if saved.get("weights") != "folder" or saved.get("towers") or frozen_folder(name, saved) is not None:
        yield folder
        return
    if (found := _seen_from(folder, strip_prefix(name), saved.get("fingerprint"))) is not None:
        logger.info("the frozen vision tower %s is read from %s", name, found)
        changes: dict[str, object] = {key: str(found)}
    elif has_weights(folder) and any("vision_tower." in name for name in WeightFiles(folder).shapes()):
        logger.warning(
            "%s does not exist here: the frozen tower is read from %s, in the precision in which it was saved",
            name,
            folder,
        )
        # The second: LLaVA 1.x then leaves the tower to the checkpoint's files.
        changes = {"mm_packing_config": {**saved, "weights": "checkpoint"}, "unfreeze_mm_vision_tower": True}
    else:
        yield folder  # loading it will name the folder that is missing
        return
    with tempfile.TemporaryDirectory(prefix="llava_packing_") as place:
        view = Path(place)
        for file in folder.iterdir():
            if file.name != CONFIG_NAME:
                (view / file.name).symlink_to(file.resolve())
        write_json({**config, **changes}, view / CONFIG_NAME)
        yield view


def _seen_from(checkpoint: Path, name: str, fingerprint: str | None) -> Path | None:
    """A relative tower folder, seen from the folders above the checkpoint: one of them is where training was started.

    Only one that has the fingerprint that the checkpoint notes.
    """
    if user_path(name).is_absolute() or fingerprint is None:
        return None
    for parent in checkpoint.resolve().parents:
        found = parent / name
        if (found / CONFIG_NAME).is_file() and tower_fingerprint(found) == fingerprint:
            return found.resolve()
    return None
