"""`llava-packing demo`: fine-tunes a tiny LLaVA on photographs out of PyPI packages."""

OUTPUT = "demo_output"
"""Folder of everything the demo makes; configs/demo.yaml names paths inside it."""
