"""Whether this machine rounds as another did: only then results are equal bit by bit."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch.nn import functional as F


def digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of names and bits, 16 hex digits."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        sha.update(name.encode())
        sha.update(tensors[name].detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:16]


def rounding() -> str:
    """A digest of what matmul, attention, norms and activations of a few odd sizes give here, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        generator = torch.Generator().manual_seed(7)
        found = {}
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(37, 130, generator=generator).to(dtype)
            w = torch.randn(70, 130, generator=generator).to(dtype)
            q = torch.randn(1, 3, 45, 24, generator=generator).to(dtype)
            found[f"linear {dtype}"] = F.linear(x, w)
            found[f"gradient {dtype}"] = F.linear(x, w).T @ x
            found[f"attention {dtype}"] = F.scaled_dot_product_attention(q, q, q)
            found[f"norm {dtype}"] = F.layer_norm(x, (130,))
            found[f"gelu {dtype}"] = F.gelu(x)
            found[f"softmax {dtype}"] = torch.log_softmax(x, -1)
    finally:
        torch.set_num_threads(threads)
    return digest({**found, f"torch {torch.__version__}": torch.zeros(1)})
