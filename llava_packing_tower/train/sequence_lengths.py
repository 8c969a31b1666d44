"""Samples that ``model_max_length`` will cut, and those above a token budget, said before anything is loaded.

No torch here.

Lengths are counted from below, without the words of the prompt's template, newline tokens and further tiles of an
image: what is named here is too long for certain.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ..data.images import UnreadableImage, read_size
from ..data.native_config import DEFAULT_MIN_PATCHES, NATIVE, POINTWISE, PREFIX
from ..data.samples import IMAGE_WORD, LOOKED_FOR, NAMED, images_of, spread_indices
from ..data.smart_resize import CHECKPOINT, SmartResize, check_bounds, known_merge, merge_of
from ..integrations.llava.arguments_table import TRUNCATE
from ..utils.files import read_json, user_path

ANSWERING = ("gpt", "assistant")

Counter = Callable[[str], int]


def text_counter(folder: Path) -> Counter | None:
    """Counts the tokens of a text as the tokenizer in a decoder's folder does; None where none is there.

    Raises ``ValueError`` for a damaged one.
    """
    if (file := folder / "tokenizer.json").is_file():
        from tokenizers import Tokenizer

        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the library has no class of its own for it
            raise ValueError(f"model_name_or_path: {file} is damaged: {error}") from error
        return lambda text: len(tokenizer.encode(text, add_special_tokens=False))
    if (file := folder / "tokenizer.model").is_file():
        from sentencepiece import SentencePieceProcessor

        try:
            pieces = SentencePieceProcessor(model_file=str(file))
        except (OSError, RuntimeError) as error:
            raise ValueError(f"model_name_or_path: {file} is damaged: {error}") from error
        return lambda text: len(pieces.encode(text))
    return None


class ImageCounter:
    """The fewest visual tokens of an image of a run."""

    def __init__(self, values: Mapping[str, object], tower: Path) -> None:
        config, processor = _read(tower / "config.json"), _read(tower / "preprocessor_config.json")
        inner = config.get("vision_config")
        config = inner if isinstance(inner, dict) else config
        patch, self.each, self.rule = _side(config.get("patch_size")), 1, None
        square = processor.get("crop_size") or processor.get("size")
        if isinstance(square, dict) and "longest_edge" in square:
            square = None  # bounds of an area
        sides = {_side(config.get("image_size")), _side(square)} - {None}
        self.folder = user_path(str(values.get("image_folder") or ""))
        projector = str(values.get("mm_projector_type") or "linear")
        cell = _side(config.get("spatial_merge_size", config.get("merge_kernel_size")))  # (the latter is Kimi's)
        merge = (cell or 1,) * 2 if projector == CHECKPOINT else merge_of(projector)
        self.exif = values.get("mm_packing_exif") is not False
        if not patch or not sides or (projector == CHECKPOINT and not cell):
            return
        nominal = (min(sides) // patch) ** 2
        if values.get("image_aspect_ratio") == NATIVE:
            earlier = _read(user_path(str(values["model_name_or_path"])) / "config.json")
            most, least = (
                values.get(key) or earlier.get(key) for key in (f"{PREFIX}max_patches", f"{PREFIX}min_patches")
            )
            if projector == CHECKPOINT or known_merge(projector) or POINTWISE.match(projector):
                most = most or max(nominal, math.prod(merge))
                check_bounds(1, most)
                self.rule = SmartResize(patch, merge, least or min(DEFAULT_MIN_PATCHES, most), most)
        elif POINTWISE.match(projector):
            reduced = values.get("mm_resampler_type") or "nobase" in str(values.get("mm_patch_merge_type"))
            self.each = 1 if reduced else max(1, nominal)

    def __call__(self, name: str) -> int:
        if self.rule is None:
            return self.each
        try:
            rows, columns = self.rule.tokens(*read_size(self.folder / name, self.exif))
        except UnreadableImage:  # it is named by the check of the files
            return 1
        return rows * columns


def _read(file: Path) -> dict:
    return read_json(file) if file.is_file() else {}


def _side(value: object) -> int | None:
    """A side in pixels: a number, a list of them, or a mapping as image processors have it."""
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
    return min((side for side in values if type(side) is int and side > 0), default=None)


class LengthCheck:
    """Collects the samples of a dataset that ``model_max_length`` cuts, and those above the token budget of a run that
    refuses them, of :data:`LOOKED_FOR` ones of each file."""

    def __init__(self, values: Mapping[str, object], tower: Path, limit: int) -> None:
        """Raises ``ValueError`` for a limit below 1."""
        if limit < 1:
            raise ValueError(f"model_max_length must be at least 1, got {limit}")
        self.count = text_counter(user_path(str(values["model_name_or_path"])))
        self.count_image, self.limit = ImageCounter(values, tower), limit
        truncates = values.get("mm_packing_over_budget") == TRUNCATE
        self.budget = None if truncates else values.get("mm_packing_batch_tokens")
        self.above: list[str] = []
        self.plain = values.get("version") == "plain"  # which leaves the questions out
        self.lines: list[str] = []
        self.checked = 0
        self.answered = {True: 0, False: 0}
        """Samples that keep some of their answer, with and without images."""
        self.has_images = False

    def look(self, samples: Sequence[Mapping]) -> None:
        """Look at the samples of a file."""
        if self.count is None:
            return
        for index in spread_indices(len(samples), LOOKED_FOR):
            self.checked += 1
            self._look_at(samples[index], index)

    def _look_at(self, sample: Mapping, index: int) -> None:
        images = sum(map(self.count_image, images_of(sample, reads_videos=False))) if sample.get("image") else 0
        turns = [turn for turn in sample["conversations"] if not self.plain or turn["from"] in ANSWERING]
        texts = [turn["value"].replace(IMAGE_WORD, "") for turn in turns]
        # No text has more tokens than bytes: most samples need no tokenizer.
        self.has_images |= images > 0
        if images + sum(len(text.encode()) + 1 for text in texts) <= min(self.limit, self.budget or self.limit):
            self.answered[images > 0] += 1
            return
        counts = [self.count(text) for text in texts]
        answer = next((n for n, turn in enumerate(turns) if turn["from"] in ANSWERING), len(turns))
        self.answered[images > 0] += images + sum(counts[:answer]) < self.limit
        length = images + sum(counts)
        line = f"sample {sample.get('id', index)}: at least {length} tokens, {images} of them of images"
        if length > self.limit:
            self.lines.append(line)
        if self.budget is not None and min(length, self.limit) > self.budget:
            self.above.append(line)

    def result(self) -> str | None:
        """What is cut, in words; None for nothing.

        Raises ``ValueError`` where no answer about an image, or none at all, is left to train on, and for samples above
        the token budget.
        """
        if self.above:
            raise ValueError(
                f"mm_packing_batch_tokens {self.budget}: {len(self.above)} of {self.checked} samples have more tokens. "
                f"Raise it, or set mm_packing_over_budget: {TRUNCATE}:{_named(self.above)}"
            )
        if not self.lines:
            return None
        named = _named(self.lines)
        if not self.answered[self.has_images]:
            what = "answer about an image" if self.has_images else "answer"
            raise ValueError(f"model_max_length {self.limit} leaves no {what} to train on:{named}")
        return (
            f"{len(self.lines)} of {self.checked} samples are longer than model_max_length {self.limit} and will be "
            f"cut:{named}"
        )


def _named(lines: Sequence[str]) -> str:
    """The first of the lines, one below the other."""
    more = "" if len(lines) <= NAMED else f"\n  and {len(lines) - NAMED} more"
    return "".join(f"\n  {line}" for line in lines[:NAMED]) + more
