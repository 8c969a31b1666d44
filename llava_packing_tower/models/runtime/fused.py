"""Encoder blocks as a few fused kernels, forward and backward: the fast path in half precision on a GPU.

``kernels.reference`` says what each operation computes, in plain torch; ``kernels.triton`` has the same operations in
Triton; ``kernels.fused_block`` the two parts of a block around its attention. Here they are put together.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ...attention.dispatch import attend, backend_module
from ...data.segments import VarlenMetadata
from ...kernels.fused_block import AfterAttention, BeforeAttention, Block, BlockSpec, kernels, operations
from ...kernels.matmul_gelu import linear_gelu
from ...utils.tracing import is_plain
from ..activations import HALF
from ..layers import BlockConfig, EncoderBlock, Rotary
from .module_state import has_forward_hooks

logger = logging.getLogger(__name__)

Pair = tuple[torch.Tensor, torch.Tensor | None]  # weight and bias


@functools.cache
def block_spec_of(config: BlockConfig) -> BlockSpec:
    """The constants of such blocks."""
    return BlockSpec(
        config.num_attention_heads, config.norm_eps, config.norm == "rms_norm", config.rotary, config.hidden_act
    )


@functools.cache
def kernels_work(device: torch.device) -> bool:
    """Whether Triton is there and can build and run a kernel (it needs a C compiler); logs why not, once."""
    if kernels is None:
        logger.warning("blocks are not fused: Triton cannot be imported")
        return False
    try:
        x = torch.ones(2, 16, device=device, dtype=torch.bfloat16)
        kernels.add_norm(x, None, x[0], None, 1e-6, True)
    except kernels.ERRORS as error:
        logger.warning("blocks are not fused: a Triton kernel failed: %s: %s", type(error).__name__, error)
        return False
    return True


def _own(module: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias."""
    return module.weight, getattr(module, "bias", None)


def _fit(hidden_states: torch.Tensor, cast: bool, weights: Iterable[torch.Tensor | None]) -> bool:
    """Whether kernels may read these weights: plain ones on the device of the states, and of their dtype or to be cast.
    (The hooks of ZeRO-3 and FSDP have gathered them by now; a kernel given an address on another device breaks the
    process.)"""
    dtype, device = hidden_states.dtype, hidden_states.get_device()
    present = [x for x in weights if x is not None]
    if not is_plain(*present) or not all(x.get_device() == device for x in present):
        return False
    return all(x.is_floating_point() if cast else x.dtype == dtype for x in present)


def _cast(pair: Any, dtype: torch.dtype) -> Any:
    return tuple(None if x is None else x.to(dtype) for x in pair)


