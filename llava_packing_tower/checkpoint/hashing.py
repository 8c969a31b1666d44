"""Fingerprints of single tensors: two processes can compare weights to the last bit without moving them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..utils.files import CONFIG_NAME
from .weights import WeightFiles


def tensor_digest(tensor: torch.Tensor) -> str:
    """ "<dtype> <shape> <sha256 of the bytes>": equal for two tensors exactly if every bit of them is equal."""
    data = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(data.reshape(-1).view(torch.uint8).numpy().data)
    return f"{str(data.dtype).removeprefix('torch.')} {list(data.shape)} {digest.hexdigest()}"


def differing(left: Mapping[str, str], right: Mapping[str, str]) -> list[str]:
    """Names whose digests differ or that only one side has, sorted."""
    return sorted(name for name in left.keys() | right.keys() if left.get(name) != right.get(name))


def folder_fingerprint(folder: str | os.PathLike, part: str | None = None) -> str:
    """sha256 over config.json and the weight files of a checkpoint folder, or over one weight file (about a second per
    GB).

    part: a pattern as :class:`WeightFiles` takes it; where it leaves tensors out, those that it names are hashed.
    """
    digest, path = hashlib.sha256(), Path(folder)
    if part is not None and path.is_dir() and (weights := WeightFiles(path, part=part)).left:
        digest.update((path / CONFIG_NAME).read_bytes())
        for name in sorted(weights.shapes()):
            digest.update(f"{name}\0{tensor_digest(weights[name])}\0".encode())
        return digest.hexdigest()
    entries = [path] if path.is_file() else path.iterdir()
    files = (f for f in entries if f == path or f.name == CONFIG_NAME or f.suffix in (".safetensors", ".bin"))
    hash_files(digest, sorted(files))
    return digest.hexdigest()


def hash_files(
    digest: Any, files: Sequence[Path], progress: Callable[[int, int], None] = lambda done, count: None
) -> None:
    """Add the name, size and content of each file to a digest of ``hashlib``.

    progress: called with the bytes that are read, and all there are.
    Raises ``ValueError`` for what cannot be read, or is no regular file.
    """
    if odd := [file for file in files if file.exists() and not file.is_file()]:  # a pipe would block
        raise ValueError(f"cannot read {odd[0]}: it is not a regular file")
    try:
        sizes, done = [file.stat().st_size for file in files], 0
        for file, size in zip(files, sizes):
            digest.update(f"{file.name}\0{size}\0".encode())
            with file.open("rb") as stream:
                while chunk := stream.read(1 << 22):
                    digest.update(chunk)
                    done += len(chunk)
                    progress(done, sum(sizes))
    except OSError as error:  # a link into a cache that is gone
        raise ValueError(f"cannot read {error.filename}: {error.strerror}") from error
