import functools
import logging
import re

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from llava_packing_tower.attention import dispatch
from llava_packing_tower.attention.dispatch import (
    BACKENDS,
    auto_order,
    backend_module,
    resolve_backend,
    varlen_attention,
)
from llava_packing_tower.attention.self_check import self_check_error
from llava_packing_tower.data.segments import make_segments

LENGTHS = (5, 1, 12, 5, 7)
CPU_BACKENDS = ("eager", "sdpa")


def reference(q, k, v, lengths, scale=None):
    """float64 softmax, written out per segment."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    outputs = []
    for a, b, c in zip(*(x.double().split(list(lengths)) for x in (q, k, v)), strict=True):
        weights = torch.einsum("ihd,jhd->hij", a, b).mul(scale).softmax(-1)
        outputs.append(torch.einsum("hij,jhd->ihd", weights, c))
    return torch.cat(outputs)


def qkv(heads=2, dim=16, dtype=torch.float32, lengths=LENGTHS):
    return [torch.randn(sum(lengths), heads, dim).to(dtype).requires_grad_() for _ in range(3)]


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("lengths", [LENGTHS, (6, 6, 6), (1,)])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_against_float64(backend, lengths, scale):
    q, k, v = qkv(lengths=lengths)
    segments = make_segments(lengths)
    out = varlen_attention(q, k, v, segments.cu_seqlens, segments.max_seqlen, scale=scale, backend=backend)
    weight = torch.randn(out.shape)
    grads = torch.autograd.grad((out * weight).sum(), (q, k, v))
    expected = reference(q, k, v, lengths, scale)
    expected_grads = torch.autograd.grad((expected * weight).sum(), (q, k, v))
    torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=0)
    for got, want in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(got, want, atol=5e-6, rtol=0)


@pytest.mark.parametrize("dim", [64, 72, 96, 128])
def test_bf16_error_at_most_twice_the_reference(dim):
    """Forward and gradient of sdpa against the bf16 reference's own error (flash-attention's rule)."""
    q, k, v = qkv(dim=dim)
    segments = make_segments(LENGTHS)
    weight = torch.randn(q.shape)

    def run(backend, dtype):
        inputs = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        out = varlen_attention(*inputs, segments.cu_seqlens, segments.max_seqlen, backend=backend)
        return [out, *torch.autograd.grad((out * weight.to(dtype)).sum(), inputs)]

    q, k, v = (x.bfloat16() for x in (q, k, v))
    exact = run("eager", torch.float32)
    for got, low, want in zip(run("sdpa", torch.bfloat16), run("eager", torch.bfloat16), exact, strict=True):
        allowed = 2 * (low.float() - want).abs().max() + 1e-5
        assert (got.float() - want).abs().max() <= allowed


def test_segments_do_not_see_each_other():
    q, k, v = qkv()
    segments = make_segments(LENGTHS)
    for backend in CPU_BACKENDS:
        before = varlen_attention(q, k, v, segments.cu_seqlens, 12, backend=backend)
        changed = [x.detach().clone() for x in (q, k, v)]
        for x in changed:
            x[6:18] += 3.0  # the third segment
        after = varlen_attention(*changed, segments.cu_seqlens, 12, backend=backend)
        outside = torch.cat([torch.arange(6), torch.arange(18, 30)])
        assert torch.equal(before[outside], after[outside])
        assert not torch.allclose(before[6:18], after[6:18])


def test_long_pack_needs_no_quadratic_memory():
    """200k tokens in 2000 segments: a T x T mask would be 40 GB of booleans."""
    lengths = (60, 140) * 1000
    q, k, v = (torch.randn(200_000, 1, 8) for _ in range(3))
    segments = make_segments(lengths)
    out = varlen_attention(q, k, v, segments.cu_seqlens, segments.max_seqlen, lengths=lengths, backend="sdpa")
    torch.testing.assert_close(
        out[-200:].double(), reference(q[-200:], k[-200:], v[-200:], (60, 140)), atol=2e-6, rtol=0
    )


def test_bad_arguments():
    q, k, v = qkv()
    segments = make_segments(LENGTHS)
    with pytest.raises(TypeError, match="max_seqlen must be a Python int, got Tensor"):
        varlen_attention(q, k, v, segments.cu_seqlens, torch.tensor(12))
    with pytest.raises(ValueError, match=r"\[N, heads, head_dim\]"):
        varlen_attention(q, k[:-1], v, segments.cu_seqlens, 12)
    with pytest.raises(ValueError, match=r"unknown attention backend 'flash'.*flash_attention_2"):
        varlen_attention(q, k, v, segments.cu_seqlens, 12, backend="flash")


def test_flash_attention_by_name_needs_the_package():
    try:
        import flash_attn  # noqa: F401
    except ImportError:
        q, k, v = qkv()
        with pytest.raises(ImportError, match="pip install flash-attn --no-build-isolation"):
            varlen_attention(q, k, v, make_segments(LENGTHS).cu_seqlens, 12, backend="flash_attention_2")
    else:
        pytest.skip("flash-attn is installed here: the missing package cannot be shown")


class Built:
    """A package whose build may be wrong, in place of the first two that auto asks."""

    VARLEN = CHECKED = True
    missing_package = None

    def __init__(self, wrong=None):
        self.wrong, self.calls = wrong, 0

    def unsupported_reason(self, *_):
        return None

    def attend(self, q, k, v, segments, scale):
        self.calls += 1
        if self.wrong == "results" or (self.wrong == "float16" and q.dtype == torch.float16):
            q = q.flip(0)  # the last segment's queries: right in shape and size
        if self.wrong == "gradients" and k.requires_grad:
            k = 2 * k - k.detach()
        return backend_module("sdpa").attend(q, k, v, segments, scale)


@pytest.fixture
def built(monkeypatch):
    def install(**modules):
        dispatch._choose.cache_clear(), dispatch._verdicts.clear()
        for name, module in modules.items():
            monkeypatch.setitem(dispatch._LOADED, name, module)

    yield install
    dispatch._choose.cache_clear(), dispatch._verdicts.clear()


def test_a_build_that_raises_is_not_used(built, caplog):
    class Raising(Built):
        def attend(self, *_):
            raise RuntimeError("this build has no such kernel\nat line 3")

    built(flash_attention_2=Raising(), torch_varlen=Built())
    assert resolve_backend("auto", "cpu", torch.bfloat16, 16) == "torch_varlen"
    assert "head width 16: it fails: this build has no such kernel" in caplog.text
    with pytest.raises(ValueError, match=r"it fails: this build has no such kernel$"):
        resolve_backend("flash_attention_2", "cpu", torch.bfloat16, 16)


@pytest.mark.parametrize("wrong, grad", [("results", False), ("results", True), ("gradients", True), (None, True)])
def test_a_build_that_answers_wrongly_is_not_used(built, caplog, wrong, grad):
    """auto passes on to the next backend, says so once, and asks each build once; asked for by name it is an error."""
    first, second = Built(wrong), Built()
    built(flash_attention_2=first, torch_varlen=second)
    state = torch.get_rng_state()
    for lengths in ((100, 200, 300), (10, 20), (1,)):
        chosen = resolve_backend("auto", "cpu", torch.bfloat16, 16, lengths=lengths, needs_grad=grad)
        assert chosen == ("flash_attention_2" if wrong is None else "torch_varlen")
    assert first.calls == 1 and torch.equal(state, torch.get_rng_state())
    said = [r.getMessage() for r in caplog.records if "are wrong" in r.getMessage()]
    assert len(said) == (wrong is not None)
    if wrong is not None:
        what = r"results" if wrong == "results" else r"gradients of k"
        shown = rf"its {what} are wrong \([0-9.]+ of the largest value away from plain attention's, at most 0.05"
        assert re.search("flash_attention_2, torch.bfloat16, head width 16: " + shown, said[0])
        with pytest.raises(ValueError, match="'flash_attention_2' cannot run .* with head width 16 on cpu: " + shown):
            resolve_backend("flash_attention_2", "cpu", torch.bfloat16, 16, needs_grad=grad)


def test_a_build_without_a_dtype_is_used_for_the_others(built):
    """flash-attn compiled for bfloat16 alone takes float16 for it. Gradients are looked at where they are needed."""
    built(flash_attention_2=Built("float16"), torch_varlen=Built("gradients"), sdpa=backend_module("sdpa"))
    with torch.inference_mode():
        chosen = {dtype: resolve_backend("auto", "cpu", dtype, 8) for dtype in (torch.float16, torch.bfloat16)}
    assert chosen == {torch.float16: "torch_varlen", torch.bfloat16: "flash_attention_2"}
    assert resolve_backend("auto", "cpu", torch.float16, 8, needs_grad=True) == "sdpa"


def test_packages_are_checked():
    """Kernels that others build; the rest are torch's or ours."""
    checked = {name for name in BACKENDS if getattr(backend_module(name), "CHECKED", False)}
    assert checked == {"flash_attention_2", "flash_attention_3", "flash_attention_4"}


