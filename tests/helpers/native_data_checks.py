"""The datasets and collators of a real host at native resolution; run by ``native_checks.py``."""

from __future__ import annotations

import json
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from native_host import IMAGE, WORDS, Host, close, make_prompts, pixels
from PIL import Image

from llava_packing_tower.integrations.llava import native_dataset

SIZES = {"wide.png": (200, 30), "tall.png": (20, 90), "grey.png": (60, 60), "mosaic.png": (42, 28)}  # width x height


def write_video(file: Path, frames: int, fps: int = 4) -> None:
    import av

    with av.open(str(file), "w") as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for index in range(frames):
            picture = np.full((48, 64, 3), index * 5, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def turns(text):
    return [{"from": "human", "value": text}, {"from": "gpt", "value": "cat"}]


def module(samples, folder: Path, limit: int = 512, ratio: str = "native", together: int | None = None):
    """The host's own dataset and collator for these samples, as its train() makes them."""
    import llava.train.train as train
    from llava import conversation

    from llava_packing_tower import PackingImageProcessor
    from llava_packing_tower.data.native_config import NativeSettings
    from llava_packing_tower.data.native_image_processor import NativeImageProcessor
    from llava_packing_tower.data.smart_resize import SmartResize
    from llava_packing_tower.tools.demo.tiny_models import make_tokenizer

    for name, size in SIZES.items():
        noise = np.random.default_rng(1).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(noise).convert("L" if name == "grey.png" else "RGB").save(folder / name)
    if not (folder / "tokenizer").exists():
        make_tokenizer(folder / "tokenizer", make_prompts(), WORDS)
    from transformers import LlamaTokenizer

    tokenizer = LlamaTokenizer.from_pretrained(folder / "tokenizer", model_max_length=limit)
    tokenizer.pad_token = tokenizer.unk_token
    conversation.default_conversation = conversation.conv_templates["v1"]
    (folder / "data.json").write_text(json.dumps(samples))
    processor = PackingImageProcessor(size=56)
    if ratio == "native":
        settings = NativeSettings(1, 40, "clip", together)
        processor = NativeImageProcessor(processor, SmartResize(14, (1, 1), 1, 40), settings)
    arguments = SimpleNamespace(
        data_path=str(folder / "data.json"),
        image_folder=str(folder),
        video_folder=str(folder),
        image_aspect_ratio=ratio,
        image_grid_pinpoints="56,112" if ratio == "highres" else [[56, 112], [112, 56]],
        image_crop_resolution=112,
        image_split_resolution=56,
        image_processor=processor,
        is_multimodal=True,
        mm_use_im_start_end=False,
        video_fps=1,
        frames_upbound=5,
        force_sample=False,
        add_time_instruction=False,
        early_mix_text=False,
    )
    made = train.make_supervised_data_module(tokenizer=tokenizer, data_args=arguments)
    return made["train_dataset"], made["data_collator"]


def shapes(batch):
    return [tuple(image.shape) for image in batch["images"]]


def refused(function, *words):
    try:
        function()
    except ValueError as error:
        assert all(word in str(error) for word in words), error
    else:
        raise AssertionError(words)


def photos_keep_their_shapes_and_text_costs_one_blank_patch(host: Host):
    samples = [{"id": n, "image": n, "conversations": turns("<image>\nWhat?")} for n in ("wide.png", "tall.png")]
    samples += [{"id": "t", "conversations": turns("What?")}]
    samples += [{"id": "g", "image": "grey.png", "conversations": turns("<image>\nWhat?")}]
    with tempfile.TemporaryDirectory() as folder:
        dataset, collate = module(samples, Path(folder))
        batch = collate([dataset[i] for i in range(4)])
    blank = (1, 3, 14, 14) if host.is_next else (3, 14, 14)
    assert shapes(batch) == [(3, 28, 196), (3, 84, 14), blank, (3, 56, 56)], shapes(batch)
    assert batch["labels"].shape == batch["input_ids"].shape and (batch["input_ids"] == IMAGE).sum(1).tolist() == [
        1,
        1,
        0,
        1,
    ]


def other_ratios_are_left_alone(host: Host):
    samples = [{"id": "w", "image": "wide.png", "conversations": turns("<image>\nWhat?")}] * 2
    with tempfile.TemporaryDirectory() as folder:
        dataset, collate = module(samples, Path(folder), ratio="pad")
        batch = collate([dataset[0], dataset[1]])
    assert [tuple(i.shape) for i in batch["images"]] == [(3, 56, 56)] * 2
    assert type(collate.collate).__module__ == "llava.train.train"
    assert all(size is None or isinstance(size, tuple) for size in batch.get("image_sizes", []))


def images_that_are_cut_move_into_no_other_sample(host: Host):
    """At other ratios too: LLaVA would give the second sample the first one's image, without a word."""
    if not host.is_next:
        return  # LLaVA 1.x reads one image a sample
    two = {"id": "two", "image": ["wide.png", "tall.png"], "conversations": turns("<image> and <image>\nWhat?")}
    one = {"id": "one", "image": "grey.png", "conversations": turns("<image>\nWhat?")}
    for ratio in ("pad", "anyres"):
        with tempfile.TemporaryDirectory() as folder:
            dataset, collate = module([two, one], Path(folder), ratio=ratio)
            samples = [dataset[0], dataset[1]]
            assert len(collate(samples)["images"]) == 3
            _, short = module([two, one], Path(folder), int((samples[0]["input_ids"] == IMAGE).nonzero()[1]), ratio)
            with mock.patch.object(native_dataset.logger, "warning") as warning:
                batch = short(samples)
        assert (batch["input_ids"] == IMAGE).sum(1).tolist() == [1, 1]
        wanted = [sample["image"][0][0] for sample in samples]
        assert len(batch["images"]) == 2, f"{len(batch['images'])} images for 2 <image>"
        assert all(map(torch.equal, batch["images"], wanted))
        assert warning.call_args.args[1] == "two"
        wrong = [{**samples[0], "image": samples[0]["image"][:1]}]
        with pytest.raises(ValueError, match="sample two has 1 images, but 2 <image>"):
            collate(wrong)


def several_images_of_a_sample_keep_their_shapes(host: Host):
    if not host.is_next:
        return  # LLaVA 1.x reads one image a sample
    sample = {"image": ["wide.png", "tall.png"], "conversations": turns("<image> and <image>\nWhat?")}
    with tempfile.TemporaryDirectory() as folder:
        dataset, collate = module([sample, sample], Path(folder))
        batch = collate([dataset[0], dataset[1]])
        assert shapes(batch) == [(3, 28, 196), (3, 84, 14)] * 2
        # A text that is cut before its second image takes that image with it, not the next sample's.
        _, short = module([sample], Path(folder), limit=int((dataset[0]["input_ids"] == IMAGE).nonzero()[1]))
        assert shapes(short([dataset[0], dataset[1]])) == [(3, 28, 196)] * 2
        wrong = {**dataset[0], "image": dataset[0]["image"][:1]}
    refused(lambda: collate([wrong]), "1 images, but 2 <image>")


def a_folder_of_frames_is_one_video(host: Host):
    """LLaVA-NeXT takes ten frames of a folder with shareVideoGPTV in its path, as a list of images."""
    if not host.is_next:
        return
    video = {"id": "v", "video": "shareVideoGPTV/clip", "conversations": turns("<image>\nWhat?")}
    photo = {"id": "p", "image": "grey.png", "conversations": turns("<image>\nWhat?")}
    with tempfile.TemporaryDirectory() as folder:
        frames = Path(folder) / "shareVideoGPTV" / "clip"
        frames.mkdir(parents=True)
        for number in range(12):
            Image.new("RGB", (70, 42), (20 * number, 0, 0)).save(frames / f"{number:02}.png")
        dataset, collate = module([video, photo], Path(folder))
        assert shapes(collate([dataset[0]])) == [(10, 3, 42, 70)]
        bounded, collate = module([video, photo], Path(folder), together=60)
        batch = collate([bounded[0], bounded[1]])
        assert shapes(batch) == [(10, 3, 14, 42), (3, 56, 56)], shapes(batch)  # at most 6 patches a frame


def positions_of_a_sample_reach_the_model(host: Host):
    positions = np.random.default_rng(3).integers(0, 60, (6, 3))
    source = {"image": "mosaic.png", "conversations": turns("<image>\nWhat?")}
    plain = {"image": "tall.png", "conversations": turns("<image>\nWhat?")}
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder) / "good.npy", positions)
        np.save(Path(folder) / "short.npy", positions[:5])
        np.save(Path(folder) / "flat.npy", positions[:, 0])
        samples = [{**source, "positions_thw": f"{name}.npy"} for name in ("good", "short", "flat")]
        dataset, collate = module([plain, *samples], Path(folder))
        batch = collate([dataset[0], dataset[1]])
        get = dataset._get_item if host.is_next else dataset.__getitem__
        refused(lambda: get(2), "short.npy has 5 positions", "[6] patches")
        refused(lambda: get(3), "must be [num_patches, 3], got [6]")
    assert "patch_positions" not in batch["image_sizes"][0]
    given = batch["image_sizes"][1]
    assert torch.equal(given["patch_positions"], torch.from_numpy(positions).float()) and given["group"] == 1
    # What the trainer moves to its device arrives as it left, and the model encodes with it.
    from accelerate.utils import send_to_device

    batch = send_to_device(dict(batch), "cpu")
    model = host.model()
    ids = torch.tensor([[IMAGE, 3], [IMAGE, 3]])
    wanted = {"input_ids": ids, "labels": ids, "attention_mask": ids != 0, "images": batch["images"]}
    with_positions = host.prepare(model, {**wanted, "image_sizes": batch["image_sizes"]})[4]
    without = host.prepare(model, wanted)[4]
    assert torch.equal(with_positions[0], without[0]) and (with_positions[1, :6] - without[1, :6]).abs().max() > 1e-3


