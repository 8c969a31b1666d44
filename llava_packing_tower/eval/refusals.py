"""What cannot be evaluated ends its task, with the names of the task and of the document."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from PIL import ImageFile


@contextlib.contextmanager
def refusals(task: str, document: object) -> Iterator[None]:
    """Whatever is raised in here for an image or a text, as ``ValueError`` with its task and document.

    A truncated image is an error too, whatever a task or the host has told Pillow.
    """
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        yield
    except (MemoryError, torch.cuda.OutOfMemoryError):
        raise
    except Exception as error:
        reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"task {task}, document {document}: {reason}") from error