def _scaled(weight: torch.Tensor, bias: torch.Tensor | None, scale: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias of a linear layer with those of a layer scale behind it multiplied in."""
    if isinstance(scale, nn.Identity):
        return weight, bias
    return weight * scale.weight[:, None], None if bias is None else bias * scale.weight


def fused_block(
    kind: BlockSpec,
    grad: bool,
    cast: bool,
    layer: EncoderBlock,
    hidden_states: torch.Tensor,
    pending: torch.Tensor | None,
    segments: VarlenMetadata,
    rotary: Rotary | None,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``layer(hidden_states, pending, segments, rotary, backend)`` in fused kernels; ``kind``: :func:`block_spec_of`.

    Without ``grad`` (which is not what ``torch.is_grad_enabled()`` says inside of a reentrant checkpoint)
    ``hidden_states`` is written to, and what is returned as pending is one row for all tokens, the sum of the biases so
    far, or None: see :func:`settled`. With ``cast`` (autocast) the weights are read in the dtype of the states.

    If weights are not plain tensors on the device of the states, the modules of the block are called instead.
    """
    attention, mlp = layer.self_attn, layer.mlp
    cos, sin = (None, None) if kind.rotary is None or rotary is None else rotary
    norm1, norm2, fc1, fc2 = map(_own, (layer.layer_norm1, layer.layer_norm2, mlp.fc1, mlp.fc2))
    qkv, proj = _own(attention.qkv), _own(attention.proj)
    gate: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None) if mlp.gate is None else _own(mlp.gate)
    scales = (layer.layer_scale1, layer.layer_scale2)
    more: list[Any] = [scale.weight for scale in scales if not isinstance(scale, nn.Identity)]
    if attention.qkv.partial_biases:
        more += [attention.qkv.q_bias, attention.qkv.k_bias, attention.qkv.v_bias]
    if not _fit(hidden_states, cast, (*norm1, *qkv, *proj, *norm2, *gate, *fc1, *fc2, *more)):
        if pending is not None:
            hidden_states = (hidden_states + pending).to(hidden_states.dtype)
        total, pending = layer.forward(hidden_states, None, segments, rotary, backend)
        return (total, pending) if grad else (total + pending, None)
    if attention.qkv.partial_biases:
        qkv = qkv[0], attention.qkv.whole_bias()
    proj, fc2 = _scaled(*proj, scales[0]), _scaled(*fc2, scales[1])
    if cast:
        pairs = (norm1, qkv, proj, norm2, gate, fc1, fc2)
        norm1, qkv, proj, norm2, gate, fc1, fc2 = (_cast(pair, hidden_states.dtype) for pair in pairs)
    if not grad:
        if has_forward_hooks(layer):  # which may keep what they are given
            hidden_states = hidden_states.clone()
        q, k, v, row = _infer_before(kind, hidden_states, pending, norm1, qkv, proj[1], (cos, sin))
        attended = attend(q, k, v, segments, backend=backend, resolved=True)
        del q, k, v
        return hidden_states, _infer_after(kind, hidden_states, row, attended, proj[0], norm2, gate, fc1, fc2)
    before, after = (hidden_states, pending, *norm1, *qkv, cos, sin), (*proj, *norm2, *gate, *fc1, *fc2)
    if (function := getattr(backend_module(backend), "Attention", None)) is not None:
        return Block.apply(kind, function, segments, (before[4].shape[1] // kind.heads) ** -0.5, *before, *after)
    total, q, k, v = BeforeAttention.apply(kind, *before)
    attended = attend(q, k, v, segments, backend=backend, resolved=True)
    return AfterAttention.apply(kind, total, attended, *after)


def _infer_before(
    kind: BlockSpec,
    total: torch.Tensor,
    row: torch.Tensor | None,
    norm: Pair,
    qkv: Pair,
    proj_bias: torch.Tensor | None,
    rotary: tuple[torch.Tensor | None, torch.Tensor | None],
) -> tuple[Any, ...]:
    """q, k, v; and the row of biases that belongs to the total, with that of the projection."""
    run = operations(total)
    normed, row = run.row_norm(total, row, *norm, kind.eps, kind.rms, proj_bias)
    product = F.linear(normed, *qkv).view(len(total), 3, kind.heads, -1)
    if kind.rotary is not None:
        run.rotate_(product, *rotary, kind.rotary)
    return *product.unbind(1), row


def _infer_after(
    kind: BlockSpec,
    total: torch.Tensor,
    row: torch.Tensor | None,
    attended: torch.Tensor,
    proj_weight: torch.Tensor,
    norm: Pair,
    gate: Any,
    fc1: Pair,
    fc2: Pair,
) -> torch.Tensor | None:
    """Projection and MLP are summed onto the total by their last matmuls; returns the row of biases. Where a GELU
    follows the first layer of the MLP, that matmul (cuBLASLt's) applies it, in its tanh form, to the float32 sums. For
    the exact GELU too that is nearer to the float32 result than the exact form of rounded sums: the forms differ by
    less than 5e-4, the rounding costs more."""
    run = operations(total)
    total.addmm_(attended.flatten(1), proj_weight.t())
    normed, row = run.row_norm(total, row, *norm, kind.eps, kind.rms, fc2[1])
    if gate[0] is not None:
        inner, factor = F.linear(normed, gate[0]), F.linear(normed, fc1[0])
        active = run.act(kind.activation, inner, gate[1], factor, fc1[1])
    elif total.is_cuda and kind.activation.startswith("gelu") and fc1[1] is not None and total.dtype in HALF:
        active = linear_gelu(normed, fc1[0], fc1[1])
    else:
        active = run.act(kind.activation, F.linear(normed, fc1[0]), fc1[1])
    total.addmm_(active, fc2[0].t())
    return row


def settled(grad: bool, hidden_states: torch.Tensor, pending: torch.Tensor | None) -> torch.Tensor:
    """The sum ``[N, hidden]`` of the two parts that :func:`fused_block` returns, in memory that the next block does not
    write to."""
    if grad:
        return hidden_states if pending is None else hidden_states + pending
    out = torch.empty_like(hidden_states)
    return out.copy_(hidden_states) if pending is None else torch.add(hidden_states, pending, out=out)
