"""flash-attn-4's kernels launched without the package: with a stand-in for the package, whose kernels run on a CPU."""

import contextlib
import importlib.util
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from llava_packing_tower.attention import flash_attention_4, sdpa
from llava_packing_tower.attention.recorded_launches import Launches, watched
from llava_packing_tower.data.segments import make_segments

LENGTHS = (5, 9, 3)


class Package:
    """A forward of one kernel, a backward of three that share scratch tensors, as flash-attn-4 has; calls are counted.

    factor: of the length of the second scratch tensor; wrong: a kernel is told a number that depends on the call;
    aside: the last kernel is not in the table.
    """

    def __init__(self, factor=2, wrong=False, aside=False):
        self.calls, self.factor, self.wrong, self.aside = [], factor, wrong, aside
        self.forward.__func__.compile_cache, self.backward.__func__.compile_cache = {}, {}
        self.module = SimpleNamespace(forward=self.forward.__func__, backward=self.backward.__func__, other=3)

    def segments(self, cu_seqlens):
        return make_segments(tuple(cu_seqlens.diff().tolist()))

    def run_forward(self, q, k, v, out, logsumexp, scale, cu_seqlens, longest):
        assert not (q.requires_grad or k.requires_grad or v.requires_grad)
        if longest is not None:
            scale = scale * longest / self.segments(cu_seqlens).max_seqlen
        out.copy_(sdpa.attend(q, k, v, self.segments(cu_seqlens), scale))
        for a, b in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist()):
            logsumexp[:, a:b] = (torch.einsum("ihd,jhd->hij", q[a:b], k[a:b]) * scale).logsumexp(-1)

    def run_first(self, out, grad, sums, cu_seqlens):
        sums[:, : len(out)] = (out * grad).sum(-1).t()

    def run_second(self, q, k, v, grad, sums, dq_wide, dk, dv, scale, cu_seqlens):
        padded = (len(q) + 64 * len(cu_seqlens) - 1) // 64 * 64
        assert sums.shape == (q.shape[1], padded) and dq_wide.shape[1] == int(padded * self.factor * q.shape[2])
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        with torch.enable_grad():
            out = sdpa.attend(*inputs, self.segments(cu_seqlens), scale)
        torch.testing.assert_close((out * grad).sum(-1).t(), sums[:, : len(q)])
        for target, got in zip((None, dk, dv), torch.autograd.grad(out, inputs, grad)):
            if target is None:
                dq_wide[:, : got.numel() // len(sums)] = got.transpose(0, 1).flatten(1)
            else:
                target.copy_(got)

    def run_third(self, dq_wide, dq):
        heads, width = dq.shape[1:]
        dq.copy_(dq_wide[:, : len(dq) * width].view(heads, -1, width).transpose(0, 1))

    def forward(self, q, k, v, cu_seqlens_q, max_seqlen_q, softmax_scale, **_):
        self.calls.append("forward")
        table = Package.forward.compile_cache
        out, logsumexp = torch.empty_like(q), torch.empty(q.shape[1], len(q))
        if "f" not in table:
            table["f"] = self.run_forward
        table["f"](
            q.detach(),
            k.detach(),
            v.detach(),
            out,
            logsumexp,
            softmax_scale,
            cu_seqlens_q,
            max_seqlen_q if self.wrong else None,
        )
        return out, logsumexp, None

    def backward(self, q, k, v, out, grad, logsumexp, cu_seqlens_q, softmax_scale, dq, dk, dv, **_):
        self.calls.append("backward")
        table = Package.backward.compile_cache
        padded = (len(q) + 64 * len(cu_seqlens_q) - 1) // 64 * 64  # as in flash_attn/cute/interface.py
        sums, dq_wide = q.new_empty(q.shape[1], padded), q.new_empty(q.shape[1], int(padded * self.factor * q.shape[2]))
        for name in ("first", "second", "third"):
            if name not in table:
                table[name] = getattr(self, f"run_{name}")
        table["first"](out, grad, sums, cu_seqlens_q)
        table["second"](q, k, v, grad, sums, dq_wide, dk, dv, softmax_scale, cu_seqlens_q)
        (self.run_third if self.aside else table["third"])(dq_wide, dq)


@pytest.fixture
def package(monkeypatch):
    def install(**options):
        made = Package(**options)
        monkeypatch.setattr(flash_attention_4, "_known", {})
        monkeypatch.setattr(flash_attention_4, "interface", made.module, raising=False)
        monkeypatch.setattr(flash_attention_4, "_flash_attn_fwd", made.forward, raising=False)
        monkeypatch.setattr(flash_attention_4, "_flash_attn_bwd", made.backward, raising=False)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
        return made

    return install


def run(lengths=LENGTHS, width=8, scale=0.3, dtype=torch.float32):
    torch.manual_seed(sum(lengths))
    qkv = torch.randn(sum(lengths), 3, 2, width, dtype=dtype, requires_grad=True)
    out = flash_attention_4.attend(*qkv.unbind(1), make_segments(lengths), scale)
    weight = torch.randn(out.shape, dtype=dtype)
    (grad,) = torch.autograd.grad((out * weight).sum(), qkv)
    want = sdpa.attend(*qkv.unbind(1), make_segments(lengths), scale)
    (want_grad,) = torch.autograd.grad((want * weight).sum(), qkv)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(grad, want_grad)


def test_the_package_is_called_while_learning_only(package):
    made = package()
    run()
    assert set(made.calls) == {"forward", "backward"}
    made.calls.clear()
    run()
    run((40, 1))
    assert not made.calls
    for other in ({"width": 16}, {"scale": 0.5}, {"dtype": torch.float64}):
        run(**other)
        assert set(made.calls) == {"forward", "backward"}
        made.calls.clear()
    run()
    assert not made.calls


@pytest.mark.parametrize(
    "options, reason, again",
    [({"wrong": True}, "forward cannot.*its results are others", ["forward"]),
     ({"factor": 0.9}, "backward cannot.*fit no block", ["backward"]),
     ({"aside": True}, "backward cannot.*its results are others", ["backward"])],
)  # fmt: skip
def test_what_cannot_be_learnt_goes_through_the_package_and_is_said(package, caplog, options, reason, again):
    made = package(**options)
    run()
    assert [bool(re.search(reason, record.message)) for record in caplog.records] == [True]
    made.calls.clear()
    run()
    assert made.calls == again and len(caplog.records) == 1


def test_a_package_that_is_wrong_is_an_error(package, monkeypatch):
    made, right = package(), Package.run_third
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "this GPU")
    monkeypatch.setattr(made, "run_third", lambda dq_wide, dq: (right(made, dq_wide, dq), dq.mul_(1.1)))
    qkv = torch.randn(17, 3, 2, 8, requires_grad=True)
    out = flash_attention_4.attend(*qkv.unbind(1), make_segments(LENGTHS), 0.3)
    with pytest.raises(
        RuntimeError, match=r"backward is wrong for heads of 8 in torch\.float32 on this GPU: take another"
    ):
        out.sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_learning_inside_of_a_checkpoint(package, reentrant):
    """A checkpoint counts what is kept for the backward, and learning happens in the first of its two forwards only."""
    package()
    heads = [torch.randn(17, 2, 8, requires_grad=True) for _ in range(3)]
    segments = make_segments(LENGTHS)

    def attend(*inputs):
        return flash_attention_4.attend(*inputs, segments, 0.3).square()

    checkpoint(attend, *heads, use_reentrant=reentrant).sum().backward()
    want = torch.autograd.grad(sdpa.attend(*heads, segments, 0.3).square().sum(), heads)
    torch.testing.assert_close(tuple(x.grad for x in heads), want)


