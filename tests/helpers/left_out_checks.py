"""Samples that cannot be read, and images as bytes, in the datasets of a real host; run by ``native_checks.py``."""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from native_data_checks import module, turns, write_video
from native_host import Host
from PIL import Image

from llava_packing_tower.data.images import AS_BEFORE, UnreadableImage
from llava_packing_tower.integrations.llava import native_dataset
from llava_packing_tower.integrations.llava.left_out import NOTE, LeftOut


def no_sample_takes_the_place_of_one_that_cannot_be_read(host: Host):
    """Several in a row, the last one, a truncated one, videos: each is left out by its own name, at every ratio."""
    names = ["wide.png", "no1.png", "no2.png", "cut.png", "tall.png", "no3.png"]
    samples = [{"id": n, "image": n, "conversations": turns("<image>\nWhat?")} for n in names]
    bad = [1, 2, 3, 5]
    if host.is_next:
        videos = ("no.mp4", "corrupt.mp4", "shareVideoGPTV/empty", "shareVideoGPTV/clip")
        bad += range(len(samples), len(samples) + len(videos))
        samples += [{"id": n, "video": n, "conversations": turns("<image>\nWhat?")} for n in videos]
    for ratio in ("native", "square", "pad", *(["anyres", "highres", "crop_split"] if host.is_next else [])):
        with tempfile.TemporaryDirectory() as folder, mock.patch("time.sleep") as sleep:
            dataset, collate = module(samples, Path(folder), ratio=ratio)
            make_damaged_files(Path(folder))
            found = [dataset[i] for i in range(len(samples))]
            assert not sleep.called
            assert [i for i, one in enumerate(found) if isinstance(one, LeftOut)] == bad, (ratio, found)
            for index in bad:
                assert found[index].sample == samples[index]["id"] and folder in found[index].file, found[index]
                assert Path(found[index].file).name in str(found[index])
            whole, dropped = collate([found[0], found[4]]), collate(found)
            assert NOTE not in whole and [s[0] for s in dropped[NOTE]["samples"]] == [samples[i]["id"] for i in bad]
            assert dropped[NOTE]["empty"] is False
            for name, value in whole.items():  # as if they had never been there
                same = all(map(torch.equal, dropped[name], value)) if name == "images" else dropped[name] == value
                assert same.all() if isinstance(same, torch.Tensor) else same, name
            dataset.data_args.mm_packing_strict = True
            for index in bad:
                with pytest.raises(UnreadableImage, match=f"sample {samples[index]['id']}: .*{folder}"):
                    dataset[index]


def make_damaged_files(folder: Path) -> None:
    from PIL import ImageFile

    (folder / "cut.png").write_bytes((folder / "wide.png").read_bytes()[:3000])
    (folder / "corrupt.mp4").write_bytes(b"no video")
    (folder / "shareVideoGPTV" / "empty").mkdir(parents=True)
    (folder / "shareVideoGPTV" / "clip").mkdir()
    Image.new("RGB", (70, 42)).save(folder / "shareVideoGPTV" / "clip" / "1.png")
    (folder / "shareVideoGPTV" / "clip" / "2.png").write_bytes(b"no frame")
    ImageFile.LOAD_TRUNCATED_IMAGES = True  # as train.py leaves it


def what_is_wrong_beside_the_file_ends_the_run(host: Host):
    """A mistake in the data or in a program is not taken for a file that cannot be read."""
    samples = [{"id": "odd", "image": "wide.png", "conversations": [{"from": "human"}]}] * 2
    with tempfile.TemporaryDirectory() as folder, mock.patch("time.sleep"):
        dataset, _ = module(samples, Path(folder), ratio="pad")
        with pytest.raises(ValueError, match="sample odd: KeyError: 'value'"):
            dataset[0]
        if host.is_next:
            samples = [{"id": "v", "video": "clip.mp4", "conversations": [{"from": "human"}]}] * 2
            dataset, _ = module(samples, Path(folder), ratio="pad")
            write_video(Path(folder) / "clip.mp4", 3)
            with pytest.raises(ValueError, match="sample v: KeyError: 'value'"):
                dataset[0]
        with mock.patch("PIL.Image.open", side_effect=OSError(24, "Too many open files")):
            photos, _ = module(
                [{"id": "p", "image": "wide.png", "conversations": turns("<image>\nWhat?")}], Path(folder)
            )
            with pytest.raises(OSError, match="Too many open files"):
                photos[0]


