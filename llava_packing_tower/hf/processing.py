"""Texts, images and videos to what an exported checkpoint is called with."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import AutoProcessor, BatchFeature, ProcessorMixin

from .configuration import LlavaPackingConfig
from .image_processing import LlavaPackingImageProcessor
from .layout import video_tokens

IMAGE, VIDEO = "<image>", "<video>"
TOKEN_TYPES = {"image": 1, "video": 2}
TEXT_OPTIONS = {
    "padding",
    "padding_side",
    "truncation",
    "max_length",
    "pad_to_multiple_of",
    "add_special_tokens",
    "return_attention_mask",
    "return_token_type_ids",
    "return_offsets_mapping",
    "verbose",
}
GROUPS = ("text_kwargs", "images_kwargs", "videos_kwargs", "audio_kwargs", "common_kwargs")
ACCEPTED = {"return_metadata", "do_sample_frames", "video_load_backend"}
"""What transformers and vLLM pass along for other processors; it changes nothing here."""


class LlavaPackingProcessor(ProcessorMixin):
    """The tokenizer and the image processor of an exported checkpoint; every ``<image>`` and ``<video>`` of a text
    becomes as many tokens as the model has for it."""

    if transformers.__version__.startswith("4."):
        attributes = ["image_processor", "tokenizer"]
        image_processor_class = "AutoImageProcessor"
        tokenizer_class = "AutoTokenizer"
    image_token, video_token = IMAGE, VIDEO

    def __init__(
        self,
        image_processor: LlavaPackingImageProcessor | None = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids([IMAGE, VIDEO])

    @property
    def model_input_names(self) -> list[str]:
        videos = ["pixel_values_videos", "video_grid_thw", "video_frame_positions"]
        return [*self.tokenizer.model_input_names, *self.image_processor.model_input_names, *videos]

    @property
    def video_processor(self) -> VideoInputs:
        """For servers that ask how videos are read. Raises ``AttributeError`` where the model takes none."""
        if not self.image_processor.mm_reads_videos:
            raise AttributeError(f"{type(self).__name__} has no video_processor: the model takes no videos")
        return VideoInputs(self.image_processor)

    # ---------------------------------------------------------------- call

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        videos: Any = None,
        audio: None = None,
        return_tensors: str | None = None,
        **options: Any,
    ) -> BatchFeature:
        """Prepare samples.

        Args:
            images: one, a list of all images in the order of the texts, or a list for each text. See
                :meth:`LlavaPackingImageProcessor.fetch`.
            text: prompts, with an ``<image>`` or ``<video>`` for each image or video.
            videos: as images; see :meth:`LlavaPackingImageProcessor.clip`.
            options: those of the tokenizer (texts are padded on the left if there are several), ``num_frames`` and
                ``video_metadata`` for videos, ``return_mm_token_type_ids`` (1 for images, 2 for videos), and ``alone``:
                whether an image has no other visual beside it, for callers whose texts do not tell.

        Returns:
            ``input_ids``, ``attention_mask`` and what :meth:`LlavaPackingImageProcessor.preprocess` and
            :meth:`LlavaPackingImageProcessor.preprocess_videos` return.

        Raises:
            ValueError: more or fewer images or videos than a text has places; audio; nothing to prepare.
            TypeError: options that nobody here has, texts that are none.
        """
        options = _flat(options)
        asked = {name: bool(options.pop(f"return_{name}", False)) for name in RETURNED}
        num_frames, metadata = options.pop("num_frames", None), options.pop("video_metadata", None)
        alone = options.pop("alone", None)
        if strange := set(options) - TEXT_OPTIONS - ACCEPTED:
            raise TypeError(f"{type(self).__name__} got unexpected arguments {', '.join(sorted(strange))}")
        if audio is not None:
            raise ValueError("this model takes no audio")
        flat = {"image": _flatten(images, 0), "video": _flatten(videos, 1)}
        texts = None if text is None else [text] if isinstance(text, str) else list(text)
        if not all(isinstance(sample, str) for sample in texts or ()):
            kinds = [type(sample).__name__ for sample in texts or ()]
            raise TypeError(f"texts are strings, got {kinds}: call processor(text=..., images=...)")
        if texts is None and not any(flat.values()):
            raise ValueError("neither text nor images nor videos were given")
        if texts is not None:
            self._check_places(texts, flat)
            self._check_own(texts, {"image": _counts(images, 0), "video": _counts(videos, 1)})
        content: dict[str, Any] = {}
        if flat["image"]:
            flags = self._alone(texts, len(flat["image"])) if alone is None else bool(alone)
            content.update(self.image_processor.preprocess(flat["image"], flags))
        if flat["video"]:
            content.update(self.image_processor.preprocess_videos(flat["video"], num_frames, metadata))
        if texts is not None:
            content = {**self._tokens(texts, content, asked, return_tensors, options), **content}
        return BatchFeature(content)

    def _check_places(self, texts: Sequence[str], flat: Mapping[str, list]) -> None:
        for kind, token in (("image", IMAGE), ("video", VIDEO)):
            places = [text.count(token) for text in texts]
            if flat[kind] and sum(places) != len(flat[kind]):
                raise ValueError(f"{len(flat[kind])} {kind}s, but the texts have {places} {token}")
            if not flat[kind] and sum(places):
                raise ValueError(f"no {kind}s, but the texts have {places} {token}")

    @staticmethod
    def _check_own(texts: Sequence[str], counts: Mapping[str, list[int] | None]) -> None:
        """Where each text has a list of its own, its places must be as many: else images go to other texts."""
        for kind, token in (("image", IMAGE), ("video", VIDEO)):
            given, places = counts[kind], [text.count(token) for text in texts]
            if given is not None and given != places:
                raise ValueError(f"lists of {given} {kind}s, but the texts have {places} {token}")

    @staticmethod
    def _alone(texts: Sequence[str] | None, count: int) -> list[bool]:
        """For each image, whether no other image or video stands in its text."""
        if texts is None:
            return [count == 1] * count
        marks = [(text.count(IMAGE), text.count(VIDEO)) for text in texts]
        return [images + videos == 1 for images, videos in marks for _ in range(images)]

    def _tokens(
        self,
        texts: Sequence[str],
        visuals: Mapping[str, Any],
        asked: Mapping[str, bool],
        return_tensors: str | None,
        options: dict[str, Any],
    ) -> dict[str, Any]:
        replaced, offsets = self.get_text_with_replacements(
            list(texts), self._image_texts(visuals), self._video_texts(visuals)
        )
        options = {name: value for name, value in options.items() if name in TEXT_OPTIONS}
        options.setdefault("padding", len(texts) > 1)
        bos = self.tokenizer.bos_token
        if bos and all(text.startswith(bos) for text in texts):  # a chat template has put it there
            options.setdefault("add_special_tokens", False)
        made = dict(self.tokenizer(replaced, return_tensors=return_tensors, **options))
        made.pop("token_type_ids", None)
        self._check_cut(replaced, made["input_ids"], options)
        if asked["mm_token_type_ids"]:
            made["mm_token_type_ids"] = self.token_types(made["input_ids"])
        if asked["text_replacement_offsets"]:
            made["text_replacement_offsets"] = offsets
        return made

    def _check_cut(self, texts: Sequence[str], ids: Any, options: Mapping[str, Any]) -> None:
        """Raises ``ValueError`` where a truncation has cut off tokens of images: the model could not place them."""
        if not options.get("truncation"):
            return
        for token, index in ((IMAGE, self.image_token_id), (VIDEO, self.video_token_id)):
            wanted = [text.count(token) for text in texts]
            left = [sum(int(i) == index for i in row) for row in ids]
            if left != wanted:
                raise ValueError(
                    f"the truncation to {options.get('max_length')} tokens leaves {left} of the {wanted} tokens {token}"
                )

    def token_types(self, ids: Any) -> Any:
        """0 for a token of text, 1 of an image, 2 of a video, in the form of ``ids``: a tensor or lists."""
        if isinstance(ids, torch.Tensor):
            return (ids == self.image_token_id).long() + 2 * (ids == self.video_token_id).long()
        kinds = {self.image_token_id: TOKEN_TYPES["image"], self.video_token_id: TOKEN_TYPES["video"]}
        return [[kinds.get(int(token), 0) for token in row] for row in ids]

    def _image_texts(self, visuals: Mapping[str, Any]) -> list[str]:
        grids, settings = visuals.get("image_grid_thw"), self.image_processor.settings
        if grids is None:
            return []
        sizes = visuals.get("image_sizes", [None] * len(grids))
        sizes = [None if size is None else tuple(size.tolist()) for size in sizes]
        return [IMAGE * settings.image_tokens(tuple(grid), size) for grid, size in zip(grids.tolist(), sizes)]

    def _video_texts(self, visuals: Mapping[str, Any]) -> list[str]:
        grids, settings = visuals.get("video_grid_thw"), self.image_processor.settings
        return [] if grids is None else [VIDEO * video_tokens(tuple(grid), settings) for grid in grids.tolist()]

    def get_text_with_replacements(
        self,
        text: list[str],
        images_replacements: Sequence[str] = (),
        videos_replacements: Sequence[str] = (),
        audio_replacements: Sequence[str] = (),
    ) -> tuple[list[str], list[list[dict[str, Any]]]]:
        """The texts with their places filled, and for each text what was put where: dicts of ``type``, ``span`` (in
        the text given), ``new_span`` (in the one returned), ``text`` and ``replacement``."""
        waiting = {IMAGE: iter(images_replacements), VIDEO: iter(videos_replacements)}
        kinds = {IMAGE: "image", VIDEO: "video"}
        tokens = [t for t, given in ((IMAGE, images_replacements), (VIDEO, videos_replacements)) if given]
        filled, offsets = [], []
        for sample in text:
            parts, spans, last, length = [], [], 0, 0
            for found in re.finditer("|".join(map(re.escape, tokens)) or r"(?!)", sample):
                new = next(waiting[found[0]])
                length += found.start() - last
                spans.append(
                    {
                        "type": kinds[found[0]],
                        "span": found.span(),
                        "new_span": (length, length + len(new)),
                        "text": found[0],
                        "replacement": new,
                    }
                )
                parts += [sample[last : found.start()], new]
                last, length = found.end(), length + len(new)
            filled.append("".join([*parts, sample[last:]]))
            offsets.append(spans)
        return filled, offsets

    # ---------------------------------------------------------------- what others ask

    def _get_num_multimodal_tokens(
        self,
        image_sizes: Sequence[Sequence[int]] | None = None,
        video_sizes: Sequence[Sequence[int]] | None = None,
        **_: Any,
    ) -> Any:
        """vLLM's question: tokens and rows of images (height, width) and videos (frames, height, width)."""
        processor = self.image_processor
        answer: dict[str, list[int]] = {}
        if image_sizes is not None:
            sizes = [(int(width), int(height)) for height, width in image_sizes]
            grids = [processor.image_grid(size) for size in sizes]
            answer["num_image_tokens"] = [processor.settings.image_tokens(*pair) for pair in zip(grids, sizes)]
            answer["num_image_patches"] = [int(np.prod(grid)) for grid in grids]
        if video_sizes is not None:
            videos = [processor.video_grid(int(t), (int(w), int(h))) for t, h, w in video_sizes]
            answer["num_video_tokens"] = [video_tokens(grid, processor.settings) for grid in videos]
        data = getattr(transformers.processing_utils, "MultiModalData", dict)
        return data(**answer)

    def post_process_image_text_to_text(
        self, generated_outputs: Any, skip_special_tokens: bool = True, **options: Any
    ) -> list[str]:
        """The texts of generated ids."""
        return self.tokenizer.batch_decode(generated_outputs, skip_special_tokens=skip_special_tokens, **options)


