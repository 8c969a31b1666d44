"""What is kept from one batch for the next (positions, tables, borders of segments, verdicts) holds nothing of the
circumstances in which it was made: traces, modes, defaults, threads."""

import copy
import threading

import pytest
import torch
from conftest import assert_close
from families import pack
from torch._subclasses.fake_tensor import FakeTensorMode

from llava_packing_tower.attention import dispatch
from llava_packing_tower.data import cached_metadata, positions
from llava_packing_tower.data.cached_metadata import CachedMetadata, cached
from llava_packing_tower.data.segments import VarlenMetadata, _segments, make_segments
from llava_packing_tower.models import siglip2
from llava_packing_tower.models.registry import family_for
from llava_packing_tower.tools.bench.models import PRESETS

pytestmark = pytest.mark.newest
CACHES = [
    _segments, positions.grid_positions, positions.prefix_indices, positions.frequency_ladder,
    positions._kept_rotary_3d, siglip2.axis_weights,
]  # fmt: skip
FAMILIES = [("llava_vit", {}), ("siglip2", {}), ("aimv2", {"is_native": True}), ("dinov3", {})]


@pytest.fixture(autouse=True)
def empty_caches():
    for cache in CACHES:
        cache.cache_clear()
    dispatch._choose.cache_clear()
    dispatch._verdicts.clear()


def make(family, more):
    preset = PRESETS[family]
    cls = family_for(preset.model_type)
    torch.manual_seed(0)
    return cls(cls.config_class(**{**preset.tiny, **more})).eval()


def batch(model, *sizes):
    patch = model.config.patch_size
    draw = torch.Generator().manual_seed(sum(h * 31 + w for h, w in sizes))
    images = [torch.randn(3, h * patch, w * patch, generator=draw, device="cpu", dtype=torch.float32) for h, w in sizes]
    return pack(model, images)


class Fixed(torch.nn.Module):
    def __init__(self, model, grid):
        super().__init__()
        self.model, self.grid = model, grid

    def forward(self, rows):
        return self.model(rows, self.grid, feature_layers=(1, 2))


def export(model, rows, grid):
    program = torch.export.export(Fixed(model, grid), (rows,), strict=False)
    assert_close(program.module()(rows)[1], model(rows, grid, feature_layers=(2,))[0])


def compiled(model, rows, grid):
    torch._dynamo.reset()
    torch.compile(model, backend="eager")(rows, grid, feature_layers=(1, 2))


def jit_trace(model, rows, grid):
    with torch.no_grad():
        torch.jit.trace(Fixed(model, grid), rows, check_trace=False)


def fake_mode(model, rows, grid):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        out = model(mode.from_tensor(rows), grid, feature_layers=(1,))[0]
        assert type(out) is not torch.Tensor


def inference_mode(model, rows, grid):
    with torch.inference_mode():
        model(rows, grid)


def default_device(model, rows, grid):
    with torch.device("meta"):
        model(rows, grid)


def default_dtype(model, rows, grid):
    torch.set_default_dtype(torch.float64)
    try:
        model(rows, grid)
    finally:
        torch.set_default_dtype(torch.float32)


def autocast(model, rows, grid):
    with torch.autocast("cpu", torch.bfloat16):
        model(rows, grid)


def moved_copy(model, rows, grid):
    copy.deepcopy(model).to("meta").to(torch.bfloat16)
    copy.deepcopy(model).double()(rows, grid)


CIRCUMSTANCES = [
    export, jit_trace, fake_mode, inference_mode, default_device, default_dtype, autocast, moved_copy,
]  # fmt: skip


CASES = [
    (*family, circumstance, warm) for family in FAMILIES for circumstance in CIRCUMSTANCES for warm in (False, True)
]
CASES.append(pytest.param(*FAMILIES[-1], compiled, False, marks=pytest.mark.long))


@pytest.mark.parametrize("family, more, circumstance, warm", CASES, ids=lambda value: getattr(value, "__name__", None))
def test_a_call_in_other_circumstances_leaves_nothing_behind(family, more, circumstance, warm):
    model = make(family, more)
    rows, grid = batch(model, (4, 3), (1, 1), (2, 5))
    want = torch.stack(model(rows, grid, feature_layers=(0, 1, 2))).detach()
    if not warm:
        for cache in CACHES:
            cache.cache_clear()
    circumstance(model, rows, grid)
    for _ in range(2):
        states = model(rows, grid, feature_layers=(0, 1, 2))
        assert all(type(state) is torch.Tensor and not state.is_inference() for state in states)
        torch.testing.assert_close(torch.stack(states), want, rtol=0, atol=0)
        states[-1].sum().backward()  # what was made without gradients serves with them
    assert model.encoder.layers[0].mlp.fc1.weight.grad is not None


