"""Graphs of checkpointed layers without a GPU: a stand-in for a graph runs, at each replay, what was captured, on the
tensors that it reads."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from unittest import mock

import torch

from llava_packing_tower.attention import dispatch
from llava_packing_tower.models.runtime import cuda_graphs, layer_graphs

BACKEND = "by_borders"


def by_borders(q, k, v, segments, scale, causal=False):
    """Plain attention that reads cu_seqlens, as a kernel does, and not the lengths, which a graph does not have."""
    lengths = [n for n in segments.cu_seqlens.diff().tolist() if n]
    assert sum(lengths) == len(q) and max(lengths) <= segments.max_seqlen
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    rows = []
    for a, b, c in zip(*(x.split(lengths) for x in (q, k, v)), strict=True):
        scores = torch.einsum("qhd,khd->hqk", a, b) * scale
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores[0], dtype=torch.bool).triu(1), -torch.inf)
        rows.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), c))
    return torch.cat(rows)


@contextlib.contextmanager
def graphs_on_cpu(bucket=16, most_tokens=64):
    """Within it, a forward may be captured on the CPU, with BACKEND. Yields how often was captured and replayed."""
    made = SimpleNamespace(captures=0, replays=0)
    module = SimpleNamespace(VARLEN=True, unsupported_reason=lambda *_: None, attend=by_borders)

    def capture(function, device):
        made.captures += 1
        function()

        def replay():
            made.replays += 1
            function()

        return replay

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(dispatch.BACKENDS, {BACKEND: BACKEND}))
        stack.enter_context(mock.patch.dict(dispatch._LOADED, {BACKEND: module}))
        stack.enter_context(mock.patch.object(cuda_graphs, "DEVICE_TYPE", "cpu"))
        stack.enter_context(mock.patch.multiple(layer_graphs, capture=capture, BUCKET=bucket, MAX_TOKENS=most_tokens))
        yield made
