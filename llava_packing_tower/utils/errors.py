"""Errors of the command line."""

from __future__ import annotations


class UsageError(Exception):
    """A mistake in what the user typed or configured: printed as one message, without a traceback (exit status 2)."""
