"""Checks of the packed training step: logits, and the plan of a model (among those of ``packed_step_checks.py``)."""

from __future__ import annotations

import contextlib
import copy
import functools
import sys
from importlib import import_module
from unittest import mock

import torch
from native_host import IGNORE
from packed_step_models import (
    FIVE,
    SIDES,
    SIZES,
    batch_of,
    call,
    check,
    compare,
    host_path,
    nothing_rounded,
    rows_made,
)
from torch.nn.functional import pad

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
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("image_newline"):  # LLaVA leaves it uninitialized
                    parameter.normal_(std=0.02)
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
