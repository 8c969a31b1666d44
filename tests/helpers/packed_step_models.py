"""Models, batches and comparisons of the checks of the packed training step (``packed_step_checks.py``).

The reference is the host's own padded path in the same process: there the wrapper is told that no call is a step.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import torch
from native_host import IGNORE, IMAGE, Host, collate, pixels

CHECKS = {}
FIVE = version("transformers") >= "5"
DECODERS = {"Llama": "LlavaConfig", "Qwen": "LlavaQwenConfig", "Mistral": "LlavaMistralConfig"}
SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
# The supervised tokens of each sample are its last ones; what lies in front is a prompt.
ONE_IMAGE = [3, IMAGE, 4, 5, 6]
TEXT = [7, 8, 9]
TWO_IMAGES = [10, IMAGE, 11, 12, IMAGE, 13, 14, 15, 16]
LATE_IMAGE = [17, 18, 19, 20, IMAGE, 21, 22]
SIDES = {"one": [(2, 5)], "text": [(1, 1)], "two": [(3, 2), (1, 7)], "late": [(4, 3)]}
CASES = {
    "images": ([ONE_IMAGE, LATE_IMAGE], SIDES["one"] + SIDES["late"]),
    "several images and text": (
        [ONE_IMAGE, TEXT, TWO_IMAGES, LATE_IMAGE],
        SIDES["one"] + SIDES["text"] + SIDES["two"] + SIDES["late"],
    ),
    "text alone": ([TEXT, [30, 31, 32, 33, 34, 35]], SIDES["text"] * 2),
    "one sample": ([TWO_IMAGES], SIDES["two"]),
}


def check(function):
    CHECKS[function.__name__] = function
    return function


# ---------------------------------------------------------------- models and batches


class Models:
    """Tiny models of each decoder of the host under test, always with the same weights."""

    def __init__(self, folder: Path) -> None:
        host = Host(folder)
        self.tower, self.is_next, self.kept = host.tower, host.is_next, {}
        words = ["Llama", "Mistral"] + ["Qwen"] * self.is_next
        self.words = [word for word in words if self._module(word) is not None]

    @staticmethod
    def _module(word):
        try:
            return import_module(f"llava.model.language_model.llava_{word.lower()}")
        except ModuleNotFoundError:
            return None

    def make(self, word="Llama", dtype=torch.float32, attention="sdpa", limit=400, **options):
        if word == "Mistral":  # its default is a window of 4096
            options.setdefault("sliding_window", None)
        key = (word, dtype, attention, limit, *sorted(options.items()))
        sizes = {name: options.pop(name) for name in SIZES if name in options}
        if key not in self.kept:
            module = self._module(word)
            with default_dtype(dtype):
                config = getattr(module, DECODERS[word])(
                    **{**SIZES, **sizes},
                    attn_implementation=attention,
                    mm_vision_tower=str(self.tower),
                    mm_hidden_size=64,
                    mm_vision_select_layer=-1,
                    unfreeze_mm_vision_tower=True,
                    image_aspect_ratio="native",
                    mm_projector_type="mlp2x_gelu",
                    mm_patch_merge_type="spatial_unpad",
                    mm_packing_min_patches=1,
                    mm_packing_max_patches=64,
                    mm_packing_video="clip",
                    tokenizer_model_max_length=limit,
                    **options,
                )
                model = getattr(module, f"Llava{word}ForCausalLM")(config).to(dtype)
            generator = torch.Generator().manual_seed(5)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
            self.kept[key] = model.requires_grad_(True).train()
        return copy.deepcopy(self.kept[key])


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def batch_of(model, case, padding="right", supervised=2):
    """A batch as the collator makes it; the last two tokens of each sample have labels."""
    samples, sides = CASES[case] if isinstance(case, str) else case
    model.config.tokenizer_padding_side = padding
    dtype = model.lm_head.weight.dtype
    batch = collate(samples, [image.to(dtype) for image in pixels(*sides)], padding)
    for row in batch["labels"]:
        places = (row != IGNORE).nonzero().squeeze(1)
        row[places[: max(0, len(places) - supervised)]] = IGNORE
    return batch


def call(model, batch):
    names = ("input_ids", "attention_mask", "labels", "images", "image_sizes")
    given = {name: batch[name] for name in names if name in batch}
    if "modalities" in inspect.signature(type(model).forward).parameters and "images" in given:
        given["modalities"] = batch.get("modalities", ["image"] * len(batch["images"]))
    return model(**given)


def gradients(model, loss):
    model.zero_grad(set_to_none=True)
    loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


class EachSample:
    """Stands for ``OneLookup``: LLaVA looks up the words of each sample by themselves, as without this package."""

    def __init__(self, embedding, ids):
        self.embedding, self.rows, self.taken = embedding, ids, 0

    def __call__(self, ids):
        self.taken += len(ids)
        return self.embedding(ids)


@contextlib.contextmanager
def host_path():
    from llava_packing_tower.integrations.llava import packed_step, text_only_batches, words_on_host

    with (
        mock.patch.object(packed_step, "is_training_step", lambda model, given: False),
        mock.patch.object(words_on_host, "_is_away", lambda tensor: False),
        mock.patch.object(text_only_batches, "OneLookup", EachSample),
    ):
        yield


@contextlib.contextmanager
def rows_made(expected):
    """That this many batches became a row."""
    from llava_packing_tower.integrations.llava import packed_step

    made, pack = [], packed_step.pack_batch

    def spy(*args):
        row = pack(*args)
        made.append(row is not None)
        return row

    with mock.patch.object(packed_step, "pack_batch", spy):
        yield
    assert sum(made) == expected, (made, expected)


@contextlib.contextmanager
def nothing_rounded():
    """transformers computes norms, angles and losses in float32: in here float64 stays float64."""
    to, original = torch.Tensor.to, torch.Tensor.float

    def stay(self, *args, **kwargs):
        if self.dtype == torch.float64:
            args = tuple(torch.float64 if a is torch.float32 else a for a in args)
            if kwargs.get("dtype") is torch.float32:
                kwargs["dtype"] = torch.float64
        return to(self, *args, **kwargs)

    def wide(self):
        return original(self) if self.is_floating_point() and self.dtype != torch.float64 else self.double()

    patched = mock.patch.multiple(torch.Tensor, to=stay, float=wide)
    with patched, default_dtype(torch.float64):
        yield


def same(ours, theirs, most):
    """Every gradient, in parts of the largest value of its tensor; none may be missing on one side alone."""
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        found = ours[name]
        if expected is None or found is None:
            assert found is None and expected is None, (name, found is None, expected is None)
            continue
        largest = expected.abs().max().item()
        worst = (found - expected).abs().max().item()
        assert worst <= most * largest, (name, worst, largest)


def compare(model, batch, most, rows=1, path=call):
    with host_path():
        other = copy.deepcopy(model)
        expected = path(other, batch)
        theirs = gradients(other, expected.loss)
    with rows_made(rows):
        found = path(model, batch)
    ours = gradients(model, found.loss)
    assert abs(found.loss.item() - expected.loss.item()) <= most * abs(expected.loss.item()), (found, expected.loss)
    same(ours, theirs, most)
    return found, expected