def test_unaligned_tensors_many_segments_and_graphs_go_through_the_package(package, monkeypatch):
    made = package()
    run()
    made.calls.clear()
    run((1,) * 300)
    assert made.calls == ["forward", "backward"]
    made.calls.clear()
    for heads in (torch.randn(17, 3, 2, 9)[..., 1:], torch.randn(1, 3, 2, 8).expand(17, 3, 2, 8)):
        flash_attention_4.attend(*heads.unbind(1), make_segments(LENGTHS), 0.3)
        assert made.calls == ["forward"]
        made.calls.clear()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(flash_attention_4, "_known", {})
    made.calls.clear()
    flash_attention_4.attend(*torch.randn(17, 3, 2, 8).unbind(1), make_segments(LENGTHS), 0.3)
    assert made.calls == ["forward"] and not flash_attention_4._known


def test_the_device_of_the_tensors_is_the_current_one(monkeypatch):
    inside = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda index: inside.append(index) or contextlib.nullcontext())
    call = flash_attention_4._on_its_device(lambda x, more: (x, more))
    for index in (None, 0, 1):
        first = SimpleNamespace(device=SimpleNamespace(index=index))
        assert call(first, 3) == (first, 3)
    assert inside == [1]


def test_the_random_numbers_of_the_user_are_left_alone(package):
    package()
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    q = torch.ones(17, 2, 8)
    flash_attention_4.attend(q, q, q, make_segments(LENGTHS), 0.3)
    assert torch.equal(torch.rand(1), expected)