def test_threads_do_not_mix_up_their_batches():
    models = [make(*family) for family in FAMILIES]
    sizes = [[(h, w), (w, h + 1)] for h in range(1, 5) for w in range(1, 4)]
    jobs = [(model, batch(model, *shapes)) for model in models for shapes in sizes]
    with torch.no_grad():
        want = [model(*given, feature_layers=(2,))[0] for model, given in jobs]
    for cache in CACHES:
        cache.cache_clear()
    wrong, start = [], threading.Barrier(4)

    def work(turn):
        start.wait()
        with torch.inference_mode(turn % 2 == 0), torch.no_grad():
            for step in range(len(jobs)):
                index = (step * (2 * turn + 1) + turn) % len(jobs)
                model, given = jobs[index]
                if not torch.equal(model(*given, feature_layers=(2,))[0], want[index]):
                    wrong.append((turn, index))

    threads = [threading.Thread(target=work, args=(turn,)) for turn in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_what_is_given_again_belongs_to_its_thread():
    metadata, made = CachedMetadata(), []
    with metadata.making():
        make_segments([3, 4])
        thread = threading.Thread(target=lambda: made.append(make_segments([9])))
        thread.start()
        thread.join()
    with metadata.giving_again():
        assert make_segments([3, 4]).lengths == (3, 4)
        thread = threading.Thread(target=lambda: made.append(make_segments([2, 2])))
        thread.start()
        thread.join()
    assert [segments.lengths for segments in made] == [(9,), (2, 2)]


def test_the_least_recently_used_goes_first_and_nothing_of_a_trace_is_kept():
    calls = []

    @cached(2)
    def numbers(count):
        calls.append(count)
        return torch.arange(count, device="cpu")

    for count in (1, 2, 1, 3, 1, 2):
        assert len(numbers(count)) == count
    assert calls == [1, 2, 3, 2]
    with FakeTensorMode():
        assert type(numbers(1)) is not torch.Tensor
    assert calls[4:] == [1] and type(numbers(1)) is torch.Tensor and len(calls) == 5
    assert len(numbers.__wrapped__(2)) == 2 and len(calls) == 6


def test_a_failure_is_not_kept():
    @cached(2)
    def fails(count):
        raise ValueError(count)

    for _ in range(2):
        with pytest.raises(ValueError, match="7"):
            fails(7)


def test_a_value_of_another_stream_is_waited_for(monkeypatch):
    """(Streams exist on a GPU only: here what is asked of them is written down.)"""
    log = []

    class Stream:
        def __init__(self, name):
            self.name = name

        def record_event(self):
            log.append(f"event on {self.name}")
            return f"event of {self.name}"

        def wait_event(self, event):
            log.append(f"{self.name} waits for {event}")

    class OnGpu:
        is_cuda, device = True, "cuda:0"

        def record_stream(self, stream):
            log.append(f"used on {stream.name}")

    streams = [Stream("a"), Stream("b")]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: streams[0])
    monkeypatch.setattr(cached_metadata, "_tensors", lambda value: iter([value]))
    made = cached_metadata._Made(OnGpu())
    made.get()
    assert log == ["event on a"]
    streams.reverse()
    made.get()
    assert log[1:] == ["b waits for event of a", "used on b"]


def test_all_tensors_of_a_value_are_found():
    segments = VarlenMetadata(torch.zeros(2, dtype=torch.int32), 3, (3,))
    value = (torch.ones(1), (segments, "word", torch.ones(2)), 3)
    assert [len(x) for x in cached_metadata._tensors(value)] == [1, 2, 2]


def test_no_verdict_on_a_backend_is_made_of_fake_tensors(monkeypatch):
    """A kernel that was tried out in a trace has not been tried out."""
    from types import SimpleNamespace

    asked = []
    module = SimpleNamespace(VARLEN=True, CHECKED=True, unsupported_reason=lambda *_: None, attend=None)
    monkeypatch.setitem(dispatch.BACKENDS, "tried", "tried")
    monkeypatch.setitem(dispatch._LOADED, "tried", module)
    monkeypatch.setattr(dispatch, "self_check_error", lambda *given: asked.append(given) and None)
    with FakeTensorMode():
        assert dispatch.resolve_backend("tried", "cpu", torch.float32, 8) == "tried"
    assert not asked and not dispatch._verdicts
    dispatch.resolve_backend("tried", "cpu", torch.float32, 8)
    assert len(asked) == 1
