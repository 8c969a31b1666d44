"""Samples with positions and codec samples in a real host at native resolution; run by ``native_checks.py``."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from clips import write_clip
from native_data_checks import module, refused, shapes, turns
from native_host import IMAGE, Host
from PIL import Image

from llava_packing_tower.data.codec import codec_clip


def published_mosaics_get_the_grid_of_their_positions(host: Host):
    """As upstream's: cut for another patch size, resized to the positions' grid times the tower's patch, whatever the
    bounds say; and in the model each patch stands at its position."""
    words = "<image>\n" * 2 + "What?"
    sample = {"id": "clip", "image": ["a.jpg", "b.jpg"], "positions_thw": "p.npy", "conversations": turns(words)}
    wide = {**sample, "id": "wide", "image": ["a.jpg", "w.jpg"]}
    if not host.is_next:
        sample = {**sample, "image": "a.jpg", "conversations": turns("<image>\nWhat?")}
        wide = {**sample, "image": "w.jpg"}
    count = 2 if host.is_next else 1
    positions = np.random.default_rng(5).integers(0, 60, (count * 49, 3))
    with tempfile.TemporaryDirectory() as folder:
        for name, size in (("a", (112, 112)), ("b", (112, 112)), ("w", (112, 56))):
            noise = np.random.default_rng(len(name)).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
            Image.fromarray(noise).save(Path(folder) / f"{name}.jpg")
        np.save(Path(folder) / "p.npy", positions)
        dataset, collate = module([sample, wide], Path(folder))
        batch = collate([dataset[0]])
        get = dataset._get_item if host.is_next else dataset.__getitem__
        refused(lambda: get(1), "positions, but the images of the sample have")
        for ratio in ("pad", "square", "anyres"):
            refused(lambda r=ratio: module([sample], Path(folder), ratio=r), "of 1 samples", ratio)
    assert shapes(batch) == [(3, 98, 98)] * count, shapes(batch)
    given = torch.cat([detail["patch_positions"] for detail in batch["image_sizes"]])
    assert torch.equal(given, torch.from_numpy(positions).float())
    model = host.model()
    ids = torch.tensor([[IMAGE] * count + [3]])
    wanted = {"input_ids": ids, "labels": ids, "attention_mask": ids != 0, "images": batch["images"]}
    placed = host.prepare(model, {**wanted, "image_sizes": batch["image_sizes"]})[4]
    assert (placed - host.prepare(model, wanted)[4]).abs().max() > 1e-3


def a_codec_sample_reaches_the_model(host: Host):
    """Its mosaics are the frames of its video, and their patches stand where they were in it."""
    if not host.is_next:
        return  # LLaVA 1.x reads no videos
    own = {"id": 1, "video": "clip.mp4", "positions_thw": "codec", "conversations": turns("<image>\nWhat?")}
    plain = {"id": 2, "video": "clip.mp4", "conversations": turns("<image>\nWhat?")}
    with tempfile.TemporaryDirectory() as folder:
        write_clip(Path(folder) / "clip.mp4", frames=40, width=112, height=96)
        dataset, collate = module([own, plain], Path(folder), together=8 * 16)
        batch = collate([dataset[0], dataset[1]])
        clip = codec_clip(str(Path(folder) / "clip.mp4"), 14, 8 * 16)
        with_image = [{**own, "image": "wide.png"}]
        refused(lambda: module(with_image, Path(folder))[0]._get_item(0), "needs a video file")
    assert shapes(batch)[0] == (8, 3, 56, 56), shapes(batch)
    first, second = batch["image_sizes"]
    assert torch.equal(first["patch_positions"], torch.from_numpy(clip.positions)) and "frame_indices" in second
    assert torch.equal(batch["images"][0], torch.from_numpy(clip.mosaics).permute(0, 3, 1, 2))
    model = host.model(mm_spatial_pool_stride=1)
    ids = torch.tensor([[IMAGE, 3]])
    wanted = {"input_ids": ids, "labels": ids, "attention_mask": ids != 0, "modalities": ["video"]}
    found = host.prepare(model, {**wanted, "images": batch["images"][:1], "image_sizes": [first]})[4][0, :-1]
    from llava_packing_tower import image_to_packing_input

    scale = model.get_vision_tower().image_processor.pixel_scale
    rows, grid = image_to_packing_input(batch["images"][0].transpose(0, 1), 14, scale=scale)
    inner = model.get_vision_tower().vision_tower
    where = torch.from_numpy(clip.positions)
    states = inner(rows, grid, patch_positions=where, output_hidden_states=True).hidden_states[-1]
    assert (found - model.get_model().mm_projector(states)).abs().max() < 1e-4


def a_question_about_a_video_by_its_codec(host: Host):
    """The same patches and positions for `generate` and evaluation, and an answer to them."""
    if not host.is_next:
        return  # LLaVA 1.x reads no videos
    from llava_packing_tower.data.native_config import NativeSettings
    from llava_packing_tower.integrations.llava import batched_inference

    model = host.model()
    tower = model.get_vision_tower()
    tower.set_native(NativeSettings(1, 40, "clip", 8 * 16))
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "clip.mp4")
        write_clip(Path(file), frames=40, width=112, height=96)
        clip = codec_clip(file, 14, 8 * 16)
        loaded = SimpleNamespace(model=model, image_processor=tower.image_processor)
        pixels, kind, detail = batched_inference._pixels(loaded, file, False, 32, "codec")
        square = SimpleNamespace(model=host.model("square"), image_processor=tower.image_processor)
        refused(lambda: batched_inference._pixels(square, file, False, 32, "codec"), "image_aspect_ratio: native")
    assert kind == "video" and torch.equal(detail["patch_positions"], torch.from_numpy(clip.positions))
    ids = torch.tensor([[1, IMAGE, 3]])
    given = {"images": [pixels], "image_sizes": [detail], "modalities": ["video"], "attention_mask": ids != 0}
    with torch.no_grad():
        placed = host.prepare(model, {**given, "input_ids": ids, "labels": ids})[4]
        plain = {**given, "image_sizes": [{"size": detail["size"], "modality": "video"}]}
        elsewhere = host.prepare(model, {**plain, "input_ids": ids, "labels": ids})[4]
        assert placed.shape == elsewhere.shape and (placed - elsewhere).abs().max() > 1e-4
        answer = model.generate(ids, **given, max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert answer.shape[-1] > 0


CHECKS = {
    name: function
    for name, function in vars(sys.modules[__name__]).items()
    if callable(function) and "host" in getattr(function, "__annotations__", {})
}
