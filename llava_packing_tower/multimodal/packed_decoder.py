"""The samples of a batch in one row of a causal decoder: no padding, and no sample sees another.

Positions begin anew with each sample, and attention goes by ``cu_seqlens``: a ``T x T`` mask is never built.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..attention.dispatch import backend_module, resolve_backend
from ..data.segments import VarlenMetadata, make_segments, to_device
from .supervised_head import IGNORE

KEPT_ROWS = 64  # forward passes whose backward may still come


# ---------------------------------------------------------------- rows


@dataclass(frozen=True)
class PackedRow:
    """Where the tokens of a padded batch lie in one row.

    index: ``[T]`` on the host, each token's place in the flattened batch; position_ids: ``[1, T]`` on the device of the
    decoder, from 0 in each sample; segments: where each sample lies.
    """

    index: torch.Tensor
    position_ids: torch.Tensor
    segments: VarlenMetadata

    def pack(self, batch: torch.Tensor) -> torch.Tensor:
        """``[B, L, ...]`` to ``[1, T, ...]``."""
        return batch.flatten(0, 1)[to_device(self.index, batch.device)][None]

    def pad(self, row: torch.Tensor, batch: int, length: int) -> torch.Tensor:
        """``[1, T, hidden]`` to ``[batch, length, hidden]``, zeros in the padding."""
        padded = row.new_zeros(batch * length, row.shape[-1])
        return padded.index_copy(0, to_device(self.index, row.device), row[0]).unflatten(0, (batch, length))


def pack_batch(mask: torch.Tensor, targets: torch.Tensor, device: torch.device | str = "cpu") -> PackedRow | None:
    """The row of a padded batch, or None for a batch that has no equal in one row.

    Those are batches with a gap inside a sample, and those whose padding is trained: where text begins with a
    supervised token and is padded on the left, transformers has the padding in front predict it.

    mask: bool ``[B, L]``, true for tokens; targets: ``[B, L]`` from :func:`supervised_head.next_labels`; both on the
    host. device: of the decoder. Synchronizes nothing.
    """
    starts = mask.clone()
    starts[:, 1:] &= ~mask[:, :-1]
    trained_padding = ((targets != IGNORE) & ~mask).sum()
    *lengths, begun, stray = torch.cat([mask.sum(1), starts.sum()[None], trained_padding[None]]).tolist()
    lengths = [length for length in lengths if length]
    if not lengths or begun != len(lengths) or stray:
        return None
    segments = make_segments(lengths, device)
    index = mask.flatten().nonzero().squeeze(1)
    position_ids = to_device(torch.cat([torch.arange(n, device="cpu") for n in lengths])[None], device)
    remember(position_ids, segments)
    return PackedRow(index, position_ids, segments)


_rows: OrderedDict[tuple[str, int], tuple[torch.Tensor, VarlenMetadata | None]] = OrderedDict()


def remember(position_ids: torch.Tensor, segments: VarlenMetadata | None) -> None:
    """Note the segments of a row, or None for positions of something else.

    Of all that a decoder layer is given, positions alone reach it in every version of transformers, and again when a
    checkpointed layer is recomputed (as the same tensor, or as a view of it).
    """
    _rows[_key(position_ids)] = (position_ids, segments)  # held: its memory is nobody else's while it is here
    if len(_rows) > KEPT_ROWS:
        _rows.popitem(last=False)


def _key(position_ids: torch.Tensor) -> tuple[str, int]:
    return str(position_ids.device), position_ids.data_ptr()


def segments_of(position_ids: torch.Tensor | None, training: bool) -> VarlenMetadata | None:
    """The segments of a packed row; None if these are the positions of something else.

    A row that is not known, a copy for example, is read from its positions, which synchronizes.
    """
    if position_ids is None or position_ids.dim() != 2 or len(position_ids) != 1:
        return None
    known = _rows.get(_key(position_ids))
    if known is not None and known[0].shape == position_ids.shape:
        return known[1]
    if not training:
        return None
    starts = (position_ids[0] == 0).nonzero().squeeze(1).tolist()
    if len(starts) < 2 or starts[0] != 0:
        return None
    ends = [*starts[1:], position_ids.shape[1]]
    segments = make_segments([end - start for start, end in zip(starts, ends, strict=True)], position_ids.device)
    remember(position_ids, segments)
    return segments


# ---------------------------------------------------------------- attention


def causal_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: VarlenMetadata, scale: float
) -> torch.Tensor:
    """Causal attention inside each segment.

    q: ``[T, heads, head_dim]``; k, v: ``[T, key heads, head_dim]``, of which ``heads`` is a multiple.
    Returns ``[T, heads, head_dim]``.
    """
    name = causal_backend(q.device, q.dtype, q.shape[-1], segments.lengths)
    return backend_module(name).attend(q, k, v, segments, scale, causal=True)


def causal_backend(
    device: torch.device | str, dtype: torch.dtype, head_dim: int, lengths: tuple[int, ...] = (1024,)
) -> str:
    """The backend for training a decoder on such segments: the fastest of those that are here and right."""
    given = {"lengths": lengths, "needs_grad": True, "causal": True}
    return resolve_backend(_only or "auto", device, dtype, head_dim, **given)


_only: str | None = None  # not of a context: the backward pass, which may compute layers again, has its own threads


@contextlib.contextmanager
def only_backend(name: str | None) -> Iterator[None]:
    """Within it, packed rows are computed by this backend and no other; None changes nothing.

    Where it cannot run, what asks for attention raises what :func:`resolve_backend` raises.
    """
    global _only
    kept, _only = _only, name
    try:
        yield
    finally:
        _only = kept
