"""The packed training step inside a real host: ``python packed_step_checks.py FOLDER`` runs every check.

Two hosts have one package name, so each gets a process; it prints a JSON of check name and traceback (None: passed).
The reference is the host's own padded path in the same process: there the wrapper is told that no call is a step.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import torch
from native_host import IGNORE, IMAGE, Host, collate, pixels
from torch.nn.functional import pad
from torch.utils._python_dispatch import TorchDispatchMode

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
            with _default(dtype):
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
def _default(dtype):
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


@contextlib.contextmanager
def host_path():
    from llava_packing_tower.integrations.llava import packed_step

    with mock.patch.object(packed_step, "is_training_step", lambda model, given: False):
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
    with patched, _default(torch.float64):
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


# ---------------------------------------------------------------- logits


@check
def logits_in_training_for_a_key(models):
    model = models.make()
    batch = batch_of(model, "several images and text")
    with host_path():
        expected = call(model, batch)
    model.config.mm_packing_full_logits = True
    with rows_made(1):
        found = call(model, batch)
    assert found.logits.shape == expected.logits.shape and found.logits.requires_grad
    lengths = _lengths(model, batch)
    for row, length in enumerate(lengths):
        assert (found.logits[row, :length] - expected.logits[row, :length]).abs().max() < 1e-5
    assert abs(found.loss.item() - expected.loss.item()) < 1e-5
    compare(model, batch, 1e-5)


def _lengths(model, batch):
    from native_host import IMAGE as token

    tokens = iter([image.shape[1] // 14 * (image.shape[2] // 14 + 1) for image in batch["images"]])
    found = []
    for row, mask in zip(batch["input_ids"], batch["attention_mask"]):
        ids = row[mask].tolist()
        count = len(ids)
        for _ in range(max(1, ids.count(token))):
            more = next(tokens)
            count += (more - 1) if token in ids else 0
        found.append(count)
    return found


@check
def evaluation_and_generation_are_the_hosts(models):
    for word in models.words:
        model = models.make(word)
        batch = batch_of(model, "several images and text")
        call(model, batch).loss.backward()  # everything is wrapped
        model.eval()
        with host_path():
            expected = call(model, batch)
        found = call(model, batch)
        assert torch.equal(found.logits, expected.logits) and torch.equal(found.loss, expected.loss)
        model.train()
        with torch.no_grad():
            assert call(model, batch).logits is not None
        without = {name: value for name, value in batch.items() if name != "labels"}
        assert call(model, without).logits is not None


@check
def generation_is_the_hosts(models):
    for word in models.words:
        model = models.make(word)
        batch = batch_of(model, "one sample")
        ids, images = batch["input_ids"], batch["images"]
        more = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        with host_path():
            expected = copy.deepcopy(model).eval().generate(ids, images=images, **more)
        call(model, batch).loss.backward()  # everything is wrapped
        assert torch.equal(model.eval().generate(ids, images=images, **more), expected) and expected.shape[1] >= 4


@check
def an_evaluation_with_use_liger_kernel(models):
    """transformers then tells the model to skip its logits, which LLaVA's forward does not take."""
    model = models.make()
    trainer = _trainer(models, models.folder, model)
    batch = batch_of(model, "text alone")
    batch.pop("images")
    with torch.no_grad():
        loss, outputs = trainer.compute_loss(model.eval(), {**batch, "skip_logits": True}, return_outputs=True)
    assert loss.isfinite() and outputs.logits is not None


def _trainer(models, folder, model, cls=None, **options):
    from transformers import Trainer, TrainingArguments

    from llava_packing_tower.integrations.llava.packed_step import into_trainer
    from llava_packing_tower.integrations.llava.patcher import Patches

    into_trainer(Patches())
    arguments = TrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to=[], remove_unused_columns=False, save_strategy="no", **options
    )
    trainer = (cls or Trainer)(model=model, args=arguments, train_dataset=[0], data_collator=lambda samples: {})
    trainer.current_gradient_accumulation_steps = 1  # for a step outside of train()
    return trainer


