"""A dataset before training: its samples, and its image and video files (headers of some, or all of every file)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

from .images import NATIVE, ImageReading, UnreadableImage, check_header, open_image, read_size
from .samples import (
    LOOKED_FOR,
    NAMED,
    check_pairs,
    check_places,
    check_turns,
    data_files,
    images_of,
    load_samples,
    refuse,
    spread_indices,
)
from .video import check_video, has_reader, read_clip

TOGETHER = 1024
"""Files that are handed out to the threads at a time."""


class MediaFile(NamedTuple):
    """A file of a sample, and what the sample is called."""

    sample: str
    path: str
    is_image: bool


@dataclass
class MediaCheck:
    """How the files of a dataset are checked, and what was found.

    Args:
        folders: what the files under "image" and "video" are relative to; None: samples must have none of them.
        reads_videos: whether the host reads videos.
        reading, native: how images are read, and whether they keep their shapes.
        all_of_it: read every file from its beginning to its end; else the headers of LOOKED_FOR samples.
        strict: an unreadable file is an error. Otherwise its samples are left out in training, unless most of the
            checked files cannot be read.
        progress: called with the number of files that have been checked, and the number of all.
    """

    folders: Mapping[str, str | None]
    reads_videos: bool
    reading: ImageReading = field(default_factory=ImageReading)
    native: bool = False
    all_of_it: bool = False
    strict: bool = False
    progress: Callable[[int, int], None] = lambda done, count: None
    looked_at: int = 0
    unreadable: list[str] = field(default_factory=list)

    def look(self, samples: Sequence[Mapping]) -> None:
        """Raises ``ValueError`` for samples that name no file, or one without its folder."""
        indices = range(len(samples)) if self.all_of_it else spread_indices(len(samples), LOOKED_FOR)
        files: list[MediaFile] = []
        nameless: list[str] = []
        for index in indices:
            name = f"sample {samples[index].get('id', index)}"
            kind = "image" if samples[index].get("image") else "video"
            folder = os.path.expanduser(self.folders.get(kind, "") or "")
            for path in images_of(samples[index], self.reads_videos):
                if self.folders.get(kind, "") is None:  # LLaVA joins it with the name, also with an absolute one
                    raise ValueError(f"{kind}_folder is missing (/ for absolute names), and {name} has {path!r:.80}")
                if isinstance(path, str):
                    files.append(MediaFile(name, os.path.join(folder, path), kind == "image"))
                else:
                    nameless.append(f"{name}: an image is named {path!r}")
        refuse(f"{len(nameless)} samples name no file", nameless)
        for reason in self._reasons(files):
            self.looked_at += 1
            if reason is not None:
                self.unreadable.append(reason)

    def _reasons(self, files: Sequence[MediaFile]) -> Iterator[str | None]:
        """For each file why it cannot be read, or None."""
        if not self.all_of_it:
            yield from map(self._reason, files)
            return
        done = 0
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:  # decoders run outside of Python's lock
            for part in (files[first : first + TOGETHER] for first in range(0, len(files), TOGETHER)):
                for reason in threads.map(self._reason, part):
                    done += 1
                    self.progress(done, len(files))
                    yield reason

    def _reason(self, file: MediaFile) -> str | None:
        try:
            if not file.is_image:
                self._look_at_video(file.path)
            elif self.all_of_it:
                open_image(file.path, self.reading, NATIVE if self.native else None)
            else:
                self._look_at_header(file.path)
        except UnreadableImage as error:
            return f"{file.sample}: {error}"
        return None

    def _look_at_header(self, path: str) -> None:
        size = read_size(path)
        try:
            check_header(size, self.reading, self.native)
        except ValueError as error:
            raise UnreadableImage(f"{path} cannot be read as an image: {error}", path) from error

    def _look_at_video(self, path: str) -> None:
        check_video(path)
        if self.all_of_it and os.path.isdir(path):
            for name in sorted(os.listdir(path)):
                open_image(os.path.join(path, name), self.reading)
        elif self.all_of_it and has_reader():
            read_clip(path, upbound=1, force=True)

    def conclude(self, data_path: str) -> None:
        """Raises ``ValueError`` with the files that cannot be read, where training must not begin with them."""
        if self.strict or 2 * len(self.unreadable) > self.looked_at:
            count = len(self.unreadable)
            named = count if self.all_of_it else NAMED
            refuse(f"{data_path}: {count} files of the data cannot be read", self.unreadable, named)

    def lines(self) -> list[str]:
        """What was found, for the plan; all of it if every file was read."""
        if not self.unreadable:
            return [f"every file can be read ({self.looked_at} were)"] if self.all_of_it else []
        count = len(self.unreadable)
        shown = self.unreadable if self.all_of_it else self.unreadable[:5]
        more = [] if len(shown) == count else [f"  and {count - len(shown)} more"]
        end = "" if self.all_of_it else "; --check_images reads all files"
        return [
            f"{count} of {self.looked_at} files cannot be read: their samples are left out (--strict refuses){end}",
            *(f"  {line}" for line in shown),
            *more,
        ]


def check_data(
    data_path: str, media: MediaCheck, look: Callable[[Sequence[Mapping]], None] | None = None, pairs: bool = False
) -> int:
    """Check all samples that ``data_path`` stands for; returns how many of them are taken.

    ``look`` is called with the samples of each file, after they were found to be right. pairs: of answers, for DPO.
    Raises ``ValueError`` that names the file and the samples.
    """
    count = 0
    for entry in data_files(data_path):
        file = entry.path
        try:
            samples = load_samples(file)
        except ValueError as error:
            if str(file) == data_path:
                raise
            raise ValueError(f"{data_path}: {error}") from error
        try:
            if pairs:
                check_pairs(samples)
            else:
                check_turns(samples)
                check_places(samples, media.reads_videos)
            media.look(samples)
            if look is not None:
                look(samples)
            count += entry.taken(len(samples))
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
    media.conclude(data_path)
    return count
