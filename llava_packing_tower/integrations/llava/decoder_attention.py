"""The attention of transformers' Llama, Qwen2 and Mistral, taught to read packed rows. transformers 4.40 to 5.24.

The one method that is replaced is ``forward`` of the attention classes. It asks the positions whether they are those of
a packed row (:func:`..packed_decoder.segments_of`); everything else is left to the original. transformers has an
interface for attention functions from 4.48 on, but until 4.51 it passes no extra arguments to a checkpointed layer, and
it makes ``T x T`` masks for functions that it does not know.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections.abc import Iterator
from importlib.util import find_spec

import torch
from torch import nn

from ...data.segments import VarlenMetadata
from ...multimodal.packed_decoder import causal_attention, segments_of
from . import liger
from .patcher import Patches

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_OURS = "_llava_packing_reads_rows"
# From 4.53 on transformers makes no mask for attention whose name it does not know, before only for flash attention.
MASKLESS = "packed_rows" if find_spec("transformers.masking_utils") else "flash_attention_2"


def unsupported_attention(attention: nn.Module) -> str | None:
    """None if packed rows can go through such an attention module, else why not."""
    name = type(attention).__name__
    if missing := [part for part in (*PROJECTIONS, "head_dim") if not hasattr(attention, part)]:
        return f"{name} has no {', '.join(missing)}"
    parameters = inspect.signature(type(attention).forward).parameters
    passes_on = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    if "hidden_states" not in parameters or not ("position_ids" in parameters or passes_on):
        return f"{name}.forward is given no position_ids"
    if not hasattr(_module(attention), "apply_rotary_pos_emb"):
        return f"the module of {name} has no apply_rotary_pos_emb"
    if "position_embeddings" not in parameters and not hasattr(attention, "rotary_emb"):
        return f"{name} has no rotary embedding"
    if getattr(attention, "attention_dropout", 0):
        return f"attention_dropout is {attention.attention_dropout}"
    return None


def _module(attention: nn.Module) -> object:
    return sys.modules[type(attention).__module__]


def read_rows(attention: type[nn.Module], patches: Patches) -> None:
    """Have an attention class compute packed rows by segments. Idempotent."""
    original = attention.forward
    if hasattr(original, _OURS):
        return
    signature = inspect.signature(original)
    # Until 4.47 a layer takes three results: the output, attention weights, the cache.
    results = 3 if "use_cache" in signature.parameters else 2

    @functools.wraps(original)
    def forward(self, *args, **kwargs):
        given = signature.bind(self, *args, **kwargs).arguments
        given = {**given, **given.get("kwargs", {})}
        segments = segments_of(given.get("position_ids"), self.training)
        if segments is None:
            return original(self, *args, **kwargs)
        out = _attend(self, given["hidden_states"], segments, given["position_ids"], given.get("position_embeddings"))
        return (out, *[None] * (results - 1))

    setattr(forward, _OURS, True)
    patches.set(attention, "forward", forward)


def _attend(
    attention: nn.Module,
    hidden_states: torch.Tensor,
    segments: VarlenMetadata,
    position_ids: torch.Tensor,
    embeddings: tuple[torch.Tensor, torch.Tensor] | None,
) -> torch.Tensor:
    """Attention of a row ``[1, T, hidden]``, projections and rotary embedding as the original has them."""
    q, k, v = (
        getattr(attention, name)(hidden_states).unflatten(-1, (-1, attention.head_dim)) for name in PROJECTIONS[:3]
    )
    q, k = q.transpose(1, 2), k.transpose(1, 2)
    angles = embeddings or _angles(attention, v, segments, position_ids)
    rotate = liger.rotate if liger.is_fused(attention) and liger.on_gpu(q) else _module(attention).apply_rotary_pos_emb
    q, k = (x.to(v.dtype) for x in rotate(q, k, *angles))  # wider under autocast, where the angles are in float32
    scale = getattr(attention, "scaling", attention.head_dim**-0.5)
    out = causal_attention(q.transpose(1, 2)[0], k.transpose(1, 2)[0], v[0], segments, scale)
    return attention.o_proj(out.flatten(1)[None])


def _angles(
    attention: nn.Module, values: torch.Tensor, segments: VarlenMetadata, position_ids: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """What ``apply_rotary_pos_emb`` takes after q and k where each attention module has its own rotary embedding."""
    if "position_ids" in inspect.signature(type(attention.rotary_emb).forward).parameters:
        return tuple(attention.rotary_emb(values, position_ids))
    # Qwen2 and Mistral of 4.40: a table of all positions, and which of them.
    return (*attention.rotary_emb(values, seq_len=segments.max_seqlen), position_ids)


@contextlib.contextmanager
def without_mask(decoder: nn.Module) -> Iterator[None]:
    """Within it, a decoder called without a mask makes none; of itself it does so for flash attention only, and looks
    on the GPU whether it was given several samples."""
    owners = [owner for owner in (decoder.config, decoder) if hasattr(owner, "_attn_implementation")]
    kept = [owner._attn_implementation for owner in owners]
    try:
        for owner in owners:
            owner._attn_implementation = MASKLESS
        yield
    finally:
        for owner, value in zip(owners, kept, strict=True):
            owner._attn_implementation = value
