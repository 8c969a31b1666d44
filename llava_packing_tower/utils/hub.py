"""Names of checkpoints that could be a folder here or a repository of the Hugging Face hub. No torch here."""

from __future__ import annotations

import re
from pathlib import Path

from .files import user_path

OURS = re.compile(r"checkpoints/[^/]+|[^/]+/[^/]+[-_](packing|standard)", re.IGNORECASE)
"""What `llava-packing convert` calls its results, and where the examples put them."""


def check_is_here(name: str) -> None:
    """Raises ``ValueError`` for a relative path that looks like a folder of ours and is none: the hub is not asked for
    it. A repository that was downloaded before may have such a name."""
    if not OURS.fullmatch(name) or user_path(name).is_dir():
        return
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        snapshot_download(name, local_files_only=True)
    except (LocalEntryNotFoundError, HFValidationError):
        raise ValueError(
            f"checkpoint folder {name!r} does not exist in {Path.cwd()} (a repository of the hub with such a name must "
            f"be downloaded first: hf download {name})"
        ) from None