def a_batch_of_nothing_else_is_a_placeholder_without_labels(host: Host):
    samples = [{"id": "no", "image": "no.png", "conversations": turns("<image>\nWhat?")}] * 2
    with tempfile.TemporaryDirectory() as folder:
        for ratio in ("native", "pad"):
            dataset, collate = module(samples, Path(folder), ratio=ratio)
            batch = collate([dataset[0], dataset[1]])
            assert batch[NOTE]["empty"] and len(batch[NOTE]["samples"]) == 2
            assert (batch["labels"] == -100).all() and batch["attention_mask"].all() and len(batch["images"]) == 1
            assert batch["images"][0].dtype == torch.uint8
            json.dumps(batch[NOTE])  # plain types


def images_cross_as_bytes_and_mean_the_same(host: Host):
    """Every ratio, a text-only sample among them: uint8 pixels, which the tower makes the processor's own of."""
    samples = [{"id": n, "image": n, "conversations": turns("<image>\nWhat?")} for n in ("wide.png", "grey.png")]
    samples.insert(1, {"id": "t", "conversations": turns("What?")})
    if host.is_next:
        samples += [{"id": "v", "video": "clip.mp4", "conversations": turns("<image>\nWhat?")}]
    for ratio in ("native", "square", "pad", *(["anyres", "highres", "crop_split"] if host.is_next else [])):
        with tempfile.TemporaryDirectory() as folder:
            dataset, collate = module(samples, Path(folder), ratio=ratio)
            write_video(Path(folder) / "clip.mp4", 9)
            processor = dataset.data_args.image_processor
            raw = collate([dataset[i] for i in range(len(samples))])
            with mock.patch.object(native_dataset, "raw_pixels", contextlib.nullcontext):
                floats = collate([dataset[i] for i in range(len(samples))])
        assert len(raw["images"]) == len(floats["images"]) == len(samples)
        for number, (a, b) in enumerate(zip(raw["images"], floats["images"])):
            assert a.dtype == torch.uint8 and a.shape == b.shape, (ratio, number, a.dtype)
            if samples[number]["id"] != "t":
                scaled = processor.pixel_scale(a, a.dim() - 3)
                assert b.dtype == torch.float32 and torch.equal(scaled, b), (ratio, number)


def a_training_from_a_checkpoint_reads_as_it_did_or_as_it_is_told(host: Host):
    """The keys of the arguments count for a tower that came with the checkpoint too."""
    for ratio in ("native", "pad"):
        for asked, wanted in ((None, False), (True, True)):
            model = host.model(ratio)
            model.config.mm_vision_tower = str(host.tower)
            tower = model.get_vision_tower()
            tower.image_processor.read_images_as(AS_BEFORE)  # trained before there were keys
            arguments = SimpleNamespace(
                vision_tower=str(host.tower),
                mm_vision_select_layer=-1,
                mm_vision_select_feature="patch",
                pretrain_mm_mlp_adapter=None,
                mm_patch_merge_type="flat",
                mm_projector_type="mlp2x_gelu",
                unfreeze_mm_vision_tower=True,
                mm_tunable_parts="mm_mlp_adapter",
                image_aspect_ratio=ratio,
                mm_packing_exif=asked,
                mm_packing_max_patches=None,
                mm_packing_min_patches=None,
                mm_packing_video=None,
                vision_tower_pretrained=None,
                mm_resampler_type=None,
                add_faster_video=False,
            )
            model.get_model().initialize_vision_modules(model_args=arguments, fsdp=None)
            assert tower.image_processor.image_reading == replace(AS_BEFORE, exif=wanted)
            assert getattr(tower.image_processor, "base", tower.image_processor).image_reading.exif is wanted
            assert model.config.mm_packing_exif is wanted and model.config.mm_packing_background == "none"


CHECKS = {
    name: function
    for name, function in vars(sys.modules[__name__]).items()
    if callable(function) and "host" in getattr(function, "__annotations__", {})
}
