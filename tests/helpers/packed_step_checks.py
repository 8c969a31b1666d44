"""The packed training step inside a real host: ``python packed_step_checks.py FOLDER`` runs every check.

Two hosts have one package name, so each gets a process; it prints a JSON of check name and traceback (None: passed).
The reference is the host's own padded path in the same process: there the wrapper is told that no call is a step.
"""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from unittest import mock

import packed_step_plan_checks  # noqa: F401 (adds its checks)
import torch
from native_host import IGNORE, IMAGE, pixels
from packed_step_models import (
    CASES,
    CHECKS,  # noqa: F401 (asked for by name)
    LATE_IMAGE,
    ONE_IMAGE,
    SIDES,
    TEXT,
    TWO_IMAGES,
    Models,
    batch_of,
    call,
    check,
    compare,
    gradients,
    host_path,
    nothing_rounded,
    rows_made,
    same,
)
from torch.utils._python_dispatch import TorchDispatchMode

# ---------------------------------------------------------------- equal to the host


@check
def float64_loss_and_gradients_are_the_hosts(models):
    with nothing_rounded():
        for word in models.words:
            for padding in ("right", "left"):
                for case in CASES:
                    model = models.make(word, torch.float64)
                    found, _ = compare(model, batch_of(model, case, padding), 1e-10)
                    assert found.logits is None and found.loss.dtype == torch.float64


@check
def float32_loss_and_gradients_are_the_hosts(models):
    for word in models.words:
        for attention in ("sdpa", "eager"):
            model = models.make(word, attention=attention)
            compare(model, batch_of(model, "several images and text"), 1e-5)


@check
def words_put_together_on_the_host(models):
    """As where the model is on a GPU: one call embeds the words of all samples. LLaVA's has one for each sample."""
    from llava_packing_tower.integrations.llava import text_only_batches, words_on_host

    at_once = mock.Mock(wraps=text_only_batches.OneLookup)
    away = mock.patch.object(words_on_host, "_is_away", lambda tensor: True)
    with nothing_rounded(), away, mock.patch.object(text_only_batches, "OneLookup", at_once):
        for padding in ("right", "left"):
            for case in CASES:
                model = models.make(dtype=torch.float64)
                compare(model, batch_of(model, case, padding), 1e-10)
        assert at_once.call_count == 2 * len(CASES)
        model = models.make(dtype=torch.float64, mm_packing_decoder=False)  # leaves the step to LLaVA
        compare(model, batch_of(model, "images"), 1e-10, rows=0)
        assert at_once.call_count == 2 * len(CASES)


@check
def truncated_samples(models):
    with nothing_rounded():
        for limit in (6, 9, 14):  # inside an image, inside the answers
            model = models.make(dtype=torch.float64, limit=limit)
            batch = batch_of(model, "several images and text", supervised=4)
            with rows_made(1):
                assert call(model, batch).loss.isfinite()
            compare(model, batch, 1e-10)


@check
def videos(models):
    """Clips of three frames and of one, beside an image and a text; packed, and padded for a key."""
    with nothing_rounded():
        for options, rows in (({}, 1), ({"mm_packing_decoder": False}, 0)):
            model = models.make(dtype=torch.float64, **options)
            kinds = ["video", "text", "image", "video"]
            batch = batch_of(model, ([ONE_IMAGE, TEXT, LATE_IMAGE, ONE_IMAGE], [(2, 3), (1, 1), (4, 3), (3, 2)]))
            batch["images"][0] = torch.stack([image.double() for image in pixels((2, 3), (2, 3), (2, 3), seed=4)])
            batch["images"][3] = batch["images"][3][None]
            batch |= {"modalities": kinds, "image_sizes": [{"modality": kind} for kind in kinds]}
            with_image = call(model, {**batch, "images": [batch["images"][0][0], *batch["images"][1:]]})
            found, _ = compare(model, batch, 1e-10, rows=rows)
            assert abs(found.loss.item() - with_image.loss.item()) > 1e-4


@check
def classes_without_modalities_take_them(models):
    """The collator of LLaVA-NeXT gives them to all. Mistral takes none, and hands image_sizes on in their place."""
    if not models.is_next:
        return
    model = models.make("Mistral")
    kinds = ["video", "text", "image", "video"]
    batch = batch_of(model, ([ONE_IMAGE, TEXT, LATE_IMAGE, ONE_IMAGE], [(2, 3), (1, 1), (4, 3), (3, 2)]))
    batch["images"][0] = torch.stack(list(pixels((2, 3), (2, 3), (2, 3), seed=4)))
    batch["images"][3] = batch["images"][3][None]
    more = {"modalities": kinds, "image_sizes": [{"modality": kind} for kind in kinds]}
    made = model.prepare_inputs_labels_for_multimodal(
        batch["input_ids"], None, batch["attention_mask"], None, batch["labels"], batch["images"], **more
    )
    expected = model(inputs_embeds=made[4], attention_mask=made[2], labels=made[5]).loss
    names = ("input_ids", "attention_mask", "labels", "images")
    assert torch.equal(model(**{name: batch[name] for name in names}, **more).loss, expected)
    one = {name: batch[name][2:3] for name in names}  # and without them, as a caller of its own may
    assert torch.equal(model(**one).loss, model(**one, modalities=["image"], image_sizes=[(42, 56)]).loss)


