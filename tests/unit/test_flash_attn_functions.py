"""flash-attn's functions without their operators: stand-ins that take what flash-attn's take, in its order."""

from __future__ import annotations

import pytest
import torch

from llava_packing_tower.attention import eager, flash_attention_2
from llava_packing_tower.attention.flash_attn_functions import make_attention
from llava_packing_tower.attention.self_check import random_segments, results
from llava_packing_tower.data.segments import make_segments

LENGTHS = (5, 3, 9)
STATE = torch.tensor([7, 8])


def attended(q, k, v, cu_seqlens, scale, causal):
    return eager.attend(q, k, v, make_segments(cu_seqlens.diff().tolist()), scale, causal=causal)


def varlen_forward(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal, **more
):
    assert not more and dropout_p == 0.0 and max_seqlen_q == max_seqlen_k == max(LENGTHS)
    out = attended(q, k, v, cu_seqlens_q, softmax_scale, causal)
    return out, torch.zeros(q.shape[1], len(q)), torch.empty(0), STATE


@pytest.mark.parametrize("causal", [False, True])
def test_results_and_gradients_with_fewer_key_heads(monkeypatch, causal):
    def varlen_backward(
        dout,
        q,
        k,
        v,
        out,
        softmax_lse,
        dq,
        dk,
        dv,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        window_size_left,
        window_size_right,
        softcap,
        alibi_slopes,
        deterministic,
        rng_state=None,
    ):
        assert (dropout_p, window_size_left, window_size_right, softcap, alibi_slopes) == (0.0, -1, -1, 0.0, None)
        assert max_seqlen_q == max_seqlen_k == max(LENGTHS) and not deterministic and rng_state is not None
        heads = [x.detach().requires_grad_() for x in (q, k, v)]
        with torch.enable_grad():
            made = attended(*heads, cu_seqlens_q, softmax_scale, causal)
        for where, grad in zip((dq, dk, dv), torch.autograd.grad(made, heads, dout)):
            where.copy_(grad)

    monkeypatch.setattr(flash_attention_2, "Attention", make_attention(varlen_forward, varlen_backward))
    (q, k, v), grad, segments = random_segments(LENGTHS, 4, 8, torch.device("cpu"), torch.float32)
    heads = [q, k[:, :2].contiguous(), v[:, :2].contiguous()]

    def attend(*given):
        return flash_attention_2.attend(*given, causal=causal)

    def plain(*given):
        return eager.attend(*given, causal=causal)

    found, expected = (results(f, heads, segments, 0.3, grad) for f in (attend, plain))
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want)
    other = results(lambda *given: eager.attend(*given, causal=not causal), heads, segments, 0.3, grad)
    assert not torch.allclose(found[1], other[1])
