"""The data's side: images of all samples are read as the tower's processor says, and reach the model as bytes.

At native resolution they keep their own sizes, and frames their places in the video; both go where their ``<image>``
is.
"""

from __future__ import annotations

import functools
import inspect
import logging
import os
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch

from ...data.codec import DEFAULT_PATCHES, CodecClip, codec_clip
from ...data.image_processor import PackingImageProcessor, raw_pixels
from ...data.images import HostImage, check_file, fit_of, reading_as
from ...data.native_config import asks_for_native
from ...data.native_image_processor import KEPT
from ...data.placed_samples import POSITIONS, mark_datasets, read_array, refuse_positions, selector_of, square_side
from ...data.samples import MEDIA, check_places, drop_empty_media, images_of
from ...data.video import check_frame_count, check_video, read_clip, video_errors
from ...multimodal.dataset_report import measure
from ...utils import environment
from .arguments import current_arguments, current_training_arguments
from .host import Host
from .left_out import NOTE, leave_out, note, one_sample, placeholder, split
from .methods import Call, add_step
from .native_resolution import token_layout
from .patcher import Patches
from .registry import data_module, host_of, image_token, mixin
from .sample_sizes import tokenized

logger = logging.getLogger(__name__)

DETAILS = "packing_details"
"""Where a sample carries what LLaVA has no place for: a ``multimodal.visual_inputs.Detail`` for each of its images."""


def into_training(train: ModuleType, patches: Patches) -> None:
    """Change what a host's ``train.train`` makes batches with."""
    data = data_module(train)
    dataset = getattr(data, host_of(train).dataset)
    patches.set(data, "Image", HostImage())
    add_step(dataset, "LazySupervisedDataset.__init__", "same_choice", same_choice, patches)
    add_step(dataset, "LazySupervisedDataset.__init__", "empty_media", empty_media, patches)
    if not hasattr(train, "make_supervised_data_module"):  # pairs of answers: nothing travels beside their images
        add_step(dataset, "LazySupervisedDataset.__getitem__", "whole_pairs", whole_pairs, patches)
        return
    if hasattr(dataset, "process_image"):
        add_step(dataset, "LazySupervisedDataset.process_image", "keep_sizes", keep_sizes, patches)
    if hasattr(train, "process_video_with_decord"):
        reader = ClipReader(train.process_video_with_decord)
        patches.set(train, "process_video_with_decord", reader)
    else:
        reader = None
    details = functools.partial(sample_details, reader=reader)
    if hasattr(dataset, "_get_item"):  # LLaVA-NeXT's __getitem__ calls it, and again for the next sample
        add_step(dataset, "LazySupervisedDataset.__getitem__", "one_sample", one_sample, patches)
        reads = "LazySupervisedDataset._get_item"
    else:
        reads = "LazySupervisedDataset.__getitem__"
    add_step(dataset, reads, "leave_out", leave_out, patches)
    add_step(dataset, reads, "sample_details", details, patches)

    def fit_batches(call: Call) -> Iterator[None]:
        yield
        module, tokenizer, data_args = call.result, call.arguments["tokenizer"], call.arguments["data_args"]
        limit, token = tokenizer.model_max_length, image_token(data)
        blank = blank_image(data_args, in_list=hasattr(dataset, "_get_item")) if data_args.is_multimodal else None
        last, native = placeholder(tokenizer, blank), asks_for_native(data_args)
        module["data_collator"] = FittingCollator(module["data_collator"], limit, token, last, native)
        if native:
            report_tokens(data, module["train_dataset"].list_data_dict, tokenizer, data_args)

    add_step(train, "train.make_supervised_data_module", "fit_batches", fit_batches, patches)


def whole_pairs(call: Call) -> None:
    """A pair of answers: read once, as the tower wants its images; positions have no way to the model.

    Raises ``ValueError`` for a sample with positions, ``UnreadableImage`` for one that cannot be read.
    """
    self, i = call.self, call.arguments["i"]
    if POSITIONS in self.list_data_dict[i]:
        raise ValueError(f"sample {self.list_data_dict[i].get('id', i)}: {POSITIONS} is not read with trainer: dpo")
    with reading_sample(self, i):
        call.result = self._get_item(i)


