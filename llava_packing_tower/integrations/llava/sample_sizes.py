"""How many patches and tokens the samples of a host's dataset have, from headers and text, before pixels are read.

The text goes through the host's own tokenization, and images through the rules of its model: counts are exact.
"""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.data import Dataset

from ...data.images import UnreadableImage, read_size
from ...data.native_config import POINTWISE, asks_for_native, settings_of
from ...data.samples import images_of
from ...data.smart_resize import merged
from ...data.video import probe_clip
from ...multimodal.crop_tokens import CropLayout
from ...multimodal.dealing import Cost, SampleSize, layer_cost, layer_floor
from ...multimodal.supervised_head import IGNORE
from ...multimodal.visual_tokens import token_count
from .native_resolution import token_layout
from .registry import host_of

TILED = ("anyres",)
ONE_CROP = ("square", "pad", None)


class VisualSize(NamedTuple):
    """Of an image or video: rows of the encoder, pairs of rows that see each other, visual tokens."""

    patches: int
    pairs: int
    tokens: int


def unsupported_sizes(dataset: Dataset, model: nn.Module) -> str | None:
    """None if the sizes of a dataset's samples can be counted, else why not."""
    train = sys.modules[type(dataset).__module__]
    try:
        known = getattr(train, host_of(train).dataset, None)
    except ValueError:
        known = None
    if known is None or not isinstance(dataset, known):
        return f"the dataset is a {type(dataset).__name__}, not LLaVA's own"
    data_args = dataset.data_args
    videos = _reads_videos(train) and any("video" in sample for sample in dataset.list_data_dict)
    if videos and getattr(data_args, "add_time_instruction", False):
        return "add_time_instruction: the text of a video is known once it is read"
    if asks_for_native(data_args):
        return None
    if videos:
        return f"videos at image_aspect_ratio {data_args.image_aspect_ratio}"
    projector = getattr(model.config, "mm_projector_type", None) or "linear"
    if not POINTWISE.match(projector):
        return f"mm_projector_type {projector} at image_aspect_ratio {data_args.image_aspect_ratio}"
    if _has_crops(train) and data_args.image_aspect_ratio not in ONE_CROP and not _is_tiled(data_args):
        return f"image_aspect_ratio {data_args.image_aspect_ratio}"
    return None


def _reads_videos(train: ModuleType) -> bool:
    return hasattr(train, "process_video_with_decord")


def _has_crops(train: ModuleType) -> bool:
    """Whether a host's dataset cuts images at all (LLaVA 1.x does not)."""
    return hasattr(train, "process_anyres_image")


def _is_tiled(data_args: object) -> bool:
    return str(data_args.image_aspect_ratio).startswith(TILED)


