"""Native resolution inside a real host, in a process of its own: ``python native_checks.py FOLDER`` runs every check.

Two hosts have one package name, so each gets a process; it prints a JSON of check name and traceback (None: passed).
"""

from __future__ import annotations

from pathlib import Path

import left_out_checks
import native_codec_checks
import native_data_checks
import native_tiles_checks
import native_video_checks
import odd_images_checks
import torch
from native_host import (
    IGNORE,
    IMAGE,
    RAGGED,
    SAMPLES,
    SQUARE,
    Host,
    close,
    collate,
    gradients,
    pixels,
    reference_embeddings,
)

CHECKS = {
    **native_video_checks.CHECKS,
    **native_data_checks.CHECKS,
    **native_tiles_checks.CHECKS,
    **left_out_checks.CHECKS,
    **odd_images_checks.CHECKS,
    **native_codec_checks.CHECKS,
}


def check(function):
    CHECKS[function.__name__] = function
    return function


# ---------------------------------------------------------------- square images: LLaVA's own path


@check
def square_images_are_bit_equal_to_the_hosts_own_path(host):
    side = SQUARE // 14
    for kind in ("mlp2x_gelu", "linear"):
        native, square = (host.model(ratio, mm_projector_type=kind) for ratio in ("native", "square"))
        for padding in ("right", "left"):
            for stacked in (False, True):
                images = pixels(*[(side, side)] * 5)
                batch = collate(SAMPLES, torch.stack(images) if stacked else images, padding)
                for model in (native, square):
                    model.config.tokenizer_padding_side = padding
                ours, theirs = host.prepare(native, batch), host.prepare(square, batch)
                for index, (a, b) in enumerate(zip(ours, theirs)):
                    assert (a is None and b is None) or torch.equal(a, b), (kind, padding, stacked, index)
                ours, theirs = host.forward(native, batch), host.forward(square, batch)
                assert torch.equal(ours.logits, theirs.logits) and torch.equal(ours.loss, theirs.loss)
                ours, theirs = gradients(native, ours.loss), gradients(square, theirs.loss)
                assert ours.keys() == theirs.keys()
                for name, gradient in theirs.items():
                    assert gradient is not None and torch.equal(ours[name], gradient), (name, kind, padding)


@check
def models_of_other_ratios_are_left_alone(host):
    """A stacked or a nested batch reaches LLaVA's own code, which refuses images of different sizes."""
    square = host.model("square")
    try:
        host.prepare(square, collate(SAMPLES, pixels(*RAGGED)))
    except RuntimeError as error:
        assert "Sizes of tensors must match" in str(error)
    else:
        raise AssertionError("LLaVA took images of different sizes")


# ---------------------------------------------------------------- ragged images: the plain reference


def against_reference(host, **options):
    model = host.model(**options)
    images = pixels(*RAGGED)
    expected = reference_embeddings(model, SAMPLES, images)
    for padding in ("right", "left"):
        model.config.tokenizer_padding_side = padding
        batch = collate(SAMPLES, images, padding)
        _, _, mask, _, embeddings, labels = host.prepare(model, batch)[:6]
        longest = max(len(e) for e, _ in expected)
        assert embeddings.shape[:2] == (len(SAMPLES), longest)
        for row, (embedding, label) in enumerate(expected):
            n = len(embedding)
            own = slice(0, n) if padding == "right" else slice(longest - n, longest)
            close(embeddings[row, own], embedding)
            assert torch.equal(labels[row, own], label)
            assert mask[row].sum() == n and mask[row, own].all()
            assert (labels[row][~mask[row].bool()] == IGNORE).all()
        output = host.forward(model, batch)
        ours = gradients(model, output.loss)
        losses = count = 0
        for row, (embedding, label) in enumerate(reference_embeddings(model, SAMPLES, images)):
            alone = model(inputs_embeds=embedding[None], attention_mask=torch.ones(1, len(embedding)))
            close(output.logits[row][mask[row].bool()], alone.logits[0], 1e-4)
            wanted = label[1:] != IGNORE
            losses = losses + torch.nn.functional.cross_entropy(
                alone.logits[0, :-1][wanted], label[1:][wanted], reduction="sum"
            )
            count += int(wanted.sum())
        if padding == "right":  # a sum over a left-padded batch also has the last pad predicting the first token
            close(output.loss, losses / count)
            theirs = gradients(model, losses / count)
            for name, gradient in theirs.items():
                if gradient is None:
                    assert not ours[name].any(), name
                else:
                    close(ours[name], gradient, 1e-4 * max(1.0, gradient.abs().max().item()))
    return model


@check
def ragged_images_equal_the_reference(host):
    for kind in ("mlp2x_gelu", "linear"):
        against_reference(host, mm_projector_type=kind)


@check
def merging_projectors_equal_the_reference_on_odd_grids(host):
    for kind in ("spatial_merge", "patch_merger"):
        model = against_reference(host, mm_projector_type=kind)
        names = {n for n, _ in model.get_model().mm_projector.named_parameters()}
        assert names == {"ln_q.weight", "ln_q.bias", "mlp.0.weight", "mlp.0.bias", "mlp.2.weight", "mlp.2.bias"}


