"""Converting LlavaViT checkpoints (and the other families to packing), strictly, and verifying the result.

``sources`` finds out what a checkpoint is, ``conversion`` checks and writes, ``verify`` compares, ``pipeline`` does all
of it in the right order, ``report`` prints.
"""