def tokenized(
    train: ModuleType, sample: Mapping, index: int, tokenizer: object, data_args: object
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids, with ``<image>`` as one, and labels of a sample, as the host's dataset makes them: ``[L]``.

    Raises ``ValueError`` with the sample's id for a conversation that the host cannot read.
    """
    turns = copy.deepcopy([sample["conversations"]])
    has_image = "image" in sample or (_reads_videos(train) and "video" in sample)
    try:
        if has_image:
            turns = train.preprocess_multimodal(turns, data_args)
        made = train.preprocess(turns, tokenizer, has_image=has_image)
    except Exception as error:
        raise ValueError(f"sample {sample.get('id', index)}: {type(error).__name__}: {error}") from error
    return torch.as_tensor(made["input_ids"][0]), torch.as_tensor(made["labels"][0])


class SizeReader:
    """Sizes of the samples of a host's dataset.

    dataset: a ``LazySupervisedDataset``. model: a LLaVA with a packing tower. longest: decoder tokens at which samples
    are cut beside ``tokenizer_model_max_length``, None for no other limit.
    """

    def __init__(self, dataset: Dataset, model: nn.Module, longest: int | None = None) -> None:
        self.dataset = dataset
        tower, config, data_args = model.get_vision_tower(), model.config, dataset.data_args
        self.native = asks_for_native(data_args)
        self.processor, self.patch = data_args.image_processor, tower.config.patch_size
        limits = [getattr(config, "tokenizer_model_max_length", None), longest]
        self.limit = min((limit for limit in limits if limit is not None), default=sys.maxsize)
        if self.native:
            self.layout = token_layout(config, settings_of(config))
            self.merge, self.frames_per_patch = tower.merge, tower.vision_tower.frames_per_patch
            return
        self.side, self.image_size = tower.num_patches_per_side, tower.image_size
        merge_type = getattr(config, "mm_patch_merge_type", None) or "flat"
        several = _has_crops(self.train)
        self.layout = CropLayout(self.side, merge_type if several else "flat", str(data_args.image_aspect_ratio))
        self.tiled = several and _is_tiled(data_args)
        self.pinpoints = getattr(config, "image_grid_pinpoints", None)

    @property
    def train(self) -> ModuleType:
        return sys.modules[type(self.dataset).__module__]

    # ------------------------------------------------------------ before it is read

    def __call__(self, index: int) -> SampleSize:
        """The size of a sample. One whose files cannot be read is left out of its batch: it has none."""
        sample, given = self.dataset.list_data_dict[index], self.dataset
        ids, labels = tokenized(self.train, sample, index, given.tokenizer, given.data_args)
        names = images_of(sample, _reads_videos(self.train))
        folder = getattr(self.dataset.data_args, "image_folder" if "image" in sample else "video_folder", None) or ""
        try:
            visuals = [self._file(os.path.join(folder, name), "image" in sample, len(names)) for name in names]
        except (OSError, ValueError):
            return SampleSize(0, 0, 0, 0)
        return self._size(ids, labels, visuals or [self._blank()])

    def _file(self, file: str, is_image: bool, several: int) -> VisualSize:
        if not is_image:
            data = self.dataset.data_args
            width, height, frames = probe_clip(file, data.video_fps, data.frames_upbound, data.force_sample)
            rows, columns = self.processor.rule.grid(width, height, self.processor.settings.frame_patches(frames))
            return self._native(frames, rows, columns, True)
        reading = self.processor.image_reading
        size = read_size(file, reading.exif)
        too_long = self.native and max(size) > reading.max_aspect * min(size)
        if too_long or size[0] * size[1] > reading.max_pixels:
            raise UnreadableImage(f"{file}: {size[0]} x {size[1]} pixels", file)
        if self.native:
            return self._native(1, *self.processor.rule.grid(*size), False)
        return self._crops(size, self._grid(size) if self.tiled and several == 1 else None)

    def _blank(self) -> VisualSize:
        """What the host's dataset has the tower encode for a sample without an image."""
        crop = self.processor.crop_size
        patches = (crop["height"] // self.patch) * (crop["width"] // self.patch)
        return VisualSize(patches, patches**2, 0)

    def _native(self, frames: int, rows: int, columns: int, is_video: bool) -> VisualSize:
        each = rows * columns
        together = is_video and self.layout.clips
        if together:
            frames = -(-frames // self.frames_per_patch)
        tokens = token_count((frames, *merged((rows, columns), self.merge)), is_video, self.layout)
        return VisualSize(frames * each, (frames * each) ** 2 if together else frames * each**2, tokens)

    def _grid(self, size: tuple[int, int]) -> tuple[int, int]:
        host = host_of(self.train)
        shape = sys.modules[host.module(host.mm_utils)].get_anyres_image_grid_shape
        columns, rows = shape(size, self.pinpoints, self.image_size)
        return columns, rows

    def _crops(self, size: tuple[int, int], grid: tuple[int, int] | None) -> VisualSize:
        crops = 1 if grid is None else 1 + grid[0] * grid[1]
        return VisualSize(crops * self.side**2, crops * self.side**4, self.layout.tokens(size, grid))

    # ------------------------------------------------------------ after it was read

    def of_item(self, item: Mapping) -> SampleSize:
        """The size of what the host's dataset returned."""
        images = item.get("image")
        entries = images if isinstance(images, list) else [] if images is None else [(images, None, "image")]
        return self._size(item["input_ids"], item["labels"], [self._tensor(*entry) for entry in entries])

    def _tensor(self, pixels: torch.Tensor, size: tuple[int, int] | None, kind: str) -> VisualSize:
        frames = pixels if pixels.dim() == 4 else pixels[None]
        if self.native:
            rows, columns = (side // self.patch for side in frames.shape[-2:])
            return self._native(len(frames), rows, columns, kind == "video")
        return self._crops(size or (1, 1), self._grid(size) if len(frames) > 1 else None)

    # ------------------------------------------------------------ both

    def _size(self, ids: torch.Tensor, labels: torch.Tensor, visuals: Sequence[VisualSize]) -> SampleSize:
        tokenizer = self.dataset.tokenizer
        ids, labels = ids[: tokenizer.model_max_length], labels[: tokenizer.model_max_length]
        marks = ids == self.train.IMAGE_TOKEN_INDEX
        visuals = visuals[: max(int(marks.sum()), 1)]  # FittingCollator
        seen = ids != (tokenizer.pad_token_id or 0)
        marks, labels = marks[seen], labels[seen]
        widths = torch.ones_like(labels)
        widths[marks] = torch.tensor([v.tokens for v in visuals][: int(marks.sum())], dtype=widths.dtype)
        ends = widths.cumsum(0)
        begins = ends - widths
        supervised = (labels != IGNORE) & ~marks & (begins > 0) & (begins < self.limit)
        return SampleSize(
            patches=sum(v.patches for v in visuals),
            pairs=sum(v.pairs for v in visuals),
            tokens=min(int(ends[-1]) if len(ends) else 0, self.limit),
            supervised=int(supervised.sum()),
        )


def cost_of(model: nn.Module) -> Cost:
    """The constants of :class:`Cost` for a LLaVA: its layers, and what of them is trained."""
    tower, config = model.get_vision_tower(), model.config
    patch = pair = floor = 0.0
    for part in tower.encoders().values():
        encoder, layers = part.vision_tower.encoder.layers, max(part.feature_layers)
        weights, trained = _count(list(encoder)[:layers])
        passes = 1 + (1 + trained if trained else 0)
        more = layer_cost(part.config.hidden_size, layers, weights, passes)
        patch, pair, floor = patch + more[0], pair + more[1], floor + layer_floor(layers, passes)
    weights, trained = _count(model.model.layers)
    token, token_pair = layer_cost(config.hidden_size, len(model.model.layers), weights, 2 + trained)
    floor += layer_floor(len(model.model.layers), 2 + trained)
    weights, trained = _count([model.lm_head])
    head, _ = layer_cost(config.hidden_size, 0, weights, 2 + trained)
    return Cost(*(float(f"{value:.6g}") for value in (patch, pair, token, token_pair, head, floor)))


def _count(modules: Sequence[nn.Module]) -> tuple[int, float]:
    """Parameters of modules, and the part of them that is trained. Under ZeRO-3 and FSDP, of the whole."""
    total = trained = 0
    for module in modules:
        for parameter in module.parameters():
            count = getattr(parameter, "ds_numel", parameter.numel())
            total += count
            trained += count * parameter.requires_grad
    return total, trained / total if total else 0.0
