"""Strict reading and writing of weights: key maps, config checks, hashes, `from_pretrained` and `save_pretrained`."""