def same_choice(call: Call) -> None:
    """Before a dataset is made: ``sampling_strategy: random`` chooses the same samples on every rank, and when resumed.

    The host seeds Python's random numbers only with its trainer. (`llava-packing train` has seeded them before.)
    """
    arguments, processor = (
        current_training_arguments(),
        getattr(call.arguments.get("data_args"), "image_processor", None),
    )
    ours = isinstance(processor, PackingImageProcessor) and arguments is not None
    if ours and environment.read(environment.TRAINER) is None:
        random.seed(arguments.seed)


def empty_media(call: Call) -> Iterator[None]:
    """After a dataset is made: samples with ``image: null`` or an empty path become text-only samples."""
    yield
    drop_empty_media(call.self.list_data_dict)
    data_args = call.self.data_args
    mark_datasets(call.arguments.get("data_path") or "", call.self.list_data_dict)
    ours = isinstance(getattr(data_args, "image_processor", None), PackingImageProcessor)
    if not ours or host_places(call.self):
        return
    native, host = asks_for_native(data_args), host_of(type(call.self).__module__)
    if not native or not takes_details(host):
        refuse_positions(call.self.list_data_dict, data_args.image_aspect_ratio, host.title if native else None)


def takes_details(host: Host) -> bool:
    """Whether the models of a host have the argument in which positions and frame numbers travel."""
    prepare = mixin(import_module(host.module(host.arch))).prepare_inputs_labels_for_multimodal
    return "image_sizes" in inspect.signature(prepare).parameters


def host_places(dataset: object) -> bool:
    """Whether the host itself gives positions to its tower: OneVision-Encoder's LLaVA."""
    return hasattr(sys.modules[type(dataset).__module__], "build_patch_positions")


def keep_sizes(call: Call) -> Iterator[None]:
    """LLaVA-NeXT pads every image of a sample with several to a square: not at native resolution."""
    data_args = call.self.data_args
    if asks_for_native(data_args):
        call.arguments["overwrite_image_aspect_ratio"] = None
    ratio = call.arguments.get("overwrite_image_aspect_ratio") or data_args.image_aspect_ratio
    with reading_as(getattr(data_args.image_processor, "image_reading", None), fit_of(ratio)):
        yield


class ClipReader:
    """LLaVA-NeXT's video reader, with PyAV where decord is missing; remembers where the last frames came from.

    Raises ``UnreadableImage`` for a video that cannot be read.
    """

    def __init__(self, original: Callable) -> None:
        self.original, self.last = original, None
        self.selector: str | None = None
        """What makes the patches of the sample that is being read; None for its frames."""

    def __call__(self, video_file: str, data_args: object) -> tuple:
        check_file(video_file)
        if self.selector is not None:
            processor = data_args.image_processor
            budget = processor.settings.video_max_patches or DEFAULT_PATCHES
            clip = self.last = codec_clip(video_file, processor.rule.patch_size, budget, self.selector)
            times = ",".join(f"{index / clip.fps:.2f}s" for index in clip.indices)
            return clip.mosaics, clip.total / clip.fps, times, len(clip.indices)
        if not asks_for_native(data_args) and find_spec("decord"):
            with video_errors(video_file):
                check_frame_count(video_file)
                return self.original(video_file, data_args)
        wanted, force = data_args.video_fps, data_args.force_sample
        clip = read_clip(video_file, wanted, data_args.frames_upbound, force)
        self.last = clip
        times = ",".join(f"{index / clip.fps:.2f}s" for index in clip.indices)
        return clip.frames, clip.total / clip.fps, times, len(clip.indices)


@contextmanager
def reading_sample(dataset: torch.utils.data.Dataset, i: int | slice) -> Iterator[None]:
    """Within it, the images of sample ``i`` are read as the tower's image processor says, and stay bytes.

    Raises ``UnreadableImage`` for one that cannot be read.
    """
    processor = dataset.data_args.image_processor
    if not isinstance(processor, PackingImageProcessor):
        yield
        return
    entry = dataset.list_data_dict[i] if isinstance(i, int) else {}
    if isinstance(video := entry.get("video"), str) and "image" not in entry:
        check_video(os.path.join(dataset.data_args.video_folder or "", video))
    with reading_as(processor.image_reading, fit_of(dataset.data_args.image_aspect_ratio)), raw_pixels():
        yield