def positions_of_a_video_reach_the_model(host: Host):
    if not host.is_next:
        return  # LLaVA 1.x reads no videos
    own = {"video": "clip.mp4", "positions_thw": "clip.npy", "conversations": turns("<image>\nWhat?")}
    plain = {"video": "clip.mp4", "conversations": turns("<image>\nWhat?")}
    with tempfile.TemporaryDirectory() as folder:
        write_video(Path(folder) / "clip.mp4", 9)  # 9 frames at 4 a second: 3 are read, of 3 x 5 patches
        positions = np.random.default_rng(4).integers(0, 60, (3 * 3 * 5, 3)) + 0.5
        np.save(Path(folder) / "clip.npy", positions)
        dataset, collate = module([own, plain], Path(folder))
        batch = collate([dataset[0], dataset[1]])
    assert shapes(batch) == [(3, 3, 42, 70)] * 2
    first, second = batch["image_sizes"]
    assert torch.equal(first["patch_positions"], torch.from_numpy(positions).float())
    assert "patch_positions" not in second and second["frame_indices"].tolist() == [0, 4, 8]
    model = host.model(mm_spatial_pool_stride=1)
    ids = torch.tensor([[IMAGE, 3]] * 2)
    found = host.prepare(model, {**batch, "input_ids": ids, "labels": ids, "attention_mask": ids != 0})[4][0, :-1]
    from llava_packing_tower import image_to_packing_input

    scale = model.get_vision_tower().image_processor.pixel_scale
    rows, grid = image_to_packing_input(batch["images"][0].transpose(0, 1), 14, scale=scale)
    inner, where = model.get_vision_tower().vision_tower, torch.from_numpy(positions).float()
    states = inner(rows, grid, patch_positions=where, output_hidden_states=True).hidden_states[-1]
    close(found, model.get_model().mm_projector(states))


