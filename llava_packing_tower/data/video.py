"""Frames of a video file, sampled as LLaVA samples them, with their places in the video."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np

from .images import EXHAUSTED, UnreadableImage, check_file, read_size

FRAMES, FRAMES_TAKEN = "shareVideoGPTV", 10
"""In whose path LLaVA-NeXT takes a folder for a video, and how many of its frames (in places evenly spread)."""


class Clip(NamedTuple):
    """Sampled frames: uint8 ``[T, H, W, 3]``, their indices in the video, its frame count and its frames per second."""

    frames: np.ndarray
    indices: list[int]
    total: int
    fps: float


def sample_indices(total: int, fps: float, wanted_fps: float, upbound: int, force: bool) -> list[int]:
    """Which frames LLaVA-NeXT takes: ``wanted_fps`` a second; if these are more than ``upbound`` (0: no bound), or with
    ``force``, that many evenly spaced ones, the first and the last among them."""
    step = max(1, round(fps / wanted_fps))
    indices = range(0, total, step)
    if upbound > 0 and (len(indices) > upbound or force):
        return np.linspace(0, total - 1, upbound, dtype=int).tolist()
    return list(indices)


def read_clip(file: str, wanted_fps: float = 1, upbound: int = 0, force: bool = False) -> Clip:
    """Read the sampled frames of a video with decord, or with PyAV where decord is not installed.

    Raises ``UnreadableImage`` for a file without a frame that can be decoded, ``ValueError`` where neither library is
    installed.
    """
    readers: dict[str, Any] = {"decord": _Decord, "av": _PyAV}
    reader = next((read for name, read in readers.items() if find_spec(name)), None)
    if reader is None:
        raise ValueError(f"reading {file} needs PyAV or decord: pip install av")
    check_video(file)
    with video_errors(file), reader(file) as video:
        indices = sample_indices(video.total, video.fps, wanted_fps, upbound, force)
        clip = Clip(np.stack(video.take(indices)), indices, video.total, video.fps)
    return clip


def has_reader() -> bool:
    """Whether a library that reads videos is installed."""
    return any(map(find_spec, ("decord", "av")))


def check_video(file: str) -> None:
    """Raises ``UnreadableImage`` for what is neither a regular file nor a folder with frames in it."""
    if not os.path.isdir(file):
        check_file(file)
    elif not os.listdir(file):
        raise UnreadableImage(f"{file} cannot be read as a video: the folder is empty", file)


@contextmanager
def video_errors(file: str) -> Iterator[None]:
    """What decoders raise for a damaged file, as ``UnreadableImage`` that names it."""
    try:
        with _decord_errors():
            yield
    except UnreadableImage:
        raise
    except Exception as error:  # FFmpeg's are of twenty classes, and PyAV stumbles over streams without a decoder
        # A lack of memory that FFmpeg reports is that of a damaged header, which claims enormous frames.
        by_header = isinstance(error, MemoryError) and type(error).__module__.startswith("av.")
        if not by_header and (isinstance(error, MemoryError) or getattr(error, "errno", None) in EXHAUSTED):
            raise
        told = isinstance(error, OSError | ValueError | RuntimeError)
        reason = str(error) if told else f"{type(error).__name__}: {error}"
        raise UnreadableImage(f"{file} cannot be read as a video: {reason}", file) from error


def probe_clip(file: str, wanted_fps: float = 1, upbound: int = 0, force: bool = False) -> tuple[int, int, int]:
    """Width, height and number of the frames that :func:`read_clip` would read, from the header alone where it can; or,
    of a folder with frames, those that LLaVA-NeXT reads by itself.

    Raises ``ValueError`` as :func:`read_clip` does.
    """
    check_video(file)
    if FRAMES in file and os.path.isdir(file):
        return *read_size(first_frame(file)), upbound if force else FRAMES_TAKEN
    if find_spec("av"):
        import av

        with video_errors(file), av.open(file) as container:
            stream = container.streams.video[0]
            rate = float(stream.average_rate or 1)
            total = stream.frames or round(float(container.duration or 0) / av.time_base * rate) or 1
            total = min(total, os.path.getsize(file))  # a damaged header may claim any number
            found = stream.width, stream.height, len(sample_indices(total, rate, wanted_fps, upbound, force))
        if found[0] and found[1]:
            return found
    clip = read_clip(file, wanted_fps, upbound, force)
    return clip.frames.shape[2], clip.frames.shape[1], len(clip.indices)


def first_frame(folder: str) -> str:
    """The first of a folder's files, in the order of their names; ``UnreadableImage`` where there is none."""
    files = sorted(entry.path for entry in os.scandir(folder) if entry.is_file())
    if not files:
        raise UnreadableImage(f"{folder} cannot be read as a video: no files are in it", folder)
    return files[0]


class _PyAV:
    """A video through PyAV, decoded from its start: seeking is not exact in every container."""

    def __init__(self, file: str) -> None:
        import av

        self.container = av.open(file)
        if not self.container.streams.video:
            raise ValueError("it has no video stream")
        self.stream = self.container.streams.video[0]
        self.stream.thread_type = "AUTO"
        # The header may be wrong, and some containers have no count at all.
        self.total = sum(1 for _ in self._decoded())
        if self.total == 0:
            raise ValueError("no frame can be decoded")
        rate = self.stream.average_rate
        self.fps = float(rate) if rate else 1.0

    def __enter__(self) -> _PyAV:
        return self

    def __exit__(self, *_: object) -> None:
        self.container.close()

    def _decoded(self) -> Iterator:
        self.container.seek(0)
        yield from self.container.decode(self.stream)

    def take(self, indices: Sequence[int]) -> list[np.ndarray]:
        wanted, found = set(indices), {}
        for index, frame in enumerate(self._decoded()):
            if index in wanted:
                found[index] = frame.to_ndarray(format="rgb24")
        return [found[index] for index in indices]


def check_frame_count(file: str) -> None:
    """Raises ``ValueError`` for a header that claims more frames than the file has bytes: decord allocates for all of
    them, and where it cannot, it ends the process. (Where PyAV is not installed nothing is checked.)"""
    if not find_spec("av"):
        return
    import av

    with av.open(file) as container:
        for stream in container.streams.video:
            if stream.frames > (size := os.path.getsize(file)):
                raise ValueError(f"its header claims {stream.frames} frames, and it has {size} bytes")


class _Decord:
    """A video through decord."""

    def __init__(self, file: str) -> None:
        import decord

        check_frame_count(file)
        self.video = decord.VideoReader(file, ctx=decord.cpu(0), num_threads=1)
        self.total, self.fps = len(self.video), float(self.video.get_avg_fps())

    def __enter__(self) -> _Decord:
        return self

    def __exit__(self, *_: object) -> None:
        del self.video

    def take(self, indices: Sequence[int]) -> list[np.ndarray]:
        return list(self.video.get_batch(list(indices)).asnumpy())


@contextmanager
def _decord_errors() -> Iterator[None]:
    """decord's own errors, which are plain ``Exception``, as ``ValueError``."""
    if not find_spec("decord"):
        yield
        return
    from decord import DECORDError

    try:
        yield
    except DECORDError as error:
        raise ValueError(str(error).strip().splitlines()[0]) from error
