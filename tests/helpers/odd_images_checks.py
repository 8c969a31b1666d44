"""266 odd image files through the datasets of a real host and through evaluation; run by ``native_checks.py``."""

from __future__ import annotations

import resource
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
from native_data_checks import module, turns
from native_host import Host
from odd_images import LONG, READ, REFUSED, Odd, make_corpus
from PIL import Image

from llava_packing_tower.data.image_processor import raw_pixels
from llava_packing_tower.eval.refusals import refusals
from llava_packing_tower.integrations.llava.inference import as_read
from llava_packing_tower.integrations.llava.left_out import LeftOut

RINGING = 12
"""What a resize may add to a quarter of a picture."""
MEGABYTES = 300
"""A strip that is padded or enlarged before it is cut takes gigabytes."""


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def points(pixels: torch.Tensor) -> np.ndarray:
    """The four quarters of uint8 pixels ``[3, H, W]``, where they are with and without padding."""
    height, width = pixels.shape[1:]
    places = [(int(height * y), int(width * x)) for y in (0.34, 0.66) for x in (0.25, 0.75)]
    return np.array([pixels[:, y, x].numpy() for y, x in places], float)


def check(odd: Odd, found: torch.Tensor | str, way: str) -> list[str]:
    """What is wrong with the pixels, or with the refusal, that a way of reading gave for a file."""
    refused = odd.outcome == REFUSED or (odd.outcome == LONG and "native" in way)
    if isinstance(found, str) or refused:
        wanted = refused and isinstance(found, str)
        return [] if wanted else [f"{way}: {odd.path} was {'refused: ' + found if isinstance(found, str) else 'read'}"]
    tiles = found if found.dim() == 4 else found[None]
    if found.dtype != torch.uint8 or tiles.shape[1] != 3 or tiles.shape[-1] % 14 or tiles.shape[-2] % 14:
        return [f"{way}: {odd.path}: {found.dtype} {list(found.shape)}"]
    if odd.quarters is not None and "crop_split" not in way:
        worst = np.abs(points(tiles[0]) - odd.quarters).max()
        if worst > odd.slack + RINGING:
            return [f"{way}: {odd.path} is another picture, by {worst}: {points(tiles[0]).tolist()}"]
    return []


def read_all(way: str, files: list[Odd], read) -> None:
    """Every file gives its outcome, in memory for what comes out."""
    before, wrong = peak(), []
    for odd in files:
        wrong += check(odd, read(odd), way)
    assert not wrong, "\n".join(wrong)
    assert peak() - before < MEGABYTES, (way, peak() - before)


def odd_files_have_their_outcome_in_training(host: Host):
    with tempfile.TemporaryDirectory() as folder, mock.patch("time.sleep") as sleep:
        files = make_corpus(Path(folder) / "corpus")
        assert len(files) == 266
        samples = [
            {"id": f"number {n}", "image": str(odd.path), "conversations": turns("<image>\nWhat?")}
            for n, odd in enumerate(files)
        ]
        for ratio in ("native", "square", "pad", *(["anyres", "highres", "crop_split"] if host.is_next else [])):
            (Path(folder) / ratio).mkdir()
            with mock.patch("llava_packing_tower.integrations.llava.native_dataset.report_tokens"):
                dataset, _ = module(samples, Path(folder) / ratio, ratio=ratio)
            number = {odd.path: n for n, odd in enumerate(files)}

            def read(odd, dataset=dataset, number=number):
                sample = dataset[number[odd.path]]
                if isinstance(sample, LeftOut):
                    assert sample.sample == f"number {number[odd.path]}" and sample.file == str(odd.path), sample
                    assert str(odd.path) in sample.reason or repr(str(odd.path)) in sample.reason, sample
                    return sample.reason
                return sample["image"][0][0] if host.is_next else sample["image"]

            read_all(f"training, {ratio}", files, read)
        assert not sleep.called


def odd_files_have_their_outcome_in_evaluation(host: Host):
    """There an image comes from a task, opened: what no path leads to, and what only the file tells, is not asked."""
    from llava.mm_utils import process_images

    with tempfile.TemporaryDirectory() as folder:
        files = [odd for odd in make_corpus(Path(folder)) if not odd.by_path or odd.outcome == READ]
        files = [odd for odd in files if not odd.path.name.endswith("_rows.png")]
        for ratio in ("native", "pad"):
            processor = host.model(ratio).get_vision_tower().image_processor
            config = SimpleNamespace(image_aspect_ratio=ratio)

            def read(odd, processor=processor, config=config):
                try:
                    with refusals("vqa", odd.path.name), raw_pixels():
                        image = as_read(Image.open(odd.path), processor, config)
                        return process_images([image], processor, config)[0]
                except ValueError as error:
                    assert f"task vqa, document {odd.path.name}: " in str(error)
                    return str(error)

            read_all(f"evaluation, {ratio}", files, read)


CHECKS = {
    name: function
    for name, function in vars(sys.modules[__name__]).items()
    if callable(function) and "host" in getattr(function, "__annotations__", {})
}
