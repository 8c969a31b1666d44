"""``import builder_patch`` is enough: LLaVA, imported before or after it, then builds packing vision towers.

A name that contains "packing" (any case) selects the packing tower, else one that contains "hevc_vit" the standard
tower, else LLaVA's own function decides. :func:`apply` and :func:`undo` do and take back the same explicitly.
"""

from llava_packing_tower.hosts import apply, is_active, undo

__all__ = ["apply", "is_active", "undo"]

apply()
