"""The tensors of one file: what torch or safetensors wrote, or numpy's .npz."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .weights import WeightFiles, not_weights, open_weights

NPZ = ".npz"
FILE_SUFFIXES = (".pt", ".pth", ".bin", ".safetensors", NPZ)


class SingleFile(WeightFiles):
    """The tensors of one file: bare, or wrapped in ``model``, else ``state_dict``, else in the one entry that has
    tensors; without ``module.`` in front.

    Raises ``ValueError`` for a damaged file, or one that holds no tensors, or those of several models.
    """

    def __init__(self, path: Path) -> None:
        self.folder, self.path = path.parent, path
        self.ignored: dict[str, str] = {}
        self.left = {}
        self._since_release = 0
        content: Any = open_weights(path)
        if path.suffix.lower() != ".safetensors":
            content = self._unwrap(path, content)
        self._open = {path.name: content}
        self._raw_names = self._without_prefix(list(content.keys()))
        self._where = dict.fromkeys(self._raw_names, path.name)
        if not self._where:
            raise ValueError(f"{path} contains no tensors")

    @property
    def name(self) -> Path:
        return self.path

    def _unwrap(self, path: Path, content: object) -> dict[str, torch.Tensor]:
        if not isinstance(content, dict):
            raise ValueError(f"{path} contains no state dict, found {type(content).__name__}")
        wrapper: object = next((key for key in ("model", "state_dict") if isinstance(content.get(key), dict)), None)
        if wrapper is None and not any(isinstance(value, torch.Tensor) for value in content.values()):
            wrapper = self._only_state(path, content)
        if wrapper is not None:
            self.ignored.update((str(key), "not the weights") for key in content if key != wrapper)
            content = content[wrapper]
        assert isinstance(content, dict)
        tensors = {str(key): value for key, value in content.items() if isinstance(value, torch.Tensor)}
        self.ignored.update(
            (str(key), f"not a tensor but {type(value).__name__}")
            for key, value in content.items()
            if str(key) not in tensors
        )
        return tensors

    @staticmethod
    def _only_state(path: Path, content: dict) -> object:
        """The key of the one entry that is a state dict, None without one."""
        states = [
            key
            for key, value in content.items()
            if isinstance(value, dict) and any(isinstance(part, torch.Tensor) for part in value.values())
        ]
        if len(states) > 1:
            raise ValueError(
                f"{path} holds {len(states)} models, {', '.join(map(str, states))}: save the one that is meant, "
                f"torch.save(torch.load(FILE)[{states[0]!r}], NEW_FILE)"
            )
        return states[0] if states else None

    @staticmethod
    def _without_prefix(keys: list[str]) -> dict[str, str]:
        """Our name to the name in the file: without what DistributedDataParallel and torch.compile put in front."""
        names = {key: key for key in keys}
        for prefix in ("module.", "_orig_mod.", "module."):
            if names and all(name.startswith(prefix) for name in names):
                names = {name[len(prefix) :]: key for name, key in names.items()}
        return names

    def _in_file(self, key: str) -> str:
        return self._raw_names[key]


class NpzFile(WeightFiles):
    """The arrays of a .npz file, mapped into memory where it is not compressed (as ``numpy.savez`` writes it).

    JAX's bfloat16 arrives as two bytes without a meaning (``V2``), and is given it back. Raises ``ValueError`` for a
    damaged file, or one that needs pickle.
    """

    def __init__(self, path: Path) -> None:
        self.folder, self.path = path.parent, path
        self.ignored: dict[str, str] = {}
        self.left = {}
        self._arrays: dict[str, np.ndarray] = {}
        try:
            with zipfile.ZipFile(path) as archive:
                for member in archive.infolist():
                    if member.filename.endswith(".npy"):
                        self._arrays[member.filename.removesuffix(".npy")] = self._array(archive, member)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            reason = not_weights(path) or f"it is damaged, or holds more than arrays: {error}"
            raise ValueError(f"cannot read {path}, {reason}") from error
        if not self._arrays:
            raise ValueError(f"{path} contains no arrays")

    @property
    def name(self) -> Path:
        return self.path

    def _array(self, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
        with archive.open(member) as stream:
            if member.compress_type != zipfile.ZIP_STORED:
                return np.lib.format.read_array(stream, allow_pickle=False)
            version = np.lib.format.read_magic(stream)
            read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
            if version not in read_header:
                raise ValueError(f"{member.filename} is of the unknown version {version}")
            shape, by_columns, dtype = read_header[version](stream)
            if dtype.hasobject:
                raise ValueError(f"{member.filename} holds Python objects")
            header = stream.tell()
        with self.path.open("rb") as plain:  # the lengths in the local header are not those of the directory
            plain.seek(member.header_offset)
            local = plain.read(30)
        start = member.header_offset + 30 + int.from_bytes(local[26:28], "little")
        start += int.from_bytes(local[28:30], "little") + header
        if start + dtype.itemsize * int(np.prod(shape)) > self.path.stat().st_size:
            raise ValueError(f"{member.filename} ends early")
        if 0 in shape:
            return np.zeros(shape, dtype)
        order: Any = "F" if by_columns else "C"
        return np.memmap(self.path, dtype=dtype, mode="c", offset=start, shape=shape, order=order)

    def _headers(self) -> Iterator[tuple[str, tuple[int, ...], str]]:
        for name, array in self._arrays.items():
            yield name, array.shape, "bfloat16" if array.dtype == np.dtype("V2") else str(array.dtype)

    def __getitem__(self, key: str) -> torch.Tensor:
        array = self._arrays[key]
        if array.dtype == np.dtype("V2"):
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(np.asarray(array))


def open_file(path: Path) -> SingleFile | NpzFile:
    """The tensors of a weight file. Raises ``ValueError`` for another kind of file, or a damaged one."""
    if path.suffix.lower() not in FILE_SUFFIXES:
        raise ValueError(f"{path} is a file of no known kind: weights end in {', '.join(FILE_SUFFIXES)}")
    return NpzFile(path) if path.suffix.lower() == NPZ else SingleFile(path)
