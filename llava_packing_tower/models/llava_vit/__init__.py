"""LlavaViT (HEVC-ViT, published as OneVision-Encoder): packed and standard models, key maps, model names."""
