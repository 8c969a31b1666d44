"""The packed AIMv2 under the documents' module name."""

from llava_packing_tower import AIMv2Packing

__all__ = ["AIMv2Packing"]
