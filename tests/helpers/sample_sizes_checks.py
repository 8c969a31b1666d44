"""Sizes of samples from headers and text, against what the dataset and the model of a real host make of them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from native_host import IGNORE, WORDS, Host, make_prompts
from PIL import Image

CHECKS = {}
SIZES = {"wide": (200, 60), "tall": (50, 190), "even": (112, 112), "small": (20, 33), "long": (330, 40)}
PINPOINTS = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168], [224, 56]]


def check(function):
    CHECKS[function.__name__] = function
    return function


class Subject:
    def __init__(self, folder: Path) -> None:
        from llava import conversation
        from transformers import AutoTokenizer

        from llava_packing_tower.tools.demo.tiny_models import make_tokenizer

        self.host, self.folder = Host(folder), folder
        make_tokenizer(folder / "words", make_prompts(), WORDS)
        self.tokenizer = AutoTokenizer.from_pretrained(folder / "words", model_max_length=256, use_fast=False)
        self.tokenizer.pad_token = self.tokenizer.unk_token
        conversation.default_conversation = conversation.conv_templates["v1"]
        noise, data = np.random.default_rng(0), []
        for name, (width, height) in SIZES.items():
            image = Image.fromarray(noise.integers(0, 255, (height, width, 3), dtype=np.uint8))
            image.save(folder / f"{name}.png")
            exif = Image.Exif()
            exif[0x0112] = 6
            image.save(folder / f"{name}.jpg", exif=exif)
            data += [self.sample(f"{name}.png"), self.sample(f"{name}.jpg", words=30)]
        data += [self.sample(None), self.sample(None, words=90), self.sample("tall.png", words=90)]
        if self.host.is_next:
            data += [self.sample(["wide.png", "tall.jpg"]), self.sample(["even.png"], words=60)]
        (folder / "data.json").write_text(json.dumps(data))

    @staticmethod
    def sample(image, words=2) -> dict:
        count = len(image) if isinstance(image, list) else image is not None
        asked = "<image>\n" * count + "What is in the photo? " + "cat " * words
        turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": "moon cup"}]
        return {"conversations": turns, **({"image": image} if image else {})}

    def compare(self, ratio: str, **options) -> list[int]:
        """Check every sample, alone; returns how many tokens each has."""
        from llava.train import train

        from llava_packing_tower.integrations.llava.sample_sizes import SizeReader, unsupported_sizes

        model = self.host.model(ratio, **options)
        model.config.image_grid_pinpoints = PINPOINTS
        model.model.embed_tokens = torch.nn.Embedding(len(self.tokenizer), model.config.hidden_size)
        tower = model.get_vision_tower()
        data_args = SimpleNamespace(
            data_path=str(self.folder / "data.json"),
            image_folder=str(self.folder),
            video_folder=None,
            is_multimodal=True,
            image_aspect_ratio=ratio,
            image_grid_pinpoints=PINPOINTS,
            mm_use_im_start_end=False,
            image_processor=tower.image_processor,
            early_mix_text=False,
        )
        made = train.make_supervised_data_module(tokenizer=self.tokenizer, data_args=data_args)
        dataset, collate = made["train_dataset"], made["data_collator"]
        assert unsupported_sizes(dataset, model) is None
        model.config.tokenizer_model_max_length = 100
        reader, lengths, cut = SizeReader(dataset, model), [], 0
        rows, run = [], tower.vision_tower.forward

        def counting(hidden_states, *args, **kwargs):
            rows.append(len(hidden_states))
            return run(hidden_states, *args, **kwargs)

        with mock.patch.object(tower.vision_tower, "forward", counting), torch.no_grad():
            for index in range(len(dataset)):
                rows.clear()
                item = dataset[index]
                _, _, mask, _, embeds, labels = self.host.prepare(model, collate([item]))[:6]
                found = (int(mask.sum()), int((labels[:, 1:] != IGNORE).sum()))
                assert embeds.shape[1] == found[0]
                size = reader(index)
                where = (ratio, options, dataset.list_data_dict[index].get("image"))
                assert (size.tokens, size.supervised) == found, (*where, size, found)
                assert reader.of_item(item) == size, (*where, size, reader.of_item(item))
                assert size.patches == sum(rows), (*where, size, rows)
                lengths.append(size.tokens)
                cut += found[0] == 100
        assert cut >= 1
        return lengths


@check
def native_resolution(subject):
    for options in ({}, {"mm_patch_merge_type": "spatial_unpad"}, {"mm_projector_type": "spatial_merge"}):
        lengths = subject.compare("native", **options)
        assert len(set(lengths)) > 3


@check
def one_crop(subject):
    for ratio in ("pad", "square"):
        for merge in ("flat", "spatial_unpad"):
            subject.compare(ratio, mm_patch_merge_type=merge)


@check
def tiles(subject):
    if not subject.host.is_next:
        return
    seen = set()
    for ratio in ("anyres", "anyres_max_2", "anyres_max_9"):
        for merge in ("flat", "spatial", "spatial_unpad", "spatial_unpad_nobase", "spatial_maxpool2x2"):
            seen.add(tuple(subject.compare(ratio, mm_patch_merge_type=merge)))
    assert len(seen) >= 6


@check
def what_cannot_be_counted_is_said(subject):
    from llava.train import train

    from llava_packing_tower.integrations.llava.sample_sizes import unsupported_sizes

    model = subject.host.model("native")
    entries = [{"video": "a.mp4"}] if subject.host.is_next else [{}]
    dataset = object.__new__(train.LazySupervisedDataset)
    dataset.list_data_dict = entries
    dataset.data_args = SimpleNamespace(image_aspect_ratio="native", add_time_instruction=True)
    if subject.host.is_next:
        assert unsupported_sizes(dataset, model).startswith("add_time_instruction")
        dataset.data_args.add_time_instruction = False
        assert unsupported_sizes(dataset, model) is None
        dataset.data_args.image_aspect_ratio = "pad"
        assert unsupported_sizes(dataset, model) == "videos at image_aspect_ratio pad"
        dataset.list_data_dict = [{}]
        for ratio in ("highres", "crop_split"):
            dataset.data_args.image_aspect_ratio = ratio
            assert unsupported_sizes(dataset, model) == f"image_aspect_ratio {ratio}"
    assert unsupported_sizes([1, 2], model) == "the dataset is a list, not LLaVA's own"


@check
def files_that_cannot_be_read_have_no_size(subject):
    from llava.train import train

    from llava_packing_tower.integrations.llava.sample_sizes import SizeReader

    model = subject.host.model("native")
    (subject.folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno")
    dataset = object.__new__(train.LazySupervisedDataset)
    dataset.list_data_dict = [subject.sample("missing.png"), subject.sample("broken.png"), subject.sample(None)]
    dataset.tokenizer = subject.tokenizer
    tower = model.get_vision_tower()
    dataset.data_args = SimpleNamespace(
        image_aspect_ratio="native",
        image_folder=str(subject.folder),
        image_processor=tower.image_processor,
        is_multimodal=True,
        mm_use_im_start_end=False,
    )
    reader = SizeReader(dataset, model)
    assert [tuple(reader(index)) == (0, 0, 0, 0) for index in range(3)] == [True, True, False]
    # Before training, too, a conversation that the host cannot read is that of a sample.
    for index, turns in ((0, [{"from": "elephant", "value": "cup"}]), (2, [])):
        dataset.list_data_dict[index] |= {"id": f"odd {index}", "conversations": turns}
        with pytest.raises(ValueError, match=rf"^sample odd {index}: \w+Error: "):
            reader(index)


@check
def the_cost_counts_what_is_trained(subject):
    from llava_packing_tower.integrations.llava.sample_sizes import cost_of
    from llava_packing_tower.multimodal.dealing import LAYER_FLOOR

    model = subject.host.model("native")
    trained = cost_of(model)
    model.get_vision_tower().requires_grad_(False)
    frozen = cost_of(model)
    assert 0 < frozen.micro_step < trained.micro_step == LAYER_FLOOR * _layers(model)
    assert frozen.patch * 2.9 < trained.patch < frozen.patch * 3.1 and frozen.token == trained.token
    model.requires_grad_(False)
    assert cost_of(model).token * 1.4 < trained.token < cost_of(model).token * 1.6
    weights = sum(p.numel() for p in model.model.layers.parameters())
    assert abs(trained.token - 6e-9 * weights) < 1e-4 * trained.token


def _layers(model) -> int:
    return max(model.get_vision_tower().feature_layers) + len(model.model.layers)


def make(folder: Path) -> Subject:
    return Subject(folder)
