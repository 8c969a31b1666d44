"""`llava-packing export` and `import`: a LLaVA checkpoint as a Hugging Face folder, and back."""

MODEL_TYPE = "llava_packing"
ORIGIN = "llava_checkpoint"
"""Folder inside of an export: config, tokenizer and all else that the LLaVA checkpoint had, but its weights."""
