"""The packed training step in bfloat16 on a GPU. ``python -m pytest tests/gpu/test_packed_step_gpu.py``.

Loss and gradients of the host's own padded step in float32 are the reference. By the twice-the-error rule the packed
step may be twice as far away as the host's own step in bfloat16 is. The errors of a tensor are taken over all batches.
"""

import copy
import importlib.util
import warnings
from collections import defaultdict
from pathlib import Path

import packed_step_checks as checks
import pytest
import torch

from llava_packing_tower.integrations.llava import liger
from llava_packing_tower.models.runtime import layer_graphs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.skipif(importlib.util.find_spec("llava") is None, reason="no LLaVA is installed"),
]
DEVICE = "cuda"
SIZES = {"vocab_size": 500, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3}
ROUNDING = 2**-9
"""The unit roundoff of bfloat16: no error counts as smaller."""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    import builder_patch  # noqa: F401

    return checks.Models(tmp_path_factory.mktemp("packed_step"))


def made(models, word, **options):
    """A model in bfloat16, with weights of the size that training starts from, and its values in float32."""
    attention = "flash_attention_2" if importlib.util.find_spec("flash_attn") and DEVICE == "cuda" else "sdpa"
    low = models.make(word, torch.bfloat16, attention=attention, **SIZES, **options).to(DEVICE)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in low.named_parameters():
            value = torch.randn(parameter.shape, generator=generator) * (0.05 if parameter.dim() > 1 else 0.1)
            parameter.copy_(value + 1 if "norm" in name and name.endswith("weight") else value)
    exact = models.make(word, torch.float32, attention="sdpa", **SIZES, **options).to(DEVICE)
    exact.load_state_dict({name: value.float() for name, value in low.state_dict().items()})
    return low, exact


def run(model, case):
    """The loss and all gradients, in float64; zeros where there is none."""
    batch = checks.batch_of(model, case)
    batch = {name: _moved(value) for name, value in batch.items()}
    loss = checks.call(model, batch).loss
    found = checks.gradients(model, loss)
    return {"loss": loss.detach().double()} | {n: g.double() for n, g in found.items() if g is not None}


def _moved(value):
    if isinstance(value, list):
        return [_moved(each) for each in value]
    return value.to(DEVICE) if isinstance(value, torch.Tensor) else value


def errors_of(low, exact, plan_says):
    """Of each tensor over all batches: the size of the reference, and how far the packed and the host's step are."""
    sums = defaultdict(lambda: torch.zeros(3, dtype=torch.float64))
    other = copy.deepcopy(low)  # the packed step fuses the layers of its model for good
    for case in checks.CASES:
        with checks.host_path():
            reference, host = run(exact, case), run(other, case)
        packed = run(low, case)
        plan = str(vars(low)["_llava_packing_step"])
        assert "packed decoder: on" in plan and plan_says in plan, plan
        assert packed.keys() == host.keys() == reference.keys()
        for name, expected in reference.items():
            parts = (expected, packed[name] - expected, host[name] - expected)
            sums[name] += torch.stack([part.square().sum().cpu() for part in parts])
    return {name: value.sqrt().tolist() for name, value in sums.items()}


@pytest.mark.parametrize("checkpointing", ["", "checkpointing", "graphs"])
@pytest.mark.parametrize("fused", [True, False], ids=["liger", "no_liger"])
@pytest.mark.parametrize("word", ["Llama", "Qwen", "Mistral"])
def test_loss_and_every_gradient_by_the_twice_the_error_rule(
    models, word, fused, checkpointing, record_property, monkeypatch
):
    if word not in models.words:
        pytest.skip(f"this host has no decoder of {word}")
    if fused and liger.missing_package is not None:
        pytest.skip(f"liger-kernel is {liger.missing_package}")
    torch.backends.cuda.matmul.allow_tf32 = False
    low, exact = made(models, word, mm_packing_liger=fused)
    monkeypatch.setenv("LLAVA_PACKING_CUDA_GRAPHS", str(int(checkpointing == "graphs")))
    if checkpointing:
        low.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    found = errors_of(low, exact, "liger: RMSNorm" if fused else "liger: off")
    assert len(found) > 40
    assert bool(layer_graphs.kinds_of(low.model.layers)) == (checkpointing == "graphs")
    worst = {}
    for name, (size, packed, host) in found.items():
        if size == 0:
            assert packed == host == 0, name
            continue
        worst[name] = packed / max(host, ROUNDING * size)
    above = {name: round(ratio, 2) for name, ratio in worst.items() if ratio > 2}
    record_property("largest ratio", max(worst.values()))
    assert not above, above