@check
def padded_for_a_key(models):
    """The head alone, at supervised positions."""
    with nothing_rounded():
        for case in CASES:
            model = models.make(dtype=torch.float64, mm_packing_decoder=False)
            compare(model, batch_of(model, case), 1e-10, rows=0)


@check
def every_aspect_ratio(models):
    with nothing_rounded():
        for ratio in ("square", "pad"):
            model = models.make(dtype=torch.float64)
            model.config.image_aspect_ratio = ratio
            batch = batch_of(model, ([ONE_IMAGE, TEXT, LATE_IMAGE], [(4, 4)] * 3))
            batch["images"] = torch.stack(batch["images"])
            compare(model, batch, 1e-10)


@check
def no_label_at_all(models):
    """NaN with gradients of zero, as the host has it."""
    model = models.make()
    batch = batch_of(model, "several images and text", supervised=0)
    assert (batch["labels"] == IGNORE).all()
    with host_path():
        other = copy.deepcopy(model)
        expected = call(other, batch)
        theirs = gradients(other, expected.loss)
    found = call(model, batch)
    ours = gradients(model, found.loss)
    assert found.loss.isnan() and expected.loss.isnan()
    for name, gradient in theirs.items():
        assert (gradient is None) == (ours[name] is None), name
        assert gradient is None or torch.equal(torch.nan_to_num(gradient), torch.nan_to_num(ours[name])), name


@check
def a_sample_without_labels_beside_others(models):
    with nothing_rounded():
        model = models.make(dtype=torch.float64)
        batch = batch_of(model, "several images and text")
        batch["labels"][2] = IGNORE
        compare(model, batch, 1e-10)


@check
def padding_that_the_host_trains_stays_padded(models):
    """A text whose first token is supervised, padded on the left: the host's padding predicts it."""
    with nothing_rounded():
        model = models.make(dtype=torch.float64)
        batch = batch_of(model, "several images and text", "left", supervised=9)
        assert batch["labels"][1, -3] == TEXT[0]
        compare(model, batch, 1e-10, rows=0)
        right = batch_of(model, "several images and text", "right", supervised=9)
        compare(model, right, 1e-10, rows=1)


@check
def checkpointed_layers(models):
    with nothing_rounded():
        for reentrant in (False, True):
            for word in models.words:
                model = models.make(word, torch.float64)
                batch = batch_of(model, "several images and text")
                plain = gradients(model, call(model, batch).loss)
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
                losses = [call(model, batch).loss, call(model, batch_of(model, "images")).loss]  # two before a backward
                losses[1].backward()
                same(gradients(model, losses[0]), plain, 1e-10)


@check
def checkpointed_layers_by_graphs(models):
    from cpu_graphs import BACKEND, graphs_on_cpu

    from llava_packing_tower.multimodal.packed_decoder import only_backend

    for word in models.words:
        for reentrant in (False, True):
            with nothing_rounded(), graphs_on_cpu(most_tokens=256) as made, only_backend(BACKEND):
                model = models.make(word, torch.float64)
                batches = [batch_of(model, case) for case in ("several images and text", "images", "text alone")]
                plain = [gradients(model, call(model, batch).loss) for batch in batches]
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
                losses = [call(model, batch).loss for batch in batches]  # all before a backward
                for loss, expected in zip(losses, plain, strict=True):
                    same(gradients(model, loss), expected, 1e-10)
                assert vars(made) == {"captures": 6, "replays": 12}, (word, vars(made))  # 2 layers, there and back
                for batch in batches:  # nothing that was captured is captured again
                    gradients(model, call(model, batch).loss)
                assert vars(made) == {"captures": 6, "replays": 24}, (word, vars(made))
                for parameter in model.model.layers.parameters():
                    parameter.requires_grad_(False)
                found = gradients(model, call(model, batches[1]).loss)
                assert made.replays == 28
                trained = {name: gradient for name, gradient in found.items() if gradient is not None}
                same(trained, {name: plain[1][name] for name in trained}, 1e-10)
                assert not any("model.layers" in name for name in trained)
                assert found["model.mm_projector.0.weight"].any()
                # What has hooks is called, and so is a checkpoint function of one's own.
                handle = model.model.layers[1].mlp.register_forward_hook(lambda *_: None)
                gradients(model, call(model, batches[1]).loss)
                handle.remove()
                assert made.replays == 28
                called = []
                for part in (model.model, *model.model.layers):
                    if "_gradient_checkpointing_func" in vars(part):
                        part._gradient_checkpointing_func = functools.partial(_noted, called)
                gradients(model, call(model, batches[1]).loss)
                assert made.replays == 28 and len(called) == 2


