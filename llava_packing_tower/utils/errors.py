"""Errors of the command line."""

from __future__ import annotations

import errno
import re


class UsageError(Exception):
    """A mistake in what the user typed or configured: printed as one message, without a traceback (exit status 2)."""


DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
FORBIDDEN = (errno.EACCES, errno.EPERM)
REFUSED_BY_DISK = (*DISK_FULL, errno.EROFS, errno.ENXIO, errno.EFBIG, errno.EIO)
"""Numbers of an ``OSError`` that say all there is to say, as those of FORBIDDEN do: a traceback would add nothing."""


def what_the_disk_says(error: BaseException) -> str | None:
    """In words, why a disk refused: of an ``OSError``, or of what safetensors and torch raise in its place; else None.

    (safetensors writes the number of the system's error into its text; torch's writer knows none.)
    """
    number = error.errno if isinstance(error, OSError) else None
    if type(error).__name__ == "SafetensorError" and (found := re.search(r"\(os error (\d+)\)", str(error))):
        number = int(found[1])
    if number in REFUSED_BY_DISK:
        return f"the disk is full: {error}" if number in DISK_FULL else str(error)
    if isinstance(error, RuntimeError) and "PytorchStreamWriter failed" in str(error):
        return f"the disk is full, or refuses to write: {str(error).splitlines()[0]}"
    return None
