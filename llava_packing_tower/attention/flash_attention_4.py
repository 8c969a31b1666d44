"""FlashAttention-4 (https://github.com/Dao-AILab/flash-attention, package ``flash-attn-4``): forward and backward for
Hopper and Blackwell, built by CuTe's compiler when first called: there is nothing to build when it is installed.

Compiled, it goes in as an operator of its own: torch.compile cannot look into it.
"""

from __future__ import annotations

import functools
import inspect
import logging
import threading
import warnings
from collections.abc import Callable, Sequence

import torch
from torch.autograd.function import once_differentiable

from ..data.segments import VarlenMetadata
from . import eager
from .recorded_launches import Launches, watched
from .self_check import apart, close, random_segments, results

logger = logging.getLogger(__name__)

VARLEN = True
INSTALL = 'pip install --pre "flash-attn-4[cu13]" (without [cu13] for CUDA 12)'
RIGHT_BACKWARD = (64, 96, 128)  # 4.0.0b36 on Hopper: the gradient of q is wrong for heads of 72
_NEEDED = {"cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "softmax_scale"}

missing_package = None
try:
    from flash_attn.cute import interface
    from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd

    warnings.filterwarnings("ignore", "Argument aux_data .* cannot be converted", UserWarning)  # of its own compiler
    if not set(inspect.signature(_flash_attn_bwd).parameters) >= _NEEDED:
        missing_package = (  # flash-attn 2 comes with an early copy of it
            "attention backend 'flash_attention_4' needs a flash-attn-4 whose backward takes segments, this one does "
            f"not. Install it: {INSTALL}"
        )
except Exception as error:  # whatever a wrong mix of versions raises: it must not take the other backends down
    reason = f"{type(error).__name__}: {error}"
    missing_package = f"attention backend 'flash_attention_4' needs the flash-attn-4 package ({reason}): {INSTALL}"


def unsupported_reason(device: torch.device, dtype: torch.dtype, head_dim: int, needs_grad: bool = False) -> str | None:
    if device.type != "cuda":
        return "needs a CUDA GPU"
    if torch.cuda.get_device_capability()[0] < 9:
        return "needs a Hopper or Blackwell GPU"
    if dtype not in (torch.float16, torch.bfloat16):
        return "takes float16 and bfloat16 only"
    if head_dim % 8 or head_dim > 128:
        return "head width must be a multiple of 8 and at most 128"
    if needs_grad and head_dim not in RIGHT_BACKWARD:
        return f"its gradients are known to be right for heads of {', '.join(map(str, RIGHT_BACKWARD))} only"
    return missing_package


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: VarlenMetadata, scale: float) -> torch.Tensor:
    if torch.compiler.is_compiling():
        return _operator(q, k, v, segments.cu_seqlens, segments.max_seqlen, scale)[0]
    return Attention.apply(q, k, v, segments, scale)


def _on_its_device(function: Callable) -> Callable:
    """The tensors need not lie on the current device (``device_map="auto"``)."""

    @functools.wraps(function)
    def run(first: torch.Tensor, *rest: object) -> tuple[torch.Tensor, ...]:
        index = first.device.index
        if index is None or index == torch.cuda.current_device():
            return function(first, *rest)
        with torch.cuda.device(index):
            return function(first, *rest)

    return run


@_on_its_device
def _forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output ``[N, heads, head_dim]``, and the logarithms of the sums, float32 ``[heads, N]``."""
    launches = _launches("forward", (q, k, v), cu_seqlens, scale)
    if launches is None:
        return _package_forward(q, k, v, cu_seqlens, max_seqlen, scale)
    tokens, heads, _ = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    logsumexp = torch.empty(heads, tokens, dtype=torch.float32, device=q.device)
    launches((*_detached(q, k, v), out, logsumexp, cu_seqlens), cu_seqlens.shape[0] - 1)
    return out, logsumexp


@_on_its_device
def _backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v, each ``[N, heads, head_dim]`` in memory of its own."""
    grad = grad.contiguous()
    grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)]
    launches = _launches("backward", (q, k, v, grad), cu_seqlens, scale)
    if launches is None:
        _package_backward(grad, q, k, v, out, logsumexp, grads, cu_seqlens, max_seqlen, scale)
    else:
        q, k, v, out = _detached(q, k, v, out)
        launches((q, k, v, out, grad, logsumexp, *grads, cu_seqlens), cu_seqlens.shape[0] - 1)
    return tuple(grads)


