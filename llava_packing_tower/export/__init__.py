"""`llava-packing export` and `import`: a LLaVA checkpoint as a Hugging Face folder, and back."""
