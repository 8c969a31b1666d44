"""safetensors files written one tensor at a time: a conversion never holds a second copy of the model."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch

from ..checkpoint.weights import SAFETENSORS
from ..utils.files import write_json

MAX_SHARD_BYTES = 5_000_000_000
_CODES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


class TensorSpec(NamedTuple):
    """What a tensor will be, before it exists."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def shards_of(specs: Mapping[str, TensorSpec], max_bytes: int = MAX_SHARD_BYTES) -> dict[str, list[str]]:
    """File name to tensor names, in the order given, named as transformers names them."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, spec in specs.items():
        if groups[-1] and filled + spec.nbytes > max_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += spec.nbytes
    if len(groups) == 1:
        return {SAFETENSORS: groups[0]}
    stem, suffix = SAFETENSORS.split(".")
    return {f"{stem}-{i:05d}-of-{len(groups):05d}.{suffix}": group for i, group in enumerate(groups, start=1)}


def write_weights(
    folder: Path,
    specs: Mapping[str, TensorSpec],
    produce: Callable[[str], torch.Tensor],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> int:
    """Write all tensors, each asked for with ``produce(name)`` when its turn comes, and let go at once.

    Returns the number of bytes of the tensors. Raises ``ValueError`` if a tensor is not what ``specs`` said, and
    ``OSError`` if the disk does not take it.
    """
    files = shards_of(specs, max_shard_bytes)
    for file, names in files.items():
        _write_file(folder / file, {name: specs[name] for name in names}, produce)
    total = sum(spec.nbytes for spec in specs.values())
    if len(files) > 1:
        weight_map = {name: file for file, names in files.items() for name in names}
        write_json({"metadata": {"total_size": total}, "weight_map": weight_map}, folder / f"{SAFETENSORS}.index.json")
    return total


def _write_file(file: Path, specs: Mapping[str, TensorSpec], produce: Callable[[str], torch.Tensor]) -> None:
    # https://github.com/huggingface/safetensors#format: length of the header, header, then the bytes without gaps.
    # Wider numbers first: each tensor starts at a multiple of its own width.
    order = sorted(specs, key=lambda name: -specs[name].dtype.itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in order:
        spec = specs[name]
        end = offset + spec.nbytes
        header[name] = {"dtype": _CODES[spec.dtype], "shape": list(spec.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            tensor = produce(name)
            if TensorSpec(tuple(tensor.shape), tensor.dtype) != specs[name]:
                raise ValueError(f"{name}: expected {specs[name]}, got {tuple(tensor.shape)} {tensor.dtype}")
            stream.write(memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()))
        stream.flush()
        os.fsync(stream.fileno())
