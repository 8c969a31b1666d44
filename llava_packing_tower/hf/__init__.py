"""An exported LLaVA for transformers: configuration, model, processor. Imports no LLaVA."""
