"""The kernels of the fused blocks in plain torch: their definition, used where there is no GPU.

Shapes: ``N`` tokens; ``partials [P, columns]`` are sums over parts of the tokens, made by :func:`partials` and added up
by :func:`finish`; every column of them is written by exactly one operation.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from .rotary import ROTATE, rotary_backward, wide


def add_norm(
    x: torch.Tensor,
    pending: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    rms: bool,
    pending_bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``total = x + pending`` (+ ``pending_bias [width]``) in the dtype of x, and its norm (``rms``: RMSNorm, else
    LayerNorm).

    Returns total (``x`` itself with nothing pending), normed, and ``stats``, float32 ``[2, N]``: mean (0 for RMSNorm)
    and reciprocal deviation.
    """
    total = x if pending is None else x + (pending if pending_bias is None else pending + pending_bias)
    normed, mean, deviation = _normed(wide(total), weight, bias, eps, rms, x.dtype)
    return total, normed, torch.cat([mean, deviation], 1).t().contiguous()


def row_norm(
    x: torch.Tensor,
    row: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    rms: bool,
    row_bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The norm of ``x + row``, where ``row [width]`` is the same for all tokens (None: zeros), and ``row + row_bias``,
    in float32, for what comes next. So the biases of a block need not be written into the sum of all blocks.

    (FSDP's mixed precision casts the row between blocks, which rounds it.)
    """
    value = wide(x) if row is None else wide(x) + wide(row)
    normed, _, _ = _normed(value, weight, bias, eps, rms, x.dtype)
    if row_bias is None:
        return normed, row
    return normed, wide(row_bias).clone() if row is None else wide(row) + wide(row_bias)


def _normed(centred: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float, rms: bool, dtype):
    """The norm of values in ``dtype``, their mean and reciprocal deviation, both ``[N, 1]``."""
    mean = centred.new_zeros(len(centred), 1) if rms else centred.mean(1, keepdim=True)
    centred = centred - mean
    deviation = torch.rsqrt(centred.square().mean(1, keepdim=True) + eps)
    return _scaled(centred * deviation, weight, bias, rms, dtype), mean, deviation


def _scaled(unit: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, rms: bool, dtype: torch.dtype):
    """RMSNorm rounds before it multiplies (layers.RMSNorm), LayerNorm behind it."""
    if rms:
        return weight * unit.to(dtype)
    return (unit * wide(weight) + (0 if bias is None else wide(bias))).to(dtype)


def norm_backward(
    total: torch.Tensor,
    stats: torch.Tensor,
    grad: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    rms: bool,
    partials: torch.Tensor,
    offset: int,
    passing: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient of ``total`` from that of its norm (whose memory may be taken), plus the ``residual`` gradient; and the
    norm once more.

    Three times ``width`` columns of ``partials``, from ``offset`` on: gradients of weight and bias, and the column sums
    of the gradient returned. With ``passing`` a fourth: the column sums of ``residual``.
    """
    width = total.shape[1]
    mean, deviation = stats[:, :, None]
    unit = (wide(total) - mean) * deviation
    weighted = wide(grad) * wide(weight)
    inner = weighted - unit * (unit * weighted).mean(1, keepdim=True)
    if not rms:
        inner = inner - weighted.mean(1, keepdim=True)
    out = inner * deviation
    out = (out if residual is None else out + wide(residual)).to(total.dtype)
    columns = partials[:, offset : offset + (3 + passing) * width].view(-1, 3 + passing, width)
    columns[:, 0] = (wide(grad) * (wide(unit.to(total.dtype)) if rms else unit)).sum(0)
    columns[:, 1] = wide(grad).sum(0)
    columns[:, 2] = wide(out).sum(0)
    if passing:
        assert residual is not None
        columns[:, 3] = wide(residual).sum(0)
    return out, _scaled(unit, weight, bias, rms, total.dtype)


ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


def _plus(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return wide(x) if bias is None else wide(x) + wide(bias)


def act(
    name: str,
    inner: torch.Tensor,
    inner_bias: torch.Tensor | None,
    factor: torch.Tensor | None = None,
    factor_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """``activation(inner + inner_bias)``, times ``factor + factor_bias`` where the MLP is gated."""
    out = ACTIVATIONS[name](_plus(inner, inner_bias))
    return (out if factor is None else out * _plus(factor, factor_bias)).to(inner.dtype)


def act_backward(
    name: str,
    inner: torch.Tensor,
    inner_bias: torch.Tensor | None,
    factor: torch.Tensor | None,
    factor_bias: torch.Tensor | None,
    grad: torch.Tensor,
    partials: torch.Tensor,
    offset: int,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Gradients of ``inner`` (in the memory of ``grad``, it may be) and ``factor``, their column sums (one or two times
    the width) in ``partials``, and what :func:`act` returned."""
    with torch.enable_grad():
        source = _plus(inner, inner_bias).detach().requires_grad_()
        out = ACTIVATIONS[name](source)
    upstream = wide(grad) if factor is None else wide(grad) * _plus(factor, factor_bias)
    grads = [torch.autograd.grad(out, source, upstream)[0].to(inner.dtype)]
    if factor is not None:
        grads.append((wide(grad) * out.detach()).to(inner.dtype))
    width = inner.shape[1]
    for index, part in enumerate(grads):
        partials[:, offset + index * width : offset + (index + 1) * width] = wide(part).sum(0)
    again = act(name, inner, inner_bias, factor, factor_bias)
    return grads[0], grads[1] if factor is not None else None, again


def rotate_(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, kind: str) -> None:
    """Rotate q and k of ``qkv [N, 3, heads, head_dim]`` where they are; ``kind``: a key of ``ROTATE``."""
    both = wide(qkv[:, :2])
    qkv[:, :2] = (both * cos[:, None] + ROTATE[kind](both) * sin[:, None]).to(qkv.dtype)


def qkv_backward(
    grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    rotary: tuple[torch.Tensor, torch.Tensor] | None,
    kind: str | None,
    partials: torch.Tensor,
    offset: int,
) -> torch.Tensor:
    """Gradient of the qkv product ``[N, 3 * heads * head_dim]`` from those of rotated q and k and of v, and its column
    sums."""
    parts = list(grads)
    if rotary is not None:
        parts[:2] = (rotary_backward(part, *rotary, ROTATE[kind]).to(parts[2].dtype) for part in parts[:2])
    out = torch.stack(parts, dim=1).flatten(1)
    partials[:, offset : offset + out.shape[1]] = wide(out).sum(0)
    return out


def column_sums(x: torch.Tensor, partials: torch.Tensor, offset: int) -> None:
    """The column sums of ``x [N, width]``."""
    partials[:, offset : offset + x.shape[1]] = wide(x).sum(0)


def partials(columns: int, like: torch.Tensor) -> torch.Tensor:
    """An uninitialized ``[P, columns]``."""
    return wide(like.new_empty(0)).new_empty(1, columns)


def finish(partials: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``[columns]``: the sum of the parts."""
    return partials.sum(0).to(dtype)