@check
def label_smoothing_gets_logits(models):
    model = models.make()
    trainer = _trainer(models, models.folder, model, label_smoothing_factor=0.1)
    batch = batch_of(model, "text alone")
    batch.pop("images")
    loss = trainer.training_step(model, dict(batch))
    assert loss.isfinite() and loss > 0


@check
def a_compute_loss_of_ones_own_gets_logits(models):
    from transformers import Trainer

    seen = []

    class Own(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            outputs = call(model, inputs)
            seen.append(outputs.logits is not None)
            return outputs.loss

    for cls, expected in ((Own, True), (None, None)):
        model = models.make()
        trainer = _trainer(models, models.folder, model, cls)
        batch = batch_of(model, "text alone")
        if cls is None:
            batch.pop("images")
            forward, kept = type(model).forward, []
            with mock.patch.object(type(model), "forward", _spy(forward, kept)):
                trainer.training_step(model, dict(batch))
            assert [out.logits for out in kept] == [None]
        else:
            trainer.training_step(model, dict(batch))
            assert seen == [expected]


def _spy(forward, kept):
    @functools.wraps(forward)
    def spied(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        kept.append(out)
        return out

    return spied


@check
def accumulated_steps_are_the_hosts(models):
    """Two micro-batches of one optimizer step, through transformers' own loop."""
    from transformers import Trainer

    results = []
    for ours in (True, False):
        model = models.make()
        batches = [batch_of(model, case) for case in ("text alone", (([30, 31, 32, 33], [34, 35]), SIDES["text"] * 2))]
        for batch in batches:
            batch.pop("images")
        width = max(batch["input_ids"].shape[1] for batch in batches)
        rows = []
        for batch in batches:
            for index in range(2):
                fill = {"input_ids": 0, "labels": IGNORE, "attention_mask": False}
                rows.append({n: pad(batch[n][index], (0, width - batch[n].shape[1]), value=v) for n, v in fill.items()})

        class Ordered(Trainer):
            def _get_train_sampler(self, *args):
                return torch.utils.data.SequentialSampler(self.train_dataset)

        trainer = _trainer(
            models,
            models.folder,
            model,
            Ordered,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            max_steps=1,
            learning_rate=1e-2,
            optim="sgd",
            max_grad_norm=0,
            lr_scheduler_type="constant",
        )
        trainer.train_dataset = rows
        trainer.data_collator = lambda samples: {n: torch.stack([s[n] for s in samples]) for n in samples[0]}
        with contextlib.nullcontext() if ours else host_path(), rows_made(2 if ours else 0):
            trainer.train()
        results.append({name: parameter.detach() for name, parameter in model.named_parameters()})
    start = dict(models.make().named_parameters())
    moved = {name: (value - start[name]).abs().max().item() for name, value in results[1].items()}
    assert max(moved.values()) > 1e-4
    for name, value in results[1].items():
        assert (results[0][name] - value).abs().max().item() <= 1e-4 * moved[name] + 1e-7, name


# ---------------------------------------------------------------- the plan


@check
def decoders_that_cannot_stay_padded(models):
    from llava_packing_tower.integrations.llava.packed_step import make_plan

    cases = [("Llama", {"attention_dropout": 0.1}, "attention_dropout"), ("Mistral", {"sliding_window": 8}, "sliding")]
    cases += [("Llama", {"use_pos_skipping": True, "pos_skipping_range": 5}, "use_pos_skipping")]
    cases += [("Llama", {"mm_packing_decoder": False}, "mm_packing_decoder: false")]
    with nothing_rounded():
        for word, options, reason in cases:
            if word not in models.words:
                continue
            model = models.make(word, torch.float64, **options)
            plan = make_plan(model)
            assert reason in plan.decoder_reason and plan.head_reason is None and plan.attention is None
            assert reason in str(plan) and "head: supervised positions" in str(plan)
            if word == "Mistral" or "mm_packing_decoder" in options:
                found, _ = compare(model, batch_of(model, "several images and text"), 1e-10, rows=0)
                assert found.logits is None
        if "Mistral" in models.words:
            assert make_plan(models.make("Mistral", sliding_window=400)).decoder_reason is None  # no sample is longer


@check
def a_window_that_a_sample_can_exceed_is_kept(models):
    """Without flash attention, Qwen2 of transformers 4.40 has it even where use_sliding_window is false."""
    from llava_packing_tower.integrations.llava.packed_step import make_plan

    if "Qwen" not in models.words:
        return
    with nothing_rounded():
        for used in (True, False):
            model = models.make("Qwen", torch.float64, use_sliding_window=used, sliding_window=8)
            none = model.config.sliding_window is None  # transformers 5 takes it away from who does not use it
            compare(model, batch_of(model, "several images and text"), 1e-10, rows=int(none))
            assert not (none and used)
        fits = models.make("Qwen", torch.float64, use_sliding_window=False, sliding_window=400)
        compare(fits, batch_of(fits, "several images and text"), 1e-10)
    model.config._attn_implementation = "flash_attention_2"
    assert make_plan(model).decoder_reason is None


@check
def decoders_of_other_classes_train_as_the_host_has_them(models):
    from llava_packing_tower.integrations.llava.packed_step import plan_of
    from llava_packing_tower.integrations.llava.patcher import Patches

    few = {"num_experts_per_tok": 2}
    others = {
        "gemma": ("Gemma", {"head_dim": 8}),
        "mixtral": ("Mixtral", {"num_local_experts": 3}),
        "qwen_moe": ("QwenMoe", {"num_experts": 3, "moe_intermediate_size": 8, **few}),
        "mpt": ("Mpt", {"d_model": 32, "n_heads": 4, "n_layers": 1, "max_seq_len": 64}),
    }
    known = vars(models.make().config).items()
    towers = {name: value for name, value in known if name.startswith(("mm_", "image_", "tokenizer_"))}
    trained = []
    for file, (word, options) in others.items():
        try:
            module = import_module(f"llava.model.language_model.llava_{file}")
        except ModuleNotFoundError:
            continue
        sizes = {"vocab_size": 50} if word == "Mpt" else SIZES
        config = getattr(module, f"Llava{word}Config")(**sizes, **options, **towers)
        model = getattr(module, f"Llava{word}ForCausalLM")(config).float().train()
        plan = plan_of(model, Patches())
        assert f"Llava{word}ForCausalLM is not built on Llama" in plan.head_reason and plan.attention is None
        if word == "Mpt" or (word != "Gemma" and not hasattr(model, "vocab_size") and FIVE):
            continue  # its forward hands the arguments of an older LLaVA on; the host's own step fails
        batch = batch_of(model, "images")
        given = {name: batch[name] for name in ("input_ids", "attention_mask", "labels", "images")}
        assert _trainer(models, models.folder, model).training_step(model, given).isfinite()
        trained.append(word)
    assert len(trained) >= (1 if FIVE else 3) * models.is_next
    if trained and not FIVE:  # train.py names these two, but does not import them
        train = import_module("llava.train.train")
        for word in ("Gemma", "QwenMoe"):
            assert getattr(train, f"Llava{word}ForCausalLM").__name__ == f"Llava{word}ForCausalLM"


@check
def a_class_that_changes_logits_computes_its_loss_itself(models):
    from llava_packing_tower.integrations.llava.packed_step import decoder_base, make_plan

    with nothing_rounded():
        model = models.make(dtype=torch.float64)
        base = decoder_base(type(model))

        class Capped(base):
            def forward(self, *args, **kwargs):
                out = super().forward(*args, **kwargs)
                out.logits = 3 * torch.tanh(out.logits / 3)
                flat = out.logits[:, :-1].flatten(0, 1), kwargs["labels"][:, 1:].flatten()
                out.loss = torch.nn.functional.cross_entropy(*flat)
                return out

        model.__class__ = type("OfCapped", (type(model), Capped), {})
        assert make_plan(model).head_reason == "Capped computes its loss itself"
        compare(model, batch_of(model, "several images and text"), 1e-10, rows=0)
        own = models.make(dtype=torch.float64)
        own.__class__ = type("Own", (type(own),), {})
        compare(own, batch_of(own, "several images and text"), 1e-10)


@check
def outputs_that_the_config_asks_for_are_the_hosts(models):
    for name, attention in (("output_hidden_states", "sdpa"), ("output_attentions", "eager"), ("return_dict", "sdpa")):
        model = models.make(attention=attention)
        batch = batch_of(model, "images")
        setattr(model.config, name, name != "return_dict")
        try:
            with host_path():
                expected = call(model, batch)
        except AttributeError:  # transformers 5.24 knows no tuples
            assert name == "return_dict"
            continue
        found = call(model, batch)
        assert type(found) is type(expected)
        if name != "return_dict":
            part = name.removeprefix("output_")
            assert (getattr(found, part) is None) == (getattr(expected, part) is None)


@check
def positions_of_a_caller_are_no_row(models):
    """One sample padded on the left, and two in one row as the host has them: neither is a packed row."""
    with nothing_rounded():
        for positions in ([0, 0, 0, 1, 2, 3], [0, 1, 2, 0, 1, 2]):
            model = models.make(dtype=torch.float64)
            embeds = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(0)).double()
            given = {"inputs_embeds": embeds, "labels": torch.tensor([[IGNORE, IGNORE, 5, 6, 7, 8]])}
            given["position_ids"] = torch.tensor([positions])
            expected = copy.deepcopy(model)(**given).loss
            call(model, batch_of(model, "images")).loss.backward()  # everything is wrapped
            assert abs(model(**given).loss - expected) < 1e-12


@check
def autocast_reaches_the_attention(models):
    """Angles in float32 would make queries and keys float32, for which no fast kernel is there."""
    from llava_packing_tower.multimodal import packed_decoder

    for word in models.words:
        model, seen, choose = models.make(word), set(), packed_decoder.causal_backend

        def spy(device, dtype, *more, seen=seen, choose=choose):
            seen.add(dtype)
            return choose(device, dtype, *more)

        with mock.patch.object(packed_decoder, "causal_backend", spy), torch.autocast("cpu", dtype=torch.bfloat16):
            call(model, batch_of(model, "images")).loss.backward()
        assert seen == {torch.bfloat16}


@check
def the_plan_is_said_once(models):
    import logging

    from llava_packing_tower.integrations.llava import packed_step

    model, said = models.make(), []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    packed_step.logger.addHandler(handler)
    packed_step.logger.setLevel(logging.INFO)
    try:
        for _ in range(3):
            call(model, batch_of(model, "images")).loss.backward()
    finally:
        packed_step.logger.removeHandler(handler)
    assert len(said) == 1 and "packed decoder: on (sdpa); head: supervised positions; liger: off (" in said[0], said


@check
def other_towers_are_left_alone(models):
    model = models.make()
    with mock.patch("llava_packing_tower.integrations.llava.packed_step.is_packing_tower", lambda tower: False):
        assert call(model, batch_of(model, "images")).logits is not None


@check
def the_interface_of_the_attention_is_known(models):
    """Every class that transformers may choose for these decoders, in the installed version."""
    from llava_packing_tower.integrations.llava.decoder_attention import unsupported_attention

    for word in models.words:
        attention = models.make(word).model.layers[0].self_attn
        assert unsupported_attention(attention) is None
        module = sys.modules[type(attention).__module__]
        classes = next((v for k, v in vars(module).items() if k.endswith("_ATTENTION_CLASSES")), {})
        for cls in classes.values():
            attention.__class__ = cls
            assert unsupported_attention(attention) is None, cls


def make(folder: Path) -> Models:
    models = Models(folder)
    models.folder = folder
    return models
