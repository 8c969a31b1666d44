"""An exported LLaVA for transformers: configuration, model, processor. Imports no LLaVA."""

MODEL_TYPE = "llava_packing"
ARCHITECTURE = "LlavaPackingForConditionalGeneration"
ORIGIN = "llava_checkpoint"
"""Folder inside of an export: config, tokenizer and all else that the LLaVA checkpoint had, but its weights."""
INFO = "export.json"
"""File in there: what the export was made of, and how."""
