"""Fingerprints of single tensors: two processes can compare weights to the last bit without moving them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch


def tensor_digest(tensor: torch.Tensor) -> str:
    """ "<dtype> <shape> <sha256 of the bytes>": equal for two tensors exactly if every bit of them is equal."""
    data = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(data.reshape(-1).view(torch.uint8).numpy())
    return f"{str(data.dtype).removeprefix('torch.')} {list(data.shape)} {digest.hexdigest()}"


def differing(left: Mapping[str, str], right: Mapping[str, str]) -> list[str]:
    """Names whose digests differ or that only one side has, sorted."""
    return sorted(name for name in left.keys() | right.keys() if left.get(name) != right.get(name))
