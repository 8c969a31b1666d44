"""``import builder_patch`` is enough: LLaVA, imported before or after it, then builds packing vision towers.

The prefix ``packing:``, a packing folder, or with nothing to look at a name that contains "packing" (any case) selects
the packing tower, "hevc_vit" in its place the standard tower, else LLaVA's own function decides (the whole rule is in
``llava_packing_tower/towers/names.py``). :func:`apply` and :func:`undo` do and take back the same explicitly.
"""

from llava_packing_tower.integrations.llava.install import apply, is_active, undo

__all__ = ["apply", "is_active", "undo"]

apply()
