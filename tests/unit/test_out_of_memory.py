"""Out of memory in a training step: what was asked for, and which keys lower it."""

from types import SimpleNamespace

import pytest
import torch
from transformers import Trainer

from llava_packing_tower.integrations.llava import out_of_memory
from llava_packing_tower.integrations.llava.patcher import Patches
from llava_packing_tower.integrations.llava.speed_meter import MicroStep, Span

CPU = "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory"
CUDA = "CUDA out of memory. Tried to allocate 2.00 GiB"


class Step:
    """A training step of a trainer with two samples of 7 and 4 tokens, of which 6 are words, on three images."""

    def __init__(self, monkeypatch, native=True, checkpointing=False, packing=True, **config):
        monkeypatch.setattr(out_of_memory, "is_packing_tower", lambda tower: packing)
        tower = SimpleNamespace(encoder_tokens=900)
        ratio = "native" if native else "pad"
        config = SimpleNamespace(
            image_aspect_ratio=ratio, mm_packing_max_patches=64, tokenizer_model_max_length=512, **config
        )
        self.meter = SimpleNamespace(current=None, micro_steps=["an earlier one"])
        self.trainer = SimpleNamespace(
            model=SimpleNamespace(get_vision_tower=lambda: tower, config=config),
            args=SimpleNamespace(per_device_train_batch_size=2, gradient_checkpointing=checkpointing),
            _llava_packing_speed=SimpleNamespace(meter=self.meter),
        )

    def run(self, patches, error, after):
        def step(trainer, model, inputs):
            seen = MicroStep(
                0, 0.0, Span(False), torch.tensor([[7, 4], [3, 3], [1, 1]]), [(1, 6, 6), (1, 4, 4), (1, 3, 5)]
            )
            if after == "backward":
                self.meter.micro_steps.append(seen)
            elif after == "forward":
                self.meter.current = seen
            raise error

        patches.set(Trainer, "training_step", step)
        out_of_memory.explain_out_of_memory(patches)
        Trainer.training_step(self.trainer, None, {})


@pytest.fixture
def patches():
    made = Patches()
    yield made
    made.undo()


@pytest.mark.parametrize("error", [RuntimeError(CPU), torch.cuda.OutOfMemoryError(CUDA)])
@pytest.mark.parametrize("after", ["forward", "backward", "nothing"])
def test_it_says_what_was_asked_for_and_what_lowers_it(patches, monkeypatch, error, after):
    with pytest.raises(type(error)) as caught:
        Step(monkeypatch, mm_packing_batch_tokens=4096).run(patches, error, after)
    assert caught.value.__cause__ is error and type(caught.value) is type(error)
    first, second = str(caught.value).split("\n")
    assert first == str(error)
    numbers = "11 tokens of 2 samples, 5 of them visual, and 67 patches of 3 images"
    said = {"nothing": "training step"}.get(after, f"{after} pass of a training step with {numbers}")
    assert second == (
        f"The memory did not suffice for the {said}. Lower per_device_train_batch_size (2), "
        "mm_packing_batch_tokens (4096), mm_packing_max_patches (64), model_max_length (512), or set "
        "gradient_checkpointing: true"
    )


def test_only_the_keys_that_have_an_effect_are_named(patches, monkeypatch):
    with pytest.raises(RuntimeError) as caught:
        Step(monkeypatch, native=False, checkpointing=True).run(patches, RuntimeError(CPU), "backward")
    assert str(caught.value).endswith(
        "Lower per_device_train_batch_size (2), mm_packing_batch_tokens (not set), mm_packing_encoder_tokens (900), "
        "model_max_length (512)"
    )


@pytest.mark.parametrize(
    ("error", "packing"),
    [
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), True),
        (RuntimeError(f"{CPU}\nThe vision tower was asked for 110 patches of 7 images in one pass; ..."), True),
        (RuntimeError(CPU), False),
        (ValueError(CPU), True),
    ],
)
def test_other_errors_stay_as_they_are(patches, monkeypatch, error, packing):
    """One of another kind, one that the tower has explained, and one of a model without a packing tower."""
    with pytest.raises(type(error)) as caught:
        Step(monkeypatch, packing=packing).run(patches, error, "backward")
    assert caught.value is error