@pytest.mark.parametrize("around", ["inference_mode", "autocast", "checkpoint"])
def test_what_is_around_the_first_call_does_not_matter(built, around):
    """The check sees no autocast and no inference mode, and a checkpoint around it does not see the check."""
    right = Built()
    right.around = []

    def attend(q, k, v, segments, scale):
        right.around.append((torch.is_autocast_enabled("cpu"), torch.is_inference_mode_enabled()))
        return Built.attend(right, q, k, v, segments, scale)

    right.attend = attend
    built(flash_attention_2=right)
    resolve = functools.partial(resolve_backend, "flash_attention_2", "cpu", torch.bfloat16, 16, needs_grad=True)
    if around == "checkpoint":
        x = torch.ones(3, requires_grad=True)
        checkpoint(lambda x: (resolve(), x.exp())[1], x, use_reentrant=False).sum().backward()
        assert torch.equal(x.grad, torch.ones(3).exp())
    else:
        with torch.inference_mode() if around == "inference_mode" else torch.autocast("cpu", torch.bfloat16):
            assert resolve() == "flash_attention_2"
    assert right.around == [(False, False)]


def test_no_verdict_is_kept_that_says_nothing_about_the_build(built):
    """Out of memory, and what could not be looked at: while torch.export traces, or a graph is captured."""

    class Full(Built):
        full = True

        def attend(self, *arguments):
            if self.full:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory")
            return super().attend(*arguments)

    module = Full()
    built(flash_attention_2=module)
    resolve = functools.partial(resolve_backend, "flash_attention_2", "cpu", torch.bfloat16, 16)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        resolve()
    module.full = False
    assert resolve() == "flash_attention_2"
    module = Built("results")
    built(flash_attention_2=module)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert resolve() == "flash_attention_2"  # unseen
    for compiling in (False, True):  # what is known then counts there too
        with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError, match="its results are wrong"):
            patch.setattr(torch.compiler, "is_compiling", lambda: compiling)  # noqa: B023
            resolve()


