"""The one place where attention backends meet: :func:`varlen_attention` and the table behind it.

A backend is a module of this package with

``VARLEN``
    whether one kernel takes the packed batch (then ``torch.compile`` can see through it), or it goes by lengths;
``missing_package``
    None, or what to install (optional);
``why_not(device, dtype, head_dim) -> str | None``
    None if it can run such tensors here, else the reason in words (cheap, no device work);
``attend(q, k, v, segments, scale) -> Tensor``
    the attention itself.

Adding one: write the module, add its line to :data:`BACKENDS` and, if ``auto`` may choose it, to :data:`AUTO_ORDER`.
"""

from __future__ import annotations

import functools
import logging
import math
from importlib import import_module
from types import ModuleType

import torch

from ..packing import PackedSegments

logger = logging.getLogger(__name__)

BACKENDS: dict[str, str] = {
    "flash_attention_2": "flash_attention_2",
    "torch_varlen": "torch_varlen",
    "sdpa": "sdpa",
    "eager": "eager",
}
_LOADED: dict[str, ModuleType] = {}
AUTO_ORDER: tuple[str, ...] = ("flash_attention_2", "torch_varlen", "sdpa")


def backend_module(name: str) -> ModuleType:
    """Return the module of a backend. Raises ``ValueError`` for a name that is not in :data:`BACKENDS`."""
    if name not in BACKENDS:
        raise ValueError(f"unknown attention backend {name!r}; choose auto or one of {', '.join(BACKENDS)}")
    if name not in _LOADED:
        _LOADED[name] = import_module(f".{BACKENDS[name]}", __name__)
    return _LOADED[name]


@functools.cache
def resolve_backend(name: str, device_type: str, dtype: torch.dtype, head_dim: int) -> str:
    """Turn ``auto`` into the best backend that runs such tensors here; check any other name. Logs each choice once.

    Raises ``ImportError`` (with the install command) for a backend whose package is missing and ``ValueError`` for one
    that cannot take the device, dtype or head width.
    """
    device = torch.device(device_type)
    if name != "auto":
        module = backend_module(name)
        if missing := getattr(module, "missing_package", None):
            raise ImportError(missing)
        if reason := module.why_not(device, dtype, head_dim):
            raise ValueError(f"attention backend {name!r} cannot run {dtype} heads of {head_dim} on {device}: {reason}")
        chosen = name
    else:
        chosen = next(n for n in AUTO_ORDER if backend_module(n).why_not(device, dtype, head_dim) is None)
    logger.info("attention backend: %s (asked: %s; %s, %s, head width %d)", chosen, name, device, dtype, head_dim)
    return chosen


def varlen_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    *,
    lengths: tuple[int, ...] | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Full (non-causal) attention inside each segment of a packed batch; segments never see each other.

    Args:
        q, k, v: ``[N, heads, head_dim]``, one dtype, one device. No ``N x N`` mask is ever built.
        cu_seqlens: ``[segments + 1]`` int32 running sums of the segment lengths, starting at 0.
        max_seqlen: the longest segment, a Python int (a tensor would cost a device synchronisation per layer).
        lengths: the segment lengths on the host. Backends without a varlen kernel need them; left out, they are read
            from ``cu_seqlens``, which synchronises if that lies on a GPU.
        scale: softmax scale, ``head_dim ** -0.5`` if left out.
        backend: a key of :data:`BACKENDS`, or ``auto``.

    Returns:
        ``[N, heads, head_dim]`` in the dtype of ``q``.

    Raises:
        TypeError: ``max_seqlen`` is not an int.
        ValueError: shapes that do not fit, an unknown backend, or one that cannot run these tensors.
        ImportError: ``flash_attention_2`` asked for by name where flash-attn is not installed.
    """
    if not isinstance(max_seqlen, (int, torch.SymInt)):
        raise TypeError(f"max_seqlen must be a Python int, got {type(max_seqlen).__name__}")
    if q.dim() != 3 or q.shape != k.shape or q.shape != v.shape:
        raise ValueError(f"q, k, v must all be [N, heads, head_dim], got {[tuple(x.shape) for x in (q, k, v)]}")
    if lengths is None and not torch.compiler.is_compiling():
        lengths = tuple(cu_seqlens.diff().tolist())
    segments = PackedSegments(cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, lengths=lengths or ())
    return attend(q, k, v, segments, scale=scale, backend=backend)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    segments: PackedSegments,
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """:func:`varlen_attention` for metadata that exists already (the encoder's own entry)."""
    head_dim = q.shape[-1]
    if not torch.compiler.is_compiling():
        backend = resolve_backend(backend, q.device.type, q.dtype, head_dim)
    return _LOADED[backend].attend(q, k, v, segments, 1.0 / math.sqrt(head_dim) if scale is None else scale)