@check
def spatial_unpad_is_one_newline_per_row(host):
    for kind in ("mlp2x_gelu", "spatial_merge"):
        against_reference(host, mm_projector_type=kind, mm_patch_merge_type="spatial_unpad")
    model = host.model(mm_patch_merge_type="spatial_unpad")
    batch = collate([[IMAGE, 3]], pixels((3, 5)))
    assert host.prepare(model, batch)[4].shape[1] == 3 * (5 + 1) + 1


@check
def merging_works_in_the_hosts_own_path_on_squares(host):
    """The same weights: square images of LLaVA's own path and native ones."""
    for kind in ("spatial_merge", "patch_merger"):
        native, square = (host.model(ratio, mm_projector_type=kind) for ratio in ("native", "square"))
        batch = collate(SAMPLES, pixels(*[(4, 4)] * 5))
        ours, theirs = host.prepare(native, batch), host.prepare(square, batch)
        assert ours[4].shape[1] == 4 + 4 + 5  # the longest sample: two images of four tokens, five words
        assert torch.equal(ours[4], theirs[4])


# ---------------------------------------------------------------- batches of every kind


@check
def a_batch_equals_its_samples_one_by_one(host):
    model = host.model()
    images = pixels(*RAGGED)
    together = host.forward(model, collate(SAMPLES, images)).logits
    _, _, mask, *_ = host.prepare(model, collate(SAMPLES, images))
    starts = [0, 1, 2, 4]
    for row, (sample, start) in enumerate(zip(SAMPLES, starts)):
        own = images[start : start + max(sample.count(IMAGE), 1)]
        alone = host.forward(model, collate([sample], own)).logits[0]
        close(together[row][mask[row].bool()], alone, 1e-4)


@check
def position_ids_count_the_tokens_of_each_sample(host):
    """Asked for position ids, LLaVA makes them: from 0 in each sample, wherever its padding is."""
    model, images = host.model(), pixels(*RAGGED)
    lengths = [len(e) for e, _ in reference_embeddings(model, SAMPLES, images)]
    assert len(set(lengths)) > 2
    for padding in ("right", "left"):
        model.config.tokenizer_padding_side = padding
        batch = collate(SAMPLES, images, padding)
        ids = torch.arange(batch["input_ids"].shape[1])[None].expand_as(batch["input_ids"])
        _, found, mask, *_ = model.prepare_inputs_labels_for_multimodal(
            batch["input_ids"], ids, batch["attention_mask"], None, batch["labels"], images
        )
        for row, n in enumerate(lengths):
            assert found[row][mask[row].bool()].tolist() == list(range(n)), (padding, row)


@check
def all_images_go_through_the_tower_in_one_pass(host):
    model = host.model()
    calls = []
    model.get_vision_tower().vision_tower.encoder.layers[0].register_forward_hook(
        lambda module, inputs, output: calls.append(output[0].shape[0])
    )
    host.prepare(model, collate(SAMPLES, pixels(*RAGGED)))
    assert calls == [sum(h * w for h, w in RAGGED)], calls


@check
def text_alone(host):
    """With a blank image (as in LLaVA's data), with none, and beside samples that have images."""
    model = host.model()
    words = model.get_model().embed_tokens(torch.tensor([6, 7]))
    for images in (pixels((1, 1)), []):
        batch = collate([[6, 7]], images)
        assert torch.equal(host.prepare(model, batch)[4][0], words)
        found = gradients(model, host.forward(model, batch).loss)
        assert all(g is not None for g in found.values())  # DDP and ZeRO wait for a gradient of every parameter
        assert not any(g.any() for n, g in found.items() if "vision_tower" in n or "mm_projector" in n)
    for kind in ("mlp2x_gelu", "spatial_merge", "patch_merger"):
        training = host.model(mm_projector_type=kind, mm_patch_merge_type="spatial_unpad").train()
        output = training(input_ids=batch["input_ids"], labels=batch["labels"], images=None)
        found = gradients(training, output.loss)
        assert all(g is not None and g.isfinite().all() for g in found.values()), kind
    with_blank = host.prepare(model, collate(SAMPLES, pixels(*RAGGED)))[4]
    without = pixels(*RAGGED)
    del without[1]
    close(host.prepare(model, collate(SAMPLES, without))[4], with_blank)


@check
def too_many_or_too_few_images_are_refused(host):
    model = host.model()
    for sides in (RAGGED[:2], [*RAGGED, (1, 1)]):
        try:
            host.prepare(model, collate(SAMPLES, pixels(*sides)))
        except ValueError as error:
            assert f"{len(sides)} images" in str(error) and "[1, 0, 2, 1] <image>" in str(error), error
        else:
            raise AssertionError(sides)