def test_a_build_is_looked_at_when_all_around_it_is_compiled(built):
    """torch.compile of a whole model leaves the choice as it is: traced, nothing could be looked at."""
    built(flash_attention_2=Built("results"), torch_varlen=Built("results"))
    q, k, v = qkv(dtype=torch.bfloat16)
    segments = make_segments(LENGTHS)

    def model(q, k, v):
        name = resolve_backend("auto", "cpu", q.dtype, q.shape[-1], lengths=segments.lengths)
        return dispatch.attend(q * 1, k, v, segments, backend=name, resolved=True)

    compiled = torch.compile(model, backend="eager")(q, k, v)
    torch.testing.assert_close(compiled, dispatch.attend(q, k, v, segments, backend="sdpa"))


def test_every_backend_of_the_table_loads():
    for name in BACKENDS:
        module = backend_module(name)
        assert callable(module.attend) and callable(module.unsupported_reason)
    for lengths in ((), (1024,) * 4, (3000, 900)):
        assert set(auto_order(lengths)) <= set(BACKENDS)


def test_the_rule_of_auto():
    """The measured crossovers: cuDNN for equal lengths, FA3 for long segments, FA4 in training, FA2 for short ones."""
    assert auto_order((1024,) * 32)[:3] == ("cudnn", "flash_attention_3", "flash_attention_4")
    assert auto_order((4000, 300, 900))[:3] == ("flash_attention_3", "flash_attention_4", "flash_attention_2")
    assert auto_order((300, 299))[:2] == ("flash_attention_3", "flash_attention_2")
    assert auto_order((256,) * 256)[0] == auto_order((256,) * 256, needs_grad=True)[0] == "cudnn"
    assert auto_order((255,) * 256)[0] == auto_order((255,) * 256, needs_grad=True)[0] == "flash_attention_2"
    assert auto_order((100, 200, 300))[0] == auto_order(())[0] == "flash_attention_2"
    assert auto_order((8000, 300, 900), needs_grad=True)[:2] == ("flash_attention_4", "flash_attention_2")
    assert auto_order((4000, 300, 900), needs_grad=True)[0] == "flash_attention_2"  # the host is what is waited for
    assert auto_order((1024,) * 4, needs_grad=True)[:2] == ("cudnn", "flash_attention_2")
    assert auto_order((9000, 8000), needs_grad=True)[:2] == ("flash_attention_4", "flash_attention_3")
    assert auto_order((1024,) * 8, needs_grad=True)[:3] == ("flash_attention_4", "cudnn", "flash_attention_2")
    assert auto_order((100,) * 200, needs_grad=True)[0] == "flash_attention_2"
    assert resolve_backend("auto", "cpu", torch.bfloat16, 64, lengths=(1024, 1024)) == "sdpa"


