"""Reading and writing checkpoints: strict, streaming (one tensor at a time), never partial.

A family says with :class:`Recipe` objects how each of its tensors is made from tensors of a file; :func:`load_weights`
checks the whole plan (missing, unexpected, mis-shaped) before the first byte of a weight is read.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ..utils.files import read_json

SAFETENSORS = "model.safetensors"
PICKLED = "pytorch_model.bin"


def is_weight_file(name: str) -> bool:
    """Whether a save of weights (not one of a variant) has a file of this name: the whole, a shard or an index."""
    return bool(re.fullmatch(r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?", name))


def only(names: Mapping[str, str], pattern: str | None) -> tuple[dict[str, str], dict[str, str]]:
    """The names that begin with a match of the pattern, and the others; all and none where none does."""
    inside = {name: file for name, file in names.items() if pattern is not None and re.match(pattern, name)}
    if not inside:
        return dict(names), {}
    return inside, {name: file for name, file in names.items() if name not in inside}


def open_weights(path: Path) -> object:
    """A ``safe_open`` handle, or what a pickled file holds (``weights_only``: code in it is never run).

    Raises ``ValueError`` that names the file if it is damaged or holds more than tensors and plain values.
    """
    safe = path.suffix.lower() == ".safetensors"
    if path.is_file() and not os.access(path, os.R_OK):  # safetensors says that there is no such file
        raise ValueError(f"cannot read {path}: {os.strerror(errno.EACCES)}")
    try:
        if safe:
            return safe_open(path, framework="pt", device="cpu")
        # Only the zip format that torch has written since 1.6 can be mapped into memory.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a damaged pickle can raise anything at all
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        kind = "it is damaged" if safe else "it is damaged, or holds more than tensors (code?)"
        raise ValueError(f"cannot read {path}, {not_weights(path) or f'{kind}: {reason}'}") from error


def not_weights(path: Path) -> str | None:
    """What a file is that is often found in place of weights: nothing, a pointer to them, a page; else None."""
    try:
        with path.open("rb") as file:
            start = file.read(200).lstrip()
    except OSError:  # what reads the weights says so itself
        return None
    if start.startswith(b"version https://git-lfs."):
        return "it is a pointer of Git LFS, not the weights: `git lfs pull` fetches them"
    if start[:1] == b"<":
        return "it is a web page, not weights"
    return None if start else "it is damaged: empty"


_DTYPE_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
WEIGHT_DTYPES = tuple(_DTYPE_NAMES.values())
"""The dtypes that weights may have; names as in ``torch``."""


class WeightFiles:
    """The tensors of a checkpoint folder (safetensors, sharded or not, else ``.bin`` with ``weights_only``), lazily.

    With a ``part``, these are the tensors whose names begin with a match of that pattern, if there are any: shards
    without such tensors are not opened, and need not be there. ``left`` names the other tensors, and the file of each.

    Mapped files are let go and opened again after each ``RELEASE_BYTES`` that were read: pages of a mapped file count
    as memory of the process.
    """

    RELEASE_BYTES = 1 << 25

    def __init__(self, folder: Path, use_safetensors: bool | None = None, part: str | None = None) -> None:
        """Raises ``ValueError`` for files that are missing, damaged or of two saves. ``use_safetensors`` asks for one
        kind of file."""
        self.folder = folder
        self.left: dict[str, str] = {}
        self._open: dict[str, object] = {}
        self._where: dict[str, str] = {}
        self._since_release = 0
        kinds = {None: (SAFETENSORS, PICKLED), True: (SAFETENSORS,), False: (PICKLED,)}[use_safetensors]
        for base in kinds:
            index = folder / f"{base}.index.json"
            if index.is_file():
                self._read_index(index, base, part)
                return
            if (folder / base).is_file():
                self._where, self.left = only(dict.fromkeys(self._keys_of(base), base), part)
                return
        others = sorted(f.name for f in folder.iterdir() if f.suffix in (".pt", ".pth", ".npz", ".safetensors", ".bin"))
        hint = f"; it has {', '.join(others[:4])}: give the file itself" if others else ""
        raise ValueError(f"{folder} has no {' or '.join(kinds)} (or an index of one){hint}")

    @property
    def name(self) -> Path:
        """The folder or file, for messages."""
        return self.folder

    def _read_index(self, index: Path, base: str, part: str | None) -> None:
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{index} has no weight_map")
        if strange := [file for file in weight_map.values() if not isinstance(file, str)]:
            raise ValueError(f"{index}: cannot read {strange[0]!r:.80}, which is no file in {self.folder}")
        wanted, self.left = only(weight_map, part)
        for file in set(wanted.values()):
            if Path(file).name != file or not os.path.isfile(self.folder / file):
                raise ValueError(f"{index}: cannot read {file!r:.80}, which is no file in {self.folder}")
        for key, file in wanted.items():
            if key not in self._keys_of(file):
                raise ValueError(f"{index} says that {key} is in {file}, but it is not")
            self._where[key] = file
        used = set(weight_map.values())
        if base not in used and (self.folder / base).is_file():
            raise ValueError(
                f"{self.folder} contains two saved models, {base} and {index.name} with its shards: remove one"
            )
        if len(counts := {n for file in used for n in re.findall(r"-of-(\d+)\.", file)}) > 1:
            raise ValueError(f"{index} mixes shards of two saved models: of {' and of '.join(sorted(counts))}")
        for file in sorted(set(wanted.values())):
            if extra := sorted(key for key in self._keys_of(file) if weight_map.get(key) != file):
                raise ValueError(
                    f"{self.folder / file} belongs to another save than {index.name}: it also has {extra[0]}"
                )

    def _handle(self, file: str) -> Any:
        if file not in self._open:
            content = open_weights(self.folder / file)
            if not hasattr(content, "keys"):
                raise ValueError(f"{self.folder / file} must hold tensors by name, found {type(content).__name__}")
            self._open[file] = content
        return self._open[file]

    def _in_file(self, key: str) -> str:
        """The name in the file of a tensor of the model."""
        return key

    def _keys_of(self, file: str) -> set[str]:
        return set(self._handle(file).keys())

    def _headers(self) -> Iterator[tuple[str, tuple[int, ...], str]]:
        for key, file in self._where.items():
            handle, name = self._handle(file), self._in_file(key)
            if isinstance(handle, dict):
                if not isinstance(handle[name], torch.Tensor):
                    raise ValueError(
                        f"{self.folder / file}: {key} is not a tensor, found {type(handle[name]).__name__}"
                    )
                yield key, tuple(handle[name].shape), str(handle[name].dtype).removeprefix("torch.")
            else:
                header = handle.get_slice(name)
                yield key, tuple(header.get_shape()), _DTYPE_NAMES.get(header.get_dtype(), header.get_dtype())

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor; reads headers only."""
        return {key: shape for key, shape, _ in self._headers()}

    def dtypes(self) -> dict[str, str]:
        """Name and dtype (``"bfloat16"`` ...) of every tensor; reads headers only."""
        return {key: dtype for key, _, dtype in self._headers()}

    def __getitem__(self, key: str) -> torch.Tensor:
        if self._since_release > self.RELEASE_BYTES:
            self._open = {file: handle for file, handle in self._open.items() if isinstance(handle, dict)}
            self._since_release = 0
        handle, name = self._handle(self._where[key]), self._in_file(key)
        try:
            tensor = handle[name] if isinstance(handle, dict) else handle.get_tensor(name)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise ValueError(f"cannot read {key} of {self.folder / self._where[key]}: {error}") from error
        self._since_release += tensor.numel() * tensor.element_size()
        return tensor


