"""What a dataset costs at native resolution, reported before the first step: patches, visual tokens, lengths."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ..data.codec import DEFAULT_PATCHES, MOSAICS, mosaic_side
from ..data.images import read_size
from ..data.native_image_processor import NativeImageProcessor
from ..data.placed_samples import POSITIONS, read_array, selector_of, square_side
from ..data.samples import images_of, spread_indices
from ..data.video import probe_clip
from .truncation import cut_tokens
from .visual_tokens import TokenLayout, token_count

MEASURED = 2000
"""Samples that are measured, spread evenly over the dataset. Of images only the headers are read."""
BAR, WORST = 40, 3


@dataclass
class TokenReport:
    """Numbers of the measured samples.

    patches: of each image or frame; tokens: visual tokens of each image or video; lengths: tokens of each sequence,
    text and images; reduced, enlarged: images whose size the bounds changed by more than the rounding to whole patches;
    worst: of the reduced ones, pixels over those that are left and the file, the largest first; cut: (samples that will
    lose visual tokens, visual tokens lost); unreadable: files.
    """

    samples: int
    limit: int
    patches: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    measured: int = 0
    reduced: int = 0
    enlarged: int = 0
    cut: tuple[int, int] = (0, 0)
    worst: list[tuple[float, str]] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """For the log, one line each."""
        part = "" if self.measured == self.samples else f" ({self.measured} of them measured)"
        lines = [f"native resolution: {self.samples} samples{part}, {len(self.patches)} images and videos"]
        if self.patches:
            lines += [f"patches per image or frame: {_spread(self.patches)}", *_histogram(self.patches)]
            lines += [f"visual tokens per image or video: {_spread(self.tokens)}", *_histogram(self.tokens)]
            kept = len(self.patches) - self.reduced - self.enlarged
            lines.append(f"sizes: {kept} kept (to whole patches), {self.reduced} reduced, {self.enlarged} enlarged")
            if self.worst:
                lines.append(over_the_bound(self.reduced, self.worst))
        if self.lengths:
            over = sum(length > self.limit for length in self.lengths)
            lines.append(
                f"tokens per sequence: {_spread(self.lengths)}; model_max_length {self.limit}: {over} are longer"
            )
        return lines

    def warnings(self) -> list[str]:
        """What should be fixed before training."""
        found = []
        if self.cut[0]:
            found.append(
                f"{self.cut[0]} of {self.measured} samples are longer than model_max_length {self.limit} and will lose "
                f"{self.cut[1]} visual tokens: raise model_max_length or lower mm_packing_max_patches"
            )
        if self.unreadable:
            found.append(f"{len(self.unreadable)} files cannot be read, for example {', '.join(self.unreadable[:3])}")
        return found


def measure(
    samples: Sequence[Mapping],
    processor: NativeImageProcessor,
    layout: TokenLayout,
    to_ids: Callable[[Mapping, int], Sequence[int]],
    image_token: int,
    limit: int,
    folders: Mapping[str, str | None],
    sampling: Mapping[str, object] | None = None,
) -> TokenReport:
    """Measure a dataset, or MEASURED samples of it.

    Args:
        samples: entries of a LLaVA training file. processor: whose rule the images follow. to_ids: makes the token ids
            of a sample's text, given its number, with ``image_token`` for each image. limit: model_max_length.
        folders: "image" and "video": what the files are relative to.
        sampling: how videos are read: arguments of :func:`read_clip` beside the file; None where they are not.
    """
    report = TokenReport(len(samples), limit)
    for index in spread_indices(len(samples), MEASURED):
        sample = samples[index]
        folder = folders.get("image" if "image" in sample else "video") or ""
        counts = []
        for name in images_of(sample, sampling is not None):
            try:
                file, exact = os.path.join(folder, name), exact_grid(sample, folder, processor)
                counts.append(_measure_one(report, file, "image" in sample, processor, layout, sampling, exact))
            except (OSError, ValueError):
                report.unreadable.append(name)
        report.measured += 1
        if len(counts) == len(images_of(sample, sampling is not None)):
            _measure_text(report, [token == image_token for token in to_ids(sample, index)], counts)
    return report


def exact_grid(sample: Mapping, folder: str, processor: NativeImageProcessor) -> tuple[int, int] | None:
    """Frames and patches per side of the images, or of the mosaics, of a sample with positions for squares."""
    if selector_of(sample):
        budget = processor.settings.video_max_patches or DEFAULT_PATCHES
        return MOSAICS, mosaic_side(budget, budget)
    given, images = sample.get(POSITIONS), images_of(sample, False)
    if not isinstance(given, str) or not images:
        return None
    side = square_side(len(read_array(os.path.join(folder, given))), len(images))
    return None if side is None else (1, side)


def _measure_one(
    report: TokenReport,
    file: str,
    is_image: bool,
    processor: NativeImageProcessor,
    layout: TokenLayout,
    sampling: Mapping[str, object] | None,
    exact: tuple[int, int] | None = None,
) -> int:
    """Visual tokens of a file; ``exact``: its frames and patches per side, where positions tell.

    Raises what the reader raises for one that it cannot read.
    """
    if exact is not None:
        frames, side = exact
        merge = processor.rule.merge
        count = token_count((frames, side // merge[0], side // merge[1]), not is_image, layout)
        report.patches.append(side * side)
        report.tokens.append(count)
        return count
    if is_image:
        (width, height), frames, bound = read_size(file, processor.image_reading.exif), 1, None
    else:
        width, height, frames = probe_clip(file, **sampling)
        bound = processor.settings.frame_patches(frames)
    rule = processor.rule
    rows, columns = rule.grid(width, height, bound)
    if layout.clips and not is_image:
        frames = -(-frames // processor.frames_per_patch)
    count = token_count((frames, *rule.tokens(width, height, bound)), not is_image, layout)
    report.patches.append(rows * columns)
    report.tokens.append(count)
    times = rule.scaling(width, height, bound)
    if times is not None and times > 1:
        report.reduced += 1
        report.worst = sorted([*report.worst, (times, file)], reverse=True)[:WORST]
    report.enlarged += times is not None and times <= 1
    return count


def over_the_bound(count: int, worst: Iterable[tuple[float, str]]) -> str:
    """For a log: how many images ``mm_packing_max_patches`` reduces; ``worst``: as :class:`TokenReport` has them."""
    named = ", ".join(f"{name} to 1/{times:.3g} of its pixels" for times, name in worst)
    return f"over mm_packing_max_patches: {count} images, most of all {named}"


def _measure_text(report: TokenReport, places: Sequence[bool], counts: Sequence[int]) -> None:
    """A sequence: which of its tokens stand for an image, and the visual tokens of each."""
    counts = counts if any(places) else []
    report.lengths.append(len(places) - len(counts) + sum(counts))
    if cut := cut_tokens(places, counts, report.limit)[1]:
        report.cut = (report.cut[0] + 1, report.cut[1] + cut)


def _spread(values: Sequence[int]) -> str:
    ordered = sorted(values)
    return f"{ordered[0]} to {ordered[-1]}, median {ordered[len(ordered) // 2]}, {sum(ordered)} in all"


def _histogram(values: Iterable[int]) -> list[str]:
    """A bar for each power of two."""
    bins: dict[int, int] = {}
    for value in values:
        bins[value.bit_length()] = bins.get(value.bit_length(), 0) + 1
    most = max(bins.values())
    return [
        f"  {2 ** (bits - 1):>6} to {2**bits - 1:>6}  {'#' * max(1, BAR * count // most)} {count}"
        for bits, count in sorted(bins.items())
    ]
