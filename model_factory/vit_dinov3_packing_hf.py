"""The packed DINOv3 under the documents' module name."""

from llava_packing_tower import DINOv3ViTPacking

__all__ = ["DINOv3ViTPacking"]