class VideoInputs:
    """How videos are read: what vLLM looks up before it asks for dummy videos."""

    model_input_names = ("pixel_values_videos", "video_grid_thw", "video_frame_positions")
    do_sample_frames = True
    """Frames come with their places in the video."""
    fps = 1

    def __init__(self, image_processor: LlavaPackingImageProcessor) -> None:
        self.size = image_processor.size


RETURNED = ("mm_token_type_ids", "text_replacement_offsets")


def _flat(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options that transformers groups by modality, in one level; those of the top level count."""
    inner: dict[str, Any] = {}
    for group in GROUPS:
        inner.update(options.get(group) or {})
    return {**inner, **{name: value for name, value in options.items() if name not in GROUPS}}


def _flatten(given: Any, depth: int) -> list:
    """Visuals in one list: what is given may be one of them, all of them, or a list for each text.

    depth: 1 where a list of images (or an array of four dimensions) is one visual, a video.
    """
    if given is None:
        return []
    if not depth and getattr(given, "ndim", 0) == 4:  # images of one size in one array
        return list(given)
    if not isinstance(given, (list, tuple)) or _is_visual(given, depth):
        return [given]
    flat: list[Any] = []
    for entry in given:
        if entry is None:
            continue
        if isinstance(entry, (list, tuple)) and not _is_visual(entry, depth):
            flat += entry
        else:
            flat.append(entry)
    return flat


def _counts(given: Any, depth: int) -> list[int] | None:
    """How many visuals each text has, where every entry is a list for a text; None for any other form."""
    if not isinstance(given, (list, tuple)) or not given or _is_visual(given, depth):
        return None
    own = [entry for entry in given if isinstance(entry, (list, tuple)) and not _is_visual(entry, depth)]
    return [len(entry) for entry in own] if len(own) == len(given) else None


def _is_visual(given: Sequence, depth: int) -> bool:
    """Whether a list is one video: frames, or an array of frames with its metadata."""
    if not depth or not given:
        return False
    first = given[0]
    if isinstance(given, tuple) and len(given) == 2 and getattr(first, "ndim", 0) == 4:
        return True
    return isinstance(first, Image.Image) or getattr(first, "ndim", 0) == 3


AutoProcessor.register(LlavaPackingConfig, LlavaPackingProcessor, exist_ok=True)