def videos_carry_the_places_of_their_frames(host: Host):
    if not host.is_next:
        return  # LLaVA 1.x reads no videos
    assert find_spec("av"), "this check needs PyAV"
    names = ("long.mp4", "one.mp4")
    samples = [{"id": n, "video": n, "conversations": turns("<image>\nWhat?")} for n in names]
    with tempfile.TemporaryDirectory() as folder:
        write_video(Path(folder) / "long.mp4", 33)
        write_video(Path(folder) / "one.mp4", 1)
        dataset, collate = module(samples, Path(folder))
        long, one = (dataset[i] for i in range(2))
        batch = collate([one, long, long])
    # Nine frames at one a second are more than five: first, last, and between them evenly.
    assert shapes(batch) == [(1, 3, 42, 70), (5, 3, 42, 70), (5, 3, 42, 70)], shapes(batch)
    assert batch["modalities"] == ["video"] * 3
    assert batch["image_sizes"][1]["frame_indices"].tolist() == [0, 8, 16, 24, 32]
    assert [d["total_frames"] for d in batch["image_sizes"]] == [1, 33, 33]
    brightness = long["image"][0][0].float().mean((1, 2, 3))
    assert (brightness.diff() > 10).all()
    model = host.model()
    embeddings = model.get_model().embed_tokens(torch.tensor([3]))
    ids = torch.tensor([[3, IMAGE]] * 3)
    prepared = host.prepare(model, {**batch, "input_ids": ids, "labels": ids, "attention_mask": ids != 0})
    assert prepared[2].sum(1).tolist() == [1 + 2 * 3, 1 + 5 * 2 * 3, 1 + 5 * 2 * 3]  # 3 x 5 patches, pooled up to 2 x 3
    assert torch.equal(prepared[4][:, 0], embeddings.expand(3, -1))


