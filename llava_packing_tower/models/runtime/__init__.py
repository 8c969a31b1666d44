"""How encoder blocks are run: fused or eager, with or without CUDA graphs."""