@dataclass(frozen=True)
class Recipe:
    """One target tensor: ``build`` of the source tensors with these names (must also work on meta tensors)."""

    sources: tuple[str, ...]
    build: Callable[..., torch.Tensor] = lambda tensor: tensor


@dataclass
class WeightPlan:
    """How a source checkpoint fills a model: a recipe per target tensor; source tensors left out, with the reason."""

    recipes: dict[str, Recipe] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)


def plan_problems(
    plan: WeightPlan, source: Mapping[str, tuple[int, ...]], target: Mapping[str, tuple[int, ...]]
) -> list[tuple[str, str, str]]:
    """The problems of a plan: rows (kind, tensor, detail) with kind missing, unexpected or mis-shaped."""
    problems = []
    used = set(plan.dropped)
    for name, shape in target.items():
        recipe = plan.recipes.get(name)
        absent = [key for key in recipe.sources if key not in source] if recipe else [name]
        if recipe is None or absent:
            problems.append(("missing", name, f"not in the checkpoint: {', '.join(absent)}"))
            continue
        used.update(recipe.sources)
        found = [source[key] for key in recipe.sources]
        try:
            built: object = tuple(recipe.build(*(torch.empty(s, device="meta") for s in found)).shape)
        except RuntimeError as error:
            built = str(error).splitlines()[0]
        if built != tuple(shape):
            problems.append(("mis-shaped", name, f"the checkpoint has {built}, the config needs {tuple(shape)}"))
    problems += [
        ("unexpected", key, f"{tuple(shape)} is not in the model") for key, shape in source.items() if key not in used
    ]
    return problems


