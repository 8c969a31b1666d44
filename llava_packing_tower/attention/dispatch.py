"""The attention backends: :func:`varlen_attention`, and the table that it chooses from.

A backend is a module of this package with

``VARLEN``
    whether one kernel takes the packed batch (then ``torch.compile`` can trace it), or it loops over the segments;
``EQUAL_LENGTHS_ONLY``
    True if all segments must have one length (optional);
``CAUSAL``
    False if it has no causal attention (optional);
``CHECKED``
    True if its first results are to be compared with plain attention (for kernels of other packages; optional);
``missing_package``
    None, or what to install (optional);
``unsupported_reason(device, dtype, head_dim, needs_grad) -> str | None``
    None if it can run such tensors here, else the reason in words (cheap, no device work);
``attend(q, k, v, segments, scale, causal=False) -> Tensor``
    the attention itself, ``[N, heads, head_dim]`` in and out; only the decoder uses ``causal`` and fewer heads of ``k``
    and ``v``;
``Attention``
    an autograd function with the arguments ``(q, k, v, segments, scale)``, if ``attend`` without ``causal`` is no more
    than that (optional: fused blocks call it in their own backward pass).

Adding one: write the module, add its line to :data:`BACKENDS` and, if ``auto`` may choose it, to :func:`auto_order`.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType

import torch

from ..data.segments import VarlenMetadata
from ..utils.tracing import traced
from .self_check import self_check_error

logger = logging.getLogger(__name__)

BACKENDS: dict[str, str] = {
    "flash_attention_2": "flash_attention_2",
    "flash_attention_3": "flash_attention_3",
    "flash_attention_4": "flash_attention_4",
    "torch_varlen": "torch_varlen",
    "cudnn": "cudnn",
    "sdpa": "sdpa",
    "eager": "eager",
}
_LOADED: dict[str, ModuleType] = {}

LONG_FROM, FA4_FORWARD_FROM = 256, 360  # tokens per segment, on average
CUDNN_FROM, CUDNN_TRAINING_BELOW = 256, 512
FA3_TRAINING_FROM, FA4_TRAINING_FROM, ALONE_SHORT = 16384, 7168, 1024  # tokens


def auto_order(lengths: Sequence[int], needs_grad: bool = False) -> tuple[str, ...]:
    """The backends that ``auto`` tries for segments of these lengths, fastest first; the first that can run is taken.

    Measured on an H100 in bf16 (docs/performance.md has the table). Forward: cuDNN for equal lengths from 256 tokens on
    (within a sixth of the fastest for heads of 64, a quarter for 72); else FA3 from a mean length of 256 on, or FA4
    from 360 on; FA2 (or the same kernel inside torch) for the rest. Training: FA4 from a mean length of 256 on (for
    heads of 64 in 0.54 to 0.7 of FA2's time from 360 on, about as fast at 256), but cuDNN for equal lengths below 512.
    Small batches get FA2, since the host is what they wait for and FA4's Python takes more of its time: 7,785 tokens
    were a tenth faster with FA4 in a tower, 6,051 a tenth slower in a decoder on a slow host. Without FA4, FA3 takes
    large batches.

    cuDNN builds a plan per shape, in tens of milliseconds, and its graphs are captured per shape. Images one by one are
    seldom of one shape, so a segment alone is given to it only where nothing else is installed; in inference a short
    one gets FA2, whose latency was measured. All kernels for segments are tried before ``sdpa``, which has a loop.
    """
    tokens, count = sum(lengths), len(lengths)
    equal = count > 0 and min(lengths) == max(lengths) >= CUDNN_FROM
    order: list[str] = []
    if count and tokens >= LONG_FROM * count and (needs_grad or count > 1 or tokens > ALONE_SHORT):
        fa3 = ["flash_attention_3"] * (not needs_grad or tokens >= FA3_TRAINING_FROM)
        fa4 = ["flash_attention_4"] * (tokens >= (FA4_TRAINING_FROM if needs_grad else FA4_FORWARD_FROM * count))
        order = [*fa4, *fa3] if needs_grad else [*fa3, *fa4]
    if equal and count > 1:
        order.insert(int(needs_grad and lengths[0] >= CUDNN_TRAINING_BELOW), "cudnn")
    order += ["flash_attention_2", "torch_varlen", "flash_attention_3", "flash_attention_4", *["cudnn"] * equal, "sdpa"]
    return tuple(dict.fromkeys(order))


def backend_module(name: str) -> ModuleType:
    """Return the module of a backend. Raises ``ValueError`` for a name that is not in :data:`BACKENDS`."""
    if name not in BACKENDS:
        raise ValueError(f"unknown attention backend {name!r}; choose auto or one of {', '.join(BACKENDS)}")
    if name not in _LOADED:
        _LOADED[name] = import_module(f".{BACKENDS[name]}", __package__)
    return _LOADED[name]


def is_causal(name: str) -> bool:
    """Whether a backend has causal attention, which a decoder needs."""
    return getattr(backend_module(name), "CAUSAL", True)


@torch.compiler.disable
def resolve_backend(
    name: str,
    device: torch.device | str,
    dtype: torch.dtype,
    head_dim: int,
    *,
    lengths: Sequence[int] = (),
    needs_grad: bool = False,
    causal: bool = False,
) -> str:
    """Turn ``auto`` into the best backend for such tensors here; check any other name. Logs each new choice once.

    causal: for a decoder, whose ``k`` and ``v`` may have fewer heads.

    Kernels that others built are run on random segments first, once per kind of tensors (:mod:`self_check`).

    Raises ``ImportError`` (with the install command) for a backend whose package is missing and ``ValueError`` for one
    that cannot take the device, dtype, head width, lengths, that has no backward where one is needed, or is wrong.
    """
    candidates, device = auto_order(lengths, needs_grad) if name == "auto" else (name,), torch.device(device)
    choose = _choose if _can_check(device) else _choose.__wrapped__  # what could not be checked is not kept
    chosen = choose(candidates, name, device, dtype, head_dim, needs_grad, causal)
    if name != "auto" and getattr(backend_module(name), "EQUAL_LENGTHS_ONLY", False) and len(set(lengths)) > 1:
        raise ValueError(
            f"attention backend {name!r} needs segments of one length, got {min(lengths)} to {max(lengths)}"
        )
    return chosen


@functools.cache
def _choose(
    candidates: tuple[str, ...],
    asked: str,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    needs_grad: bool,
    causal: bool,
) -> str:
    reason = None
    for name in candidates:
        module = backend_module(name)
        if causal and not is_causal(name):
            reason = "it has no causal attention"
            continue
        if asked != "auto" and (missing := getattr(module, "missing_package", None)):
            raise ImportError(missing)
        reason = module.unsupported_reason(device, dtype, head_dim, needs_grad)
        if reason is None and getattr(module, "CHECKED", False):
            reason = _checked(name, device, dtype, head_dim, needs_grad, causal)
        if reason is None:
            _log_choice(name, asked, device.type, dtype, head_dim, causal)
            return name
    raise ValueError(f"attention backend {asked!r} cannot run {dtype} with head width {head_dim} on {device}: {reason}")


_verdicts: dict[tuple, str | None] = {}


def _checked(
    name: str, device: torch.device, dtype: torch.dtype, head_dim: int, needs_grad: bool, causal: bool
) -> str | None:
    """What :func:`self_check_error` says of a backend for this kind of tensors: it is asked once."""
    key = (name, device, dtype, head_dim, needs_grad, causal)
    if key not in _verdicts:
        if not _can_check(device):
            return None
        _verdicts[key] = self_check_error(backend_module(name), *key[1:])
        if _verdicts[key] is not None:
            logger.warning("attention backend %s, %s, head width %d: %s", name, dtype, head_dim, _verdicts[key])
    return _verdicts[key]


def _can_check(device: torch.device) -> bool:
    """Whether kernels can be tried out now: not while something is traced or a CUDA graph is captured."""
    if traced():
        return False
    return device.type != "cuda" or not torch.cuda.is_initialized() or not torch.cuda.is_current_stream_capturing()


@functools.cache
def _log_choice(name: str, asked: str, device_type: str, dtype: torch.dtype, head_dim: int, causal: bool) -> None:
    whose = "attention of the packed decoder" if causal else "attention backend"
    logger.info("%s: %s (requested: %s; %s, %s, head width %d)", whose, name, asked, device_type, dtype, head_dim)


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
        cu_seqlens: int32 ``[segments + 1]``, cumulative segment lengths, starting at 0.
        max_seqlen: the longest segment, a Python int (a tensor would cost a device synchronization per layer).
        lengths: the segment lengths on the host. Backends without a varlen kernel need them; left out, they are read
            from ``cu_seqlens``, which synchronizes if that lies on a GPU.
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
    segments = VarlenMetadata(cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, lengths=lengths or ())
    return attend(q, k, v, segments, scale=scale, backend=backend)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    segments: VarlenMetadata,
    *,
    scale: float | None = None,
    backend: str = "auto",
    resolved: bool = False,
) -> torch.Tensor:
    """:func:`varlen_attention` with metadata that exists already, as the encoder has it.

    q, k, v: ``[N, heads, head_dim]``, as is the result. resolved: ``backend`` is from :func:`resolve_backend` for such
    tensors, and need not be checked again; otherwise ``ValueError`` or ``ImportError`` where it cannot be used.
    """
    head_dim = q.shape[-1]
    if not resolved and not torch.compiler.is_compiling():
        needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
        backend = resolve_backend(backend, q.device, q.dtype, head_dim, lengths=segments.lengths, needs_grad=needs_grad)
    return _LOADED[backend].attend(q, k, v, segments, 1.0 / math.sqrt(head_dim) if scale is None else scale)
