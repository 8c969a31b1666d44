"""Errors of the command line."""

from __future__ import annotations

import errno


class UsageError(Exception):
    """A mistake in what the user typed or configured: printed as one message, without a traceback (exit status 2)."""


DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
REFUSED_BY_DISK = (*DISK_FULL, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENXIO)
"""Numbers of an ``OSError`` that say all there is to say: a traceback would add nothing."""