@check
def a_stack_of_images_is_not_taken_for_one(host):
    model = host.model()
    try:
        host.prepare(model, collate([[IMAGE, 3]], [torch.stack(pixels((2, 2), (2, 2)))]))
    except ValueError as error:
        assert "2 images" in str(error)
    else:
        raise AssertionError("two images in the place of one")


@check
def truncation_is_counted(host):
    from llava_packing_tower.multimodal import truncation

    model, lines = host.model(), []
    model.config.tokenizer_model_max_length = 9
    truncation.logger.warning, warning = (lambda text, *values: lines.append(text % values)), truncation.logger.warning
    try:
        embeddings = host.prepare(model, collate([[3, IMAGE, 4], [5, 6]], pixels((3, 4), (1, 1))))[4]
    finally:
        truncation.logger.warning = warning
    assert embeddings.shape[1] == 9
    assert len(lines) == 1 and "1 of " in lines[0] and "4 of them" in lines[0], lines


# ---------------------------------------------------------------- generate


def prompt_batches(host, model):
    """Two prompts of different lengths, with one and two images of different sizes; alone and together."""
    samples = [[1, IMAGE, 4], [1, 8, IMAGE, 9, 10, IMAGE, 11]]
    images = pixels((2, 5), (3, 2), (1, 7), seed=4)
    model.config.tokenizer_padding_side = "right"  # as training leaves it
    return [([samples[0]], images[:1]), ([samples[1]], images[1:])], (samples, images)


def generated(host, model, samples, images, with_mask=True, **options):
    batch = collate(samples, images, "left")
    given = {"attention_mask": batch["attention_mask"].long()} if with_mask else {}
    return model.generate(
        batch["input_ids"], images=images, do_sample=False, max_new_tokens=6, pad_token_id=0, **given, **options
    )


@check
def generate_equals_forward(host):
    model = host.model()
    model.generation_config.eos_token_id = None
    (samples, images), _ = prompt_batches(host, model)[0]
    words = generated(host, model, samples, images)[0].tolist()
    batch, again = collate(samples, images), []
    for _ in words:
        again.append(int(host.forward(model, batch).logits[0, -1].argmax()))
        batch = collate([samples[0] + again], images)
    assert words == again and len(set(words)) > 1, (words, again)


@check
def generate_for_a_batch_with_beams_and_several_images(host):
    model = host.model()
    model.generation_config.eos_token_id = None
    alone, together = prompt_batches(host, model)
    for beams in (1, 3):
        expected = [generated(host, model, *one, num_beams=beams)[0] for one in alone]
        assert not torch.equal(*expected)
        found = generated(host, model, *together, num_beams=beams)
        for a, b in zip(found, expected):
            assert a.tolist() == b.tolist(), (beams, a, b)


@check
def generate_makes_the_mask_that_samples_of_one_length_lack(host):
    """Equal prompts, unequal images: without a mask LLaVA would attend to the padding behind the shorter one."""
    model = host.model()
    model.generation_config.eos_token_id = None
    model.config.tokenizer_padding_side = "right"  # as training leaves it
    samples, images = [[1, IMAGE, 4], [1, IMAGE, 4]], pixels((2, 5), (1, 2), seed=4)
    found = generated(host, model, samples, images, with_mask=False)
    for row in range(2):
        alone = generated(host, model, samples[row : row + 1], images[row : row + 1], with_mask=False)
        assert found[row].tolist() == alone[0].tolist()


# ---------------------------------------------------------------- config, processor


@check
def the_rule_is_in_the_config_and_reaches_process_images(host):
    import numpy as np
    from llava.mm_utils import process_images
    from PIL import Image

    model = host.model(mm_packing_max_patches=20, mm_packing_min_patches=4)
    processor = model.get_vision_tower().image_processor
    photos = [Image.fromarray(np.zeros((h, w, 3), np.uint8)) for h, w in ((30, 100), (10, 10), (500, 300))]
    made = process_images(photos, processor, model.config)
    assert [tuple(p.shape) for p in made] == [(3, 28, 98), (3, 28, 28), (3, 70, 42)], [p.shape for p in made]
    saved = model.config.to_dict()
    kept = {k: v for k, v in saved.items() if k.startswith("mm_packing_m")}
    assert kept == {"mm_packing_min_patches": 4, "mm_packing_max_patches": 20}
    assert saved["image_aspect_ratio"] == "native"


@check
def undo_takes_everything_back(host):
    """Last: it leaves the host as it was before."""
    import llava.model.llava_arch as arch
    import llava.model.multimodal_projector.builder as projectors

    import builder_patch

    builder_patch.undo()
    for function in (
        arch.LlavaMetaForCausalLM.prepare_inputs_labels_for_multimodal,
        arch.LlavaMetaForCausalLM.encode_images,
        host.module.LlavaLlamaForCausalLM.generate.__wrapped__,  # torch.no_grad's wrapper is LLaVA's own
        arch.build_vision_projector,
        projectors.build_vision_projector,
    ):
        assert not hasattr(function, "__wrapped__") and function.__module__.startswith("llava.model"), function


def make(folder: Path) -> Host:
    return Host(folder)