def dtype_problems(dtypes: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """Rows as :func:`plan_problems` makes them, for tensors that cannot be weights (integers, bytes, 8-bit floats)."""
    wanted = ", ".join(WEIGHT_DTYPES)
    return [
        ("wrong dtype", key, f"{dtype}; weights are one of {wanted}")
        for key, dtype in dtypes.items()
        if dtype not in WEIGHT_DTYPES
    ]


def describe_problems(problems: list[tuple[str, str, str]], limit: int = 8) -> str:
    """The problems as text: how many of each kind, and the first few by name."""
    counts = Counter(kind for kind, _, _ in problems)
    lines = [f"  {kind}: {name}: {detail}" for kind, name, detail in problems[:limit]]
    if len(problems) > limit:
        lines.append(f"  ... and {len(problems) - limit} more")
    return ", ".join(f"{n} {kind}" for kind, n in counts.items()) + "\n" + "\n".join(lines)


def zero3_enabled() -> bool:
    """Whether this process trains under DeepSpeed ZeRO-3 (parameters are partitioned as modules are made)."""
    from transformers.integrations import is_deepspeed_zero3_enabled

    return is_deepspeed_zero3_enabled()


@contextlib.contextmanager
def construction(dtype: torch.dtype) -> Iterator[None]:
    """Make modules without spending time or memory on weights that will be overwritten.

    On the meta device, or, under ZeRO-3, partitioned over the ranks by ``deepspeed.zero.Init``.
    """
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        if zero3_enabled():
            import deepspeed
            from transformers.integrations.deepspeed import deepspeed_config

            with torch.device("cpu"), deepspeed.zero.Init(config_dict_or_path=deepspeed_config()):
                yield
        else:
            with torch.device("meta"):
                yield
    finally:
        torch.set_default_dtype(previous)


def replace_parameter(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Replace the parameter of this name in a module.

    Not through ``register_parameter``, as the public ways go (torch 2.1 to 2.13): loaders replace that method to keep
    weights on the meta device, and would send this one back there.
    """
    module._parameters[name] = parameter


def assign(module: nn.Module, name: str, value: torch.Tensor, device: torch.device) -> None:
    """Give one parameter its value, whatever state it is in: ordinary, on meta, or partitioned by ZeRO-3."""
    owner_name, _, leaf = name.rpartition(".")
    owner = module.get_submodule(owner_name)
    parameter = owner.get_parameter(leaf)
    with torch.no_grad():
        if hasattr(parameter, "ds_id"):
            import deepspeed

            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
                    parameter.copy_(value)
        elif parameter.is_meta:
            real = value.detach().to(device=device, dtype=parameter.dtype, copy=True)
            replace_parameter(owner, leaf, nn.Parameter(real, requires_grad=parameter.requires_grad))
        else:
            parameter.copy_(value)


def parameter_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name and full shape of every parameter, partitioned ones included."""
    return {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in module.named_parameters()}


def check_finite(tensors: Iterable[tuple[str, torch.Tensor]], where: object) -> None:
    """Raises ``ValueError`` that names the first tensor with NaN or infinity; ``where`` is what has it."""
    for name, tensor in tensors:
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"the weights of {where} are damaged: NaN or infinity in {name}")


def load_weights(module: nn.Module, plan: WeightPlan, source: WeightFiles, device: torch.device | str = "cpu") -> None:
    """Fill every parameter of ``module`` from ``source``, one tensor at a time.

    Raises ``ValueError`` before anything is read if a tensor is missing, unexpected, mis-shaped or not floating-point;
    and for NaN or infinity in one.
    """
    shapes = parameter_shapes(module)
    dtypes = {key: dtype for key, dtype in source.dtypes().items() if key not in plan.dropped}
    if problems := plan_problems(plan, source.shapes(), shapes) + dtype_problems(dtypes):
        raise ValueError(
            f"the weights of {source.name} do not fit {type(module).__name__}: {describe_problems(problems)}"
        )
    for name in shapes:
        recipe = plan.recipes[name]
        tensor = recipe.build(*(source[key] for key in recipe.sources))
        check_finite([(recipe.sources[0], tensor)], source.name)
        assign(module, name, tensor, torch.device(device))