def odd_photos_have_the_documented_outcome(host: Host):
    """From the file to the sequence: one pixel wide, one patch wide, 10:1, large, grey with transparency, one bit."""
    odd = {
        "line.png": ("RGB", (1, 200), (14, 1)),
        "patch.png": ("RGB", (14, 140), (10, 1)),
        "panorama.jpg": ("RGB", (1000, 100), (2, 20)),
        "large.jpg": ("RGB", (4000, 3000), (5, 7)),
        "grey.png": ("LA", (60, 40), (3, 4)),
        "bit.png": ("1", (9, 9), (1, 1)),
        "palette.gif": ("P", (30, 90), (6, 2)),
    }
    samples = [{"id": n, "image": n, "conversations": turns("<image>\nWhat?")} for n in odd]
    with tempfile.TemporaryDirectory() as folder:
        dataset, collate = module(samples, Path(folder))
        for name, (mode, size, _) in odd.items():
            Image.new(mode, size).save(Path(folder) / name)
        batch = collate([dataset[i] for i in range(len(odd))])
    grids = [(h, w) for _, _, (h, w) in odd.values()]
    assert shapes(batch) == [(3, 14 * h, 14 * w) for h, w in grids], shapes(batch)
    model = host.model()
    ids = torch.tensor([[3, IMAGE]] * len(odd))
    given = {**batch, "input_ids": ids, "labels": ids, "attention_mask": ids != 0}
    _, _, mask, _, embeddings, _ = host.prepare(model, given)[:6]
    assert mask.sum(1).tolist() == [1 + h * w for h, w in grids] and embeddings.isfinite().all()


def a_blank_batch_of_any_size_is_one_token_each(host: Host):
    """`pixels` of one patch are what LLaVA makes for text: they must not reach the sequence."""
    model = host.model()
    ids = torch.tensor([[5, 6], [7, 8]])
    batch = {"input_ids": ids, "labels": ids, "attention_mask": ids != 0, "images": pixels((1, 1), (1, 1))}
    assert host.prepare(model, batch)[4].shape[1] == 2


CHECKS = {
    name: function
    for name, function in vars(sys.modules[__name__]).items()
    if callable(function) and "host" in getattr(function, "__annotations__", {})
}
