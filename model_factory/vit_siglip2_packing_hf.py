"""The packed SigLIP2 NaFlex under the documents' module name."""

from llava_packing_tower import Siglip2NaflexPacking

__all__ = ["Siglip2NaflexPacking"]