def sample_details(call: Call, reader: ClipReader | None) -> Iterator[None]:
    """Read a sample's images as the tower wants them; add the places of its frames and its own positions."""
    self, i = call.self, call.arguments["i"]
    if not asks_for_native(self.data_args):
        with reading_sample(self, i):
            yield
        blank_as_bytes(call.result, self, i)
        return
    source = self.list_data_dict[i] if isinstance(i, int) else {}
    selector, video = selector_of(source), "video" in source
    if reader is not None:
        reader.last, reader.selector = None, selector
    processor = self.data_args.image_processor
    side = side_of(source, self.data_args, selector)
    with processor.reading(video), processor.placed(side), reading_sample(self, i):
        yield
    sample = blank_as_bytes(call.result, self, i)
    if "image" in sample:
        sample[DETAILS] = make_details(sample["image"], self.list_data_dict[i], i, self.data_args, reader)


def blank_image(data_args: object, in_list: bool) -> object:
    """The host's image of a sample without one: its features reach no sequence."""
    size = data_args.image_processor.crop_size
    ours = isinstance(data_args.image_processor, PackingImageProcessor)
    blank = torch.zeros(3, size["height"], size["width"], dtype=torch.uint8 if ours else torch.float32)
    return [(blank[None], (size["width"], size["height"]), "text")] if in_list else blank


def blank_as_bytes(sample: dict, dataset: torch.utils.data.Dataset, i: int | slice) -> dict:
    """The host's image of a sample without one, as uint8 like those of other samples: a batch of both dtypes would
    become floating point."""
    is_text = isinstance(i, int) and not any(key in dataset.list_data_dict[i] for key in MEDIA)
    if is_text and "image" in sample and isinstance(dataset.data_args.image_processor, PackingImageProcessor):
        sample["image"] = blank_image(dataset.data_args, in_list=isinstance(sample["image"], list))
    return sample


