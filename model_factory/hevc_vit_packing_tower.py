"""The packing tower under the documents' module name."""

from llava_packing_tower import HEVCViTPackingVisionTower

__all__ = ["HEVCViTPackingVisionTower"]
