"""The only place that touches LLaVA: which hosts there are, and what is changed in them in memory."""

from .install import apply, is_active, undo
from .registry import find_host

__all__ = ["apply", "find_host", "is_active", "undo"]