def _detached(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """CuTe takes no tensors that require a gradient."""
    return tuple(x.detach() if x.requires_grad else x for x in tensors)


def _package_forward(q, k, v, cu_seqlens, max_seqlen, scale) -> tuple[torch.Tensor, torch.Tensor]:
    out, logsumexp, *_ = _flash_attn_fwd(
        *(q, k, v),
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=cu_seqlens,
        max_seqlen_q=max_seqlen,
        max_seqlen_k=max_seqlen,
        softmax_scale=scale,
        return_lse=True,
    )
    return out, logsumexp


def _package_backward(grad, q, k, v, out, logsumexp, grads, cu_seqlens, max_seqlen, scale) -> None:
    _flash_attn_bwd(
        *(q, k, v, out, grad, logsumexp),
        softmax_scale=scale,
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=cu_seqlens,
        max_seqlen_q=max_seqlen,
        max_seqlen_k=max_seqlen,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        **dict(zip(("dq", "dk", "dv"), grads)),
    )


# ---------------------------------------------------------------- the same kernels without the package's Python

_known: dict[tuple, Launches | None] = {}
_learning = threading.Lock()
_ERRORS = (ValueError, TypeError, RuntimeError, AttributeError, KeyError, IndexError)
MOST_SEGMENTS = 256  # for more the package adds a kernel that helps to find them


def _launches(what: str, tensors: tuple[torch.Tensor, ...], cu_seqlens: torch.Tensor, scale: float) -> Launches | None:
    """How to launch the kernels of a ``forward`` or ``backward`` for such tensors; None to go through the package.

    Learnt once per kind from calls on random segments, and taken only if it gives the package's results on others.
    """
    q = tensors[0]
    key = (what, q.device, q.dtype, q.shape[1:], scale)
    if torch.are_deterministic_algorithms_enabled() or cu_seqlens.shape[0] > MOST_SEGMENTS:
        return None
    if key not in _known:
        if torch.cuda.is_current_stream_capturing():
            return None
        with _learning:
            if key not in _known:
                _known[key] = _learn(what, q, scale)
    if (launches := _known[key]) is None:
        return None
    return launches if all(map(_aligned, tensors)) else None


def _aligned(x: torch.Tensor) -> bool:
    row, head, lane = x.stride()
    return lane == 1 and row and head and row % 8 == 0 and head % 8 == 0 and x.data_ptr() % 16 == 0


@torch.inference_mode(False)
@torch.no_grad()
def _learn(what: str, like: torch.Tensor, scale: float) -> Launches | None:
    """Also looks whether the package itself is right, which it is not for all heads: raises ``RuntimeError`` if not."""
    first, second = _Trial((300, 517, 270), like, scale), _Trial((290, 411), like, scale)
    with watched(interface) as seen:
        given, got = first.through_the_package(what)
    if not all(map(close, got, first.exact(what))):
        raise RuntimeError(
            f"flash-attn-4's {what} is wrong for heads of {like.shape[2]} in {like.dtype} on "
            f"{torch.cuda.get_device_name(like.device)}: take another version or another backend (mm_packing_attention)"
        )
    if torch.cuda.get_device_capability(like.device)[0] != 9:  # there the kernels are told how long segments are
        return None
    try:
        launches = Launches(seen, given, 3)
        given, got = second.through_the_package(what)
        wanted = [x.clone() for x in got]
        for x in got:
            x.fill_(torch.nan)
        launches(given, 2)
        if all(map(close, got, wanted)):
            return launches
        error = "its results are others"
    except _ERRORS as raised:
        error = f"{type(raised).__name__}: {raised}"
    logger.warning("flash-attn-4's %s cannot be launched directly, the package is called each time: %s", what, error)
    return None


class _Trial:
    """Random segments of these lengths, and what the package makes of them."""

    def __init__(self, lengths: tuple[int, ...], like: torch.Tensor, scale: float) -> None:
        made = random_segments(lengths, *like.shape[1:], like.device, like.dtype)
        self.heads, self.grad, self.segments = made
        self.rest = self.segments.cu_seqlens, self.segments.max_seqlen, scale
        self.out = _package_forward(*self.heads, *self.rest)

    def through_the_package(self, what: str) -> tuple[tuple[torch.Tensor, ...], Sequence[torch.Tensor]]:
        """The tensors of the call as :class:`Launches` is given them, and the results among them."""
        if what == "forward":
            got = _package_forward(*self.heads, *self.rest)
            return (*self.heads, *got, self.rest[0]), got
        got = [torch.empty_like(x) for x in self.heads]
        _package_backward(self.grad, *self.heads, *self.out, got, *self.rest)
        return (*self.heads, self.out[0], self.grad, self.out[1], *got, self.rest[0]), got

    def exact(self, what: str) -> Sequence[torch.Tensor]:
        """The first results in float32, by other means."""
        heads, grad = [x.float() for x in self.heads], None if what == "forward" else self.grad.float()
        with apart(self.grad.device, grad is not None):
            wanted = results(eager.attend, heads, self.segments, self.rest[2], grad)
        return wanted if grad is None else wanted[1:]


class Attention(torch.autograd.Function):
    """Forward and backward without the package's own function around them."""

    @staticmethod
    def forward(ctx, q, k, v, segments, scale):
        out, logsumexp = _forward(q, k, v, segments.cu_seqlens, segments.max_seqlen, scale)
        ctx.save_for_backward(q, k, v, out, logsumexp, segments.cu_seqlens)
        ctx.max_seqlen, ctx.scale = segments.max_seqlen, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return *_backward(grad, *ctx.saved_tensors, ctx.max_seqlen, ctx.scale), None, None


if hasattr(torch.library, "custom_op"):
    _options = {"mutates_args": (), "device_types": "cuda"}
    _operator = torch.library.custom_op("llava_packing::flash_attention_4", _forward, **_options)
    _operator_backward = torch.library.custom_op("llava_packing::flash_attention_4_backward", _backward, **_options)

    @_operator.register_fake
    def _(q, k, v, cu_seqlens, max_seqlen, scale):
        tokens, heads, _ = q.shape
        return q.new_empty(q.shape), q.new_empty((heads, tokens), dtype=torch.float32)

    @_operator_backward.register_fake
    def _(grad, q, k, v, out, logsumexp, cu_seqlens, max_seqlen, scale):
        return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)

    def _setup(ctx, inputs, output) -> None:
        q, k, v, cu_seqlens, ctx.max_seqlen, ctx.scale = inputs
        ctx.save_for_backward(q, k, v, *output, cu_seqlens)

    def _differentiate(ctx, grad, *_unused):
        return *_operator_backward(grad, *ctx.saved_tensors, ctx.max_seqlen, ctx.scale), None, None, None

    _operator.register_autograd(_differentiate, setup_context=_setup)
elif missing_package is None:
    missing_package = f"attention backend 'flash_attention_4' needs torch 2.4 or newer, this is {torch.__version__}"
