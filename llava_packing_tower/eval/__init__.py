"""Evaluation of packing checkpoints with lmms-eval, and of towers alone.

lmms-eval finds the model `llava_packing` through the entry point group ``lmms_eval.models``, whose target is
:func:`manifests`. lmms-eval 0.5 knows no entry points: there ``LMMS_EVAL_PLUGINS=llava_packing_tower.eval``.
"""

from __future__ import annotations

MODEL = "llava_packing"
CLASS_PATH = "llava_packing_tower.eval.models.llava_packing.LlavaPacking"


def manifests() -> list:
    """What lmms-eval registers. Empty where it has no manifests; never raises: lmms-eval would skip other plugins."""
    try:
        from lmms_eval.models.registry_v2 import ModelManifest
    except ImportError:
        return []
    return [ModelManifest(model_id=MODEL, simple_class_path=CLASS_PATH)]