def test_checkpointed_layers_by_graphs_in_a_training(models, monkeypatch):
    """Batches of several kinds in turns: losses as without graphs, no synchronization, and other weights each step."""
    low, _ = made(models, "Llama")
    low.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    start, losses = copy.deepcopy(low.state_dict()), {}
    for switch in ("0", "1"):
        monkeypatch.setenv("LLAVA_PACKING_CUDA_GRAPHS", switch)
        low.load_state_dict(start)
        optimizer, losses[switch] = torch.optim.AdamW(low.parameters(), lr=1e-3), []
        for number in range(24):
            case = list(checks.CASES)[number % len(checks.CASES)]
            batch = {name: _moved(value) for name, value in checks.batch_of(low, case).items()}
            loss = checks.call(low, batch).loss
            if number >= len(checks.CASES):  # what is captured is captured
                torch.cuda.set_sync_debug_mode("error")
            try:
                loss.backward()
            finally:
                torch.cuda.set_sync_debug_mode("default")
            optimizer.step()
            optimizer.zero_grad()
            losses[switch].append(loss.item())
    assert layer_graphs.kinds_of(low.model.layers) and losses["1"][-1] < 0.8 * losses["1"][0]
    torch.testing.assert_close(torch.tensor(losses["1"]), torch.tensor(losses["0"]), rtol=0.02, atol=0.02)


def test_a_capture_without_memory_leaves_training_as_it_was(models, monkeypatch, caplog):
    monkeypatch.setenv("LLAVA_PACKING_CUDA_GRAPHS", "1")
    low, _ = made(models, "Llama")
    expected = run(low, "images")
    low.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    capture = layer_graphs.capture

    def hungry(function, device):
        def more():
            function()
            if torch.cuda.is_current_stream_capturing():
                torch.empty(1 << 45, device=device)

        return capture(more, device)

    with monkeypatch.context() as patch:
        patch.setattr(layer_graphs, "capture", hungry)
        found = run(low, "images")
    assert "no CUDA graphs of layers" in caplog.text
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0.05, atol=float(value.abs().max()) * 0.02)
    run(low, "several images and text")  # another kind, which is captured
    assert layer_graphs.kinds_of(low.model.layers) == 2


def test_a_layer_that_cannot_be_captured_names_the_switch(models, monkeypatch):
    monkeypatch.setenv("LLAVA_PACKING_CUDA_GRAPHS", "1")
    low, _ = made(models, "Llama")
    low.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    capture = layer_graphs.capture

    def reading(function, device):
        def more():
            function()
            torch.ones(1, device=device).item()  # waits for the device, which a capture cannot

        return capture(more, device)

    monkeypatch.setattr(layer_graphs, "capture", reading)
    with pytest.raises(RuntimeError, match="set LLAVA_PACKING_CUDA_GRAPHS=0 to train without"):
        run(low, "images")
    monkeypatch.setenv("LLAVA_PACKING_CUDA_GRAPHS", "0")
    run(low, "images")


def test_a_step_waits_for_the_gpu_at_its_begin_alone(models):
    """LLaVA's questions about its samples are answered on the host; only what they are asked of is fetched."""
    low, _ = made(models, "Llama")
    batch = {name: _moved(value) for name, value in checks.batch_of(low, "several images and text").items()}
    for _ in range(2):
        checks.call(low, batch).loss.backward()
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            checks.call(low, batch).loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    places = [Path(each.filename).name for each in said if "synchronizing" in str(each.message)]
    assert places == ["words_on_host.py"] * 3  # ids, mask and labels