def make_details(
    images: object, source: Mapping, index: int, data_args: object, reader: ClipReader | None
) -> list[dict | None]:
    """The details of each image of a sample.

    Raises ``ValueError`` for positions that do not fit the images.
    """
    tensors = [image[0] for image in images] if isinstance(images, list) else [images]
    details: list[dict] = [{} for _ in tensors]
    clip = reader.last if reader is not None and "video" in source else None
    if isinstance(clip, CodecClip):
        return [{"patch_positions": torch.from_numpy(clip.positions)}]
    if clip is not None and len(clip.indices) == len(tensors[0]):
        details[0] = {"frame_indices": torch.tensor(clip.indices), "total_frames": clip.total}
    if POSITIONS in source:
        patch = data_args.image_processor.rule.patch_size
        counts = [t.shape[-2] * t.shape[-1] // patch**2 * (len(t) if t.dim() == 4 else 1) for t in tensors]
        positions = read_positions(source, data_args)
        if sum(counts) != len(positions):
            raise ValueError(
                f"{source[POSITIONS]} has {len(positions)} positions, but the images of the sample have {counts} "
                f"patches: the sides of images with positions must be multiples of the patch size, and their patches "
                f"between mm_packing_min_patches and mm_packing_max_patches"
            )
        for detail, part in zip(details, positions.split(counts)):
            detail.update(patch_positions=part, group=index)
    return [detail or None for detail in details]


def read_positions(source: Mapping, data_args: object) -> torch.Tensor:
    """The sample's positions (frame, row, column), float32 ``[num_patches, 3]``, from its ``.npy`` file.

    Its path is absolute, or relative to the folder of the sample's images or videos. Raises as ``read_array`` does.
    """
    folder = getattr(data_args, "video_folder" if "video" in source else "image_folder", None) or ""
    if not isinstance(source[POSITIONS], str):
        raise ValueError(f"sample {source.get('id')}: {POSITIONS} must be a file, got {source[POSITIONS]!r:.80}")
    return torch.from_numpy(read_array(os.path.join(folder, source[POSITIONS])))


def side_of(source: Mapping, data_args: object, selector: str | None) -> int | None:
    """Patches along the side of a sample's square images, where its positions tell; see ``placed``."""
    if POSITIONS not in source or "video" in source:
        return KEPT if selector else None
    return square_side(len(read_positions(source, data_args)), len(images_of(source, False)))


def report_tokens(train: ModuleType, samples: Sequence[Mapping], tokenizer: object, data_args: object) -> None:
    """Print what the dataset costs, once; every rank refuses samples that do not fit together.

    Raises ``ValueError`` for samples with more or fewer images than ``<image>`` in their text.
    """
    reads_videos = hasattr(train, "process_video_with_decord")
    check_places(samples, reads_videos)
    arguments = current_arguments("ModelArguments")
    if arguments is None or os.environ.get("RANK", "0") != "0":
        return

    def to_ids(sample: Mapping, index: int) -> list[int]:
        return tokenized(train, sample, index, tokenizer, data_args)[0].tolist()

    processor, sampling = data_args.image_processor, None
    if reads_videos:
        sampling = {"wanted_fps": data_args.video_fps, "upbound": data_args.frames_upbound}
        sampling["force"] = data_args.force_sample
    report = measure(
        samples,
        processor,
        token_layout(arguments, processor.settings),
        to_ids,
        image_token(train),
        tokenizer.model_max_length,
        {kind: getattr(data_args, f"{kind}_folder", None) for kind in ("image", "video")},
        sampling,
    )
    print("\n".join(report.lines()), flush=True)
    for warning in report.warnings():
        logger.warning("native resolution: %s", warning)


class FittingCollator:
    """The host's collator, given no more images than the text of a sample has places for.

    The host cuts the text at ``limit`` tokens; images whose ``<image>`` goes with it would move into the next sample,
    at any ``image_aspect_ratio``. What samples carry beside their images reaches the model in ``image_sizes``. Samples
    that could not be read are left out; ``last`` is the batch where there is no other.
    """

    def __init__(self, collate: Callable, limit: int, image_token: int, last: Mapping, native: bool = False) -> None:
        self.collate, self.limit, self.image_token, self.last, self.native = collate, limit, image_token, last, native

    def __call__(self, instances: Sequence) -> dict[str, object]:
        there, left_out = split(instances)
        batch = self._collated([self.fitted(instance) for instance in there] or [self.last])
        return {**batch, NOTE: note(left_out, is_empty=not there)} if left_out else batch

    def _collated(self, instances: Sequence[Mapping]) -> dict[str, object]:
        batch = self.collate(instances)
        for name in ("patch_positions", "grid_thw") if self.native else ():
            batch.pop(name, None)  # OneVision-Encoder's LLaVA makes them for sizes of its own
        details = [d for i in instances for d in i.get(DETAILS) or [None] * self._count(i)]
        if any(details):
            sizes = batch.get("image_sizes") or [None] * len(details)
            batch["image_sizes"] = [{"size": s, **(d or {})} for s, d in zip(sizes, details)]
        return batch

    @staticmethod
    def _count(instance: Mapping) -> int:
        images = instance.get("image")
        return len(images) if isinstance(images, list) else int(images is not None)

    def fitted(self, instance: Mapping) -> Mapping:
        """Raises ``ValueError`` for a sample with more or fewer images than ``<image>`` in its text."""
        if (count := self._count(instance)) == 0:
            return instance
        marks = instance["input_ids"] == self.image_token
        places = int(marks.sum())
        if max(places, 1) != count:
            raise ValueError(f"sample {instance.get('id')} has {count} images, but {places} <image> in its text")
        kept = max(int(marks[: self.limit].sum()), 1)
        if kept == count:
            return instance
        logger.warning(
            "sample %s: its text is cut at model_max_length %d, which removes %d of its %d images",
            instance.get("id"),
            self.limit,
            count - kept,
            count,
        )
        cut = {**instance, "image": instance["image"][:kept]}
        return {**cut, DETAILS: cut[DETAILS][:kept]} if DETAILS in cut else cut
