"""What LLaVA sees: the packing tower, the standard tower, and the selection of features."""