def _noted(called, run, *given):
    called.append(run)
    return run(*given)


@check
def layers_that_differ_have_no_graphs(models):
    from llava_packing_tower.integrations.llava.decoder_graphs import unlike

    def attribute(layers):
        layers[1].self_attn.head_dim += 0
        layers[1].self_attn.sliding_window = 7

    changes = {
        "part": lambda layers: setattr(layers[1].mlp, "act_fn", torch.nn.ReLU()),
        "foreign": lambda layers: setattr(layers[0].mlp, "down_proj", type("Own", (torch.nn.Linear,), {})(48, 32)),
        "forward": lambda layers: setattr(layers[1].mlp, "forward", layers[1].mlp.forward),
        "attribute": attribute,
        "sharded": lambda layers: setattr(layers[1].mlp.down_proj.weight, "ds_id", 3),
    }
    for word in models.words:
        assert unlike(models.make(word).model.layers) is None, unlike(models.make(word).model.layers)
        if hasattr(models.make(word).model.layers[0].self_attn, "rotary_emb"):
            layers = models.make(word).model.layers
            rotary = type(layers[0].self_attn.rotary_emb)
            kind = type("DynamicNTKScalingRotaryEmbedding", (rotary,), {"__module__": rotary.__module__})
            for layer in layers:
                layer.self_attn.rotary_emb.__class__ = kind
            assert "whose angles may depend on the batch" in unlike(layers)
        for name, change in changes.items():
            layers = models.make(word).model.layers
            change(layers)
            assert unlike(layers) is not None, name


@check
def lora(models):
    import peft

    def wrapped(model):
        torch.manual_seed(0)
        layers = ["q_proj", "v_proj", "up_proj", "lm_head"]
        config = peft.LoraConfig(r=3, target_modules=layers, init_lora_weights=False)
        return peft.get_peft_model(model, config)

    with nothing_rounded():
        model = wrapped(models.make(dtype=torch.float64)).double()
        batch = batch_of(model.get_base_model(), "several images and text")
        compare(model, batch, 1e-10, path=lambda peft_model, given: call(peft_model.get_base_model(), given))


# ---------------------------------------------------------------- neighbours


@check
def a_changed_neighbour_changes_no_gradient(models):
    """Only the second sample is supervised; the first and the third change in words, images and length."""
    with nothing_rounded():
        for word in models.words:
            model = models.make(word, torch.float64)
            found = []
            for first, last, sides in (
                (ONE_IMAGE, TEXT, SIDES["one"] + SIDES["two"] + SIDES["text"]),
                ([40, 41, 42, IMAGE, 43], [44, 45, 46, 47, 48], [(5, 1)] + SIDES["two"] + SIDES["text"]),
            ):
                batch = batch_of(model, ([first, TWO_IMAGES, last], sides))
                images = pixels(*SIDES["two"], seed=9)
                batch["images"][1:3] = [image.double() for image in images]
                batch["labels"][[0, 2]] = IGNORE
                with rows_made(1):
                    loss = call(model, batch).loss
                found.append((loss.item(), gradients(model, loss)))
            assert abs(found[0][0] - found[1][0]) < 1e-12
            same(found[0][1], found[1][1], 1e-10)


@check
def no_mask_of_all_by_all(models):
    """No tensor of the decoder has the length of the row twice."""

    class Shapes(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.found = set()

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(tensor, torch.Tensor):
                    self.found.add(tuple(tensor.shape))
            return out

    lengths = (23, 31, 17)
    samples = [list(range(3, 3 + length)) for length in lengths]
    for word in models.words:
        for attention in ("eager", "sdpa"):
            model = models.make(word, attention=attention)
            batch = batch_of(model, (samples, SIDES["text"] * 3))
            call(model, batch)  # the plan is made
            with Shapes() as shapes:
                call(model, batch).loss.backward()
            total = sum(lengths)
            assert any(total in shape for shape in shapes.found)
            assert not [shape for shape in shapes.found if shape.count(total) > 1], (word, attention)


def make(folder: Path) -> Models:
    models = Models(folder)
    models.folder = folder
    return models
