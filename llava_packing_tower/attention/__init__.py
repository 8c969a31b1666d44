"""Attention over a packed batch: one entry (:mod:`dispatch`) and one file per backend."""

from .dispatch import BACKENDS, attend, auto_order, backend_module, resolve_backend, varlen_attention

__all__ = ["BACKENDS", "attend", "auto_order", "backend_module", "resolve_backend", "varlen_attention"]
