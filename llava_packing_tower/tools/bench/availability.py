"""A system that cannot be measured here is a line with the reason in the table, not a crash."""

from __future__ import annotations


class Unavailable(Exception):
    """Why a system cannot run: a package is missing, or the family has no such model."""