def test_tables_are_put_back(package):
    made = package()
    before = made.module.forward.compile_cache
    with pytest.raises(ZeroDivisionError), watched(made.module):
        assert made.module.forward.compile_cache is not before
        raise ZeroDivisionError
    assert made.module.forward.compile_cache is before


def test_constants_are_kept_and_tensors_replaced():
    seen = []
    a, b = torch.ones(4, 2), torch.zeros(4, 2)
    launches = Launches([(lambda *x: seen.append(x), (a, 0.5, None, b))], (a, b), 1)
    c, d = torch.ones(7, 2), torch.ones(7, 2)
    launches((c, d), 1)
    assert seen[0][0] is c and seen[0][1:3] == (0.5, None) and seen[0][3] is d


def test_only_learnt_on_hopper(package, monkeypatch):
    """On other chips the kernels are told how long the longest segment is."""
    made = package()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (10, 0))
    run()
    made.calls.clear()
    run()
    assert made.calls == ["forward", "backward"]


def test_deterministic_runs_go_through_the_package_and_are_not_remembered(package):
    made = package()
    torch.use_deterministic_algorithms(True)
    try:
        run()
        assert made.calls == ["forward", "backward"] and not flash_attention_4._known
    finally:
        torch.use_deterministic_algorithms(False)
    run()
    assert all(flash_attention_4._known.values()) and len(flash_attention_4._known) == 2


def test_two_threads_learn_one_after_the_other(package):
    made = package()
    tables = made.module.forward.compile_cache, made.module.backward.compile_cache
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda width: run(width=width), (8, 16, 24, 32)))
    assert (made.module.forward.compile_cache, made.module.backward.compile_cache) == tables
    assert len(flash_attention_4._known) == 8 and all(flash_attention_4._known.values())


def test_launches_of_another_thread_are_not_noted(package):
    made = package()
    made.forward(*torch.ones(3, 4, 2, 8), torch.tensor([0, 4], dtype=torch.int32), 4, 0.3)
    with watched(made.module) as seen, ThreadPoolExecutor(1) as pool:
        pool.submit(made.forward, *torch.ones(3, 4, 2, 8), torch.tensor([0, 4], dtype=torch.int32), 4, 0.3).result()
    assert len(made.calls) == 2 and not seen


@pytest.mark.parametrize("error", [AttributeError, ImportError, RuntimeError])
def test_a_package_that_cannot_be_imported_is_only_missing(monkeypatch, error):
    """An old copy inside of flash-attn 2, beside a new CuTe, raises AttributeError."""

    class Broken(importlib.abc.MetaPathFinder):
        def find_spec(self, name, *_):
            if name.startswith("flash_attn"):
                raise error("of the wrong version")

    for name in [n for n in sys.modules if n.startswith("flash_attn")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    source = Path(flash_attention_4.__file__)
    spec = importlib.util.spec_from_file_location("llava_packing_tower.attention.copy", source)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(torch.library, "custom_op", lambda *_, **__: SimpleNamespace(
        register_fake=lambda g: g, register_autograd=lambda *_, **__: None))  # fmt: skip
    spec.loader.exec_module(module)
    assert f"{error.__name__}: of the wrong version" in module.missing_package
    assert "pip install" in module.missing_package


def test_heads_whose_gradients_are_wrong_are_refused_for_training(monkeypatch):
    monkeypatch.setattr(flash_attention_4, "missing_package", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    cuda = torch.device("cuda")
    assert flash_attention_4.unsupported_reason(cuda, torch.bfloat16, 72) is None
    assert "heads of 64, 96, 128 only" in flash_attention_4.unsupported_reason(
        cuda, torch.bfloat16, 72, needs_grad=True
    )
    for width in (64, 96, 128):
        assert flash_attention_4.unsupported_reason(cuda, torch.bfloat16, width, needs_grad=True) is None
    assert "multiple of 8" in flash_attention_4.unsupported_reason(cuda, torch.bfloat16, 60)