def test_auto_asks_cudnn_for_no_plan_per_image():
    """Images that come one by one are of ever new sizes, and cuDNN would plan for each. Before sdpa it is tried still,
    as is every kernel for segments: sdpa takes them one by one, in blocks that are not fused."""
    kernels = {"flash_attention_2", "torch_varlen", "flash_attention_3", "flash_attention_4"}
    for length in (200, 256, 577, 1024, 1025, 16384):
        for needs_grad in (False, True):
            order = auto_order((length,), needs_grad)
            assert set(order[:4]) == kernels and order[4:] == ("cudnn", "sdpa")[length < 256 :]
    for lengths in ((), (30, 40), (3000, 900), (700, 700)):
        order = auto_order(lengths)
        assert kernels <= set(order) and order[-1] == "sdpa" and len(set(order)) == len(order)
    assert auto_order((1024,))[0] == "flash_attention_2" and auto_order((1025,))[0] == "flash_attention_3"
    assert auto_order((1024,), needs_grad=True)[0] == "flash_attention_2"
    assert auto_order((7168,), needs_grad=True)[0] == "flash_attention_4"
    assert auto_order((1024, 1024))[0] == "cudnn"


def test_auto_logs_its_choice_once(caplog):
    for cached in (dispatch._choose, dispatch._log_choice):
        cached.cache_clear()
    q, k, v = qkv()
    segments = make_segments(LENGTHS)
    with caplog.at_level(logging.INFO, logger="llava_packing_tower.attention.dispatch"):
        for _ in range(3):
            varlen_attention(q, k, v, segments.cu_seqlens, 12)
    assert [r.message for r in caplog.records] == [
        "attention backend: sdpa (requested: auto; cpu, torch.float32, head width 16)"
    ]


def test_cpu_refuses_gpu_kernels_by_name():
    pytest.importorskip("torch.nn.attention.varlen", reason="this torch has no varlen attention")
    with pytest.raises(ValueError, match=r"torch_varlen.*torch.float32 with head width 16 on cpu: needs a CUDA GPU"):
        resolve_backend("torch_varlen", "cpu", torch.float32, 16)


@pytest.fixture
def fa4(monkeypatch):
    """flash-attn 4's backend with plain attention in place of the kernels, whose gradients are right for some widths
    of heads only; and the widths that it was called with."""
    module, widths = backend_module("flash_attention_4"), []

    def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal):
        widths.append(q.shape[-1])
        if q.requires_grad and q.shape[-1] not in (64, 96, 128):
            q = 2 * q - q.detach()
        segments = make_segments(cu_seqlens_q.diff().tolist())
        return backend_module("eager").attend(q, k, v, segments, softmax_scale, causal), None

    monkeypatch.setattr(module, "flash_attn_varlen_func", flash_attn_varlen_func, raising=False)
    monkeypatch.setattr(module, "missing_package", None)
    return module, widths


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dim, padded", [(40, 64), (64, 64), (72, 96), (80, 96), (96, 96), (104, 128), (128, 128)])
def test_heads_are_padded_where_gradients_of_flash_attention_4_are_wrong(fa4, dim, padded, causal):
    """Output and gradients are those of the true width, in training through padded heads, in inference as they are."""
    module, widths = fa4
    segments = make_segments(LENGTHS)
    packed = torch.randn(sum(LENGTHS), 3, 4, dim, requires_grad=True)  # q, k and v are views of one product
    q, k, v = packed.unbind(1)
    if causal:  # a decoder's: two heads of queries for one of keys
        k, v = k[:, :2], v[:, :2]
    weight = torch.randn(q.shape)
    for upstream in (weight, torch.ones(()).expand(q.shape)):
        want = backend_module("eager").attend(q, k, v, segments, 0.3, causal)
        (want_grad,) = torch.autograd.grad(want, packed, upstream, retain_graph=True)
        out = module.attend(q, k, v, segments, 0.3, causal)
        torch.testing.assert_close(out, want, atol=1e-6, rtol=0)
        torch.testing.assert_close(torch.autograd.grad(out, packed, upstream, retain_graph=True)[0], want_grad)
    assert out.is_contiguous() and widths == [padded] * 2
    with torch.no_grad():
        torch.testing.assert_close(module.attend(q, k, v, segments, 0.3, causal), want)
    assert widths[-1] == dim
    assert self_check_error(module, torch.device("cpu"), torch.bfloat16, dim, True, causal) is None
    assert widths[-1] == padded


def test_the_self_check_sees_what_padding_hides_not(fa4, monkeypatch):
    module, _ = fa4
    monkeypatch.setattr(module, "RIGHT_BACKWARD", (72,))
    found = self_check_error(module, torch.device("cpu"), torch.bfloat16, 72, True)
    assert found is not None and found.startswith("its gradients of q are wrong")


def test_heads_that_flash_attention_4_takes_in_training(fa4, monkeypatch):
    module, _ = fa4
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    reason = functools.partial(module.unsupported_reason, torch.device("cuda"), torch.bfloat16)
    assert [dim for dim in range(8, 137, 8) if reason(dim, True) is None] == list(range(40, 129, 8))
    assert reason(32, True) == "in training heads narrower than 40 would be padded to 64" and reason(32) is None
