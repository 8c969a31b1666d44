"""A video as the patches in which something happens, packed into mosaics, with the place of each patch.

What happens where is read from the compressed file: motion vectors, and the bytes of each packet, which are shared
among the parts of a frame by how much they changed. After the idea of OneVision-Encoder's codec data (positions over
64 frames, whole blocks of 2 x 2 patches, the first frame in full); the selection is our own and needs only PyAV. With
the package codec-video-prep, its selection is taken instead (:func:`by_codec_video_prep`). No torch here.
"""

from __future__ import annotations

import math
import shutil
import subprocess
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from .images import UnreadableImage, open_image
from .video import check_video, video_errors

CODEC, CODEC_VIDEO_PREP = "codec", "codec-video-prep"
"""What ``positions_thw`` may say in place of a file: this module's selection, or that of the package."""
SELECTORS = (CODEC, CODEC_VIDEO_PREP)
CONTEXT = 64
"""Frames that positions count through, and the most that are looked at."""
MOSAICS = 8
BLOCK = 2
"""Side in patches of what is kept together: a projector that merges 2 x 2 patches merges neighbors."""
DEFAULT_PATCHES = MOSAICS * 36 * 36
_SAMPLES = 8  # gray samples along the side of a patch, where change is measured


class CodecClip(NamedTuple):
    """mosaics: uint8 ``[M, H, W, 3]``. positions: float32 ``[M * h * w, 3]``, (frame of 64, row, column) of each patch
    of the mosaics, row by row. indices: the frames that were looked at; total and fps: of the video."""

    mosaics: np.ndarray
    positions: np.ndarray
    indices: list[int]
    total: int
    fps: float


def places_of(indices: np.ndarray, total: int) -> np.ndarray:
    """Where frames stand among 64: ``rint(index / (total - 1) * 63)``, as LlavaViT was trained."""
    return np.rint(np.asarray(indices, dtype=np.float32) / max(total - 1, 1) * (CONTEXT - 1))


def mosaic_side(budget: int, candidates: int) -> int:
    """Side in patches of each of the 8 mosaics: what ``budget`` patches allow and ``candidates`` fill, in whole blocks.

    Raises ``ValueError`` for less than a block in each.
    """
    side = math.isqrt(min(budget, candidates) // MOSAICS) // BLOCK * BLOCK
    if side == 0:
        raise ValueError(f"{budget} patches for a video are fewer than {MOSAICS} blocks of {BLOCK} x {BLOCK}")
    return side


def codec_clip(file: str, patch_size: int, budget: int = DEFAULT_PATCHES, selector: str = CODEC) -> CodecClip:
    """The patches of a video in which something happens.

    Up to 64 evenly spaced frames are looked at. Of the first, every patch is kept; of the others, the blocks that
    score highest, as many as fill the mosaics.

    Args:
        file: a video that PyAV reads.
        patch_size: side of a patch in pixels.
        budget: the most patches that are kept.
        selector: one of ``SELECTORS``.

    Raises:
        UnreadableImage: a file that cannot be read. ValueError: PyAV or the package is missing, or the budget too
            small.
    """
    if selector not in SELECTORS:
        raise ValueError(f"positions_thw must be a file or one of {', '.join(SELECTORS)}, got {selector!r}")
    package = {CODEC: "av", CODEC_VIDEO_PREP: "codec_video_prep"}[selector]
    if not find_spec(package):
        raise ValueError(f"positions_thw {selector!r} needs a package: pip install {package.replace('_', '-')}")
    check_video(file)
    if selector == CODEC_VIDEO_PREP:
        return by_codec_video_prep(file, patch_size, budget)
    with video_errors(file):
        scan = _scan(file, patch_size, budget)
    return _packed(*scan, patch_size)


# ---------------------------------------------------------------- reading


class _Frames(NamedTuple):
    """pixels: ``[T, h * patch, w * patch, 3]``; scores: ``[T, h / 2, w / 2]``; offset: first row and column."""

    pixels: np.ndarray
    scores: np.ndarray
    offset: tuple[int, int]


def _scan(file: str, patch_size: int, budget: int) -> tuple[_Frames, list[int], int, float, int]:
    import av
    from av.codec.context import Flags2

    with av.open(file) as container:
        if not container.streams.video:
            raise ValueError("it has no video stream")
        sizes = {packet.pts: packet.size for packet in container.demux(video=0) if packet.size}
    total = len(sizes)
    while True:  # a second time where packets do not decode
        indices = np.unique(np.linspace(0, max(total - 1, 0), min(total, CONTEXT), dtype=int)).tolist()
        with av.open(file) as container:
            stream = container.streams.video[0]
            stream.codec_context.flags2 |= Flags2.export_mvs
            width, height = stream.codec_context.width, stream.codec_context.height
            whole = mosaic_side(budget, budget)
            rows, columns = _grid(width, height, whole)
            frames: list[tuple[np.ndarray, np.ndarray]] = []
            bytes_between: list[int] = []
            decoded = passed = 0
            for number, frame in enumerate(container.decode(stream)):
                decoded = number + 1
                passed += sizes.get(frame.pts, 0)
                if len(frames) < len(indices) and number == indices[len(frames)]:
                    vectors: Any = frame.side_data.get("MOTION_VECTORS")
                    motion = _motion(vectors and vectors.to_ndarray(), frame, rows, columns)
                    frames.append((_picture(frame, rows, columns, patch_size), motion))
                    bytes_between.append(passed)
                    passed = 0
            rate = stream.average_rate
        if decoded == 0:
            raise ValueError("no frame can be decoded")
        if decoded == total:
            break
        total = decoded
    pixels = np.stack([picture for picture, _ in frames])
    scores = _scores(pixels, np.stack([motion for _, motion in frames]), np.array(bytes_between, float), patch_size)
    offset = ((whole - rows) // 2, (whole - columns) // 2)
    side = mosaic_side(budget, len(indices) * rows * columns)
    return _Frames(pixels, scores, offset), indices, total, float(rate) if rate else 1.0, side


def _grid(width: int, height: int, side: int) -> tuple[int, int]:
    """Rows and columns of a frame whose longer side has ``side`` patches, in whole blocks."""
    scale = side / max(width, height)
    return tuple(max(round(length * scale / BLOCK), 1) * BLOCK for length in (height, width))  # type: ignore[return-value]


def _picture(frame: Any, rows: int, columns: int, patch_size: int) -> np.ndarray:
    picture = frame.to_image().resize((columns * patch_size, rows * patch_size), Image.Resampling.BICUBIC)
    return np.asarray(picture.convert("RGB"))


def _motion(vectors: np.ndarray | None, frame: Any, rows: int, columns: int) -> np.ndarray:
    """Motion of each block beyond that of the whole picture, ``[rows / 2, columns / 2]``: length times area, where it
    is more than twice what half of the vectors have."""
    found = np.zeros((rows // BLOCK, columns // BLOCK))
    if vectors is None or not len(vectors):
        return found
    scale = np.maximum(vectors["motion_scale"], 1)
    moved = np.stack([vectors["motion_y"] / scale, vectors["motion_x"] / scale], axis=1)
    length = np.linalg.norm(moved - np.median(moved, axis=0), axis=1)
    length = np.maximum(length - 2 * np.median(length), 0) * vectors["w"] * vectors["h"]
    row = np.clip(vectors["dst_y"] * found.shape[0] // frame.height, 0, found.shape[0] - 1)
    column = np.clip(vectors["dst_x"] * found.shape[1] // frame.width, 0, found.shape[1] - 1)
    np.add.at(found, (row, column), length)
    return found


def _scores(pixels: np.ndarray, motion: np.ndarray, sizes: np.ndarray, patch_size: int) -> np.ndarray:
    """The score of each block ``[T, rows / 2, columns / 2]``: the bytes of the frames since the last one, shared by
    change, and motion; each in units of its mean. Of the bytes the square root: a frame that is coded without others
    has many, and would take all patches."""
    unit = max(patch_size // _SAMPLES, 1)
    gray = pixels[:, ::unit, ::unit].astype(np.float32).mean(axis=3)
    change = np.abs(np.diff(gray, axis=0, prepend=gray[:1]))
    block = BLOCK * patch_size
    rows, columns = pixels.shape[1] // block, pixels.shape[2] // block
    row_of = np.arange(gray.shape[1]) * unit // block
    column_of = np.arange(gray.shape[2]) * unit // block
    per_row = np.add.reduceat(change, np.searchsorted(row_of, np.arange(rows)), axis=1)
    shared = np.add.reduceat(per_row, np.searchsorted(column_of, np.arange(columns)), axis=2)
    # What half of all blocks exceed is the noise of the camera, or a change of light.
    shared = np.maximum(shared - np.median(shared, axis=(1, 2), keepdims=True), 0)
    whole = shared.sum(axis=(1, 2), keepdims=True)
    cost = np.divide(shared, whole, out=np.zeros_like(shared), where=whole > 0) * np.sqrt(sizes)[:, None, None]
    return sum(part / mean if (mean := part.mean()) > 0 else part for part in (cost, motion))  # type: ignore[return-value]


# ---------------------------------------------------------------- packing


def _packed(frames: _Frames, indices: list[int], total: int, fps: float, side: int, patch_size: int) -> CodecClip:
    count, rows, columns = frames.scores.shape
    blocks = (side // BLOCK) ** 2 * MOSAICS
    scores = frames.scores.copy()
    scores[0] = np.inf
    order = np.argsort(-scores.reshape(-1), kind="stable")[:blocks]
    kept = np.sort(order)  # in the order of time, rows and columns
    length, across = BLOCK * patch_size, side // BLOCK
    cut = frames.pixels.reshape(count, rows, length, columns, length, 3).swapaxes(2, 3)
    chosen = cut.reshape(-1, length, length, 3)[kept].reshape(MOSAICS, across, across, length, length, 3)
    mosaics = chosen.swapaxes(2, 3).reshape(MOSAICS, across * length, across * length, 3)
    time, row, column = np.unravel_index(kept, (count, rows, columns))
    where = np.zeros((len(kept), BLOCK, BLOCK, 3), np.float32)
    inside = np.arange(BLOCK)
    where[..., 0] = places_of(np.array(indices), total)[time][:, None, None]
    where[..., 1] = frames.offset[0] + row[:, None, None] * BLOCK + inside[:, None]
    where[..., 2] = frames.offset[1] + column[:, None, None] * BLOCK + inside
    where = where.reshape(MOSAICS, across, across, BLOCK, BLOCK, 3).swapaxes(2, 3)
    return CodecClip(np.ascontiguousarray(mosaics), where.reshape(-1, 3), indices, total, fps)


# ---------------------------------------------------------------- codec-video-prep


def by_codec_video_prep(file: str, patch_size: int, budget: int) -> CodecClip:
    """The canvases of the package codec-video-prep (0.2.5), which also needs ffprobe: one group of 64 frames.

    Canvases have the shape of the video's frames. Raises ``UnreadableImage`` for a file that the package cannot read,
    or other positions than patches; ``ValueError`` without ffprobe.
    """
    if shutil.which("ffprobe") is None:
        raise ValueError(f"positions_thw {CODEC_VIDEO_PREP!r} needs the program ffprobe, which is not in the path")
    from codec_video_prep import run_preinfer  # type: ignore[import-not-found]

    side = mosaic_side(budget, budget) * patch_size
    with tempfile.TemporaryDirectory() as folder:
        try:
            made = run_preinfer(
                video=file,
                out_dir=folder,
                num_sampled_frames=CONTEXT,
                grouping_mode="fixed",
                group_size=CONTEXT,
                images_per_group=MOSAICS,
                patch=patch_size,
                max_pixels=side * side,
                canvas_format="png",
            )
            canvases = [np.asarray(open_image(Path(folder) / name)) for name in made.canvas_files]
            positions = np.load(Path(folder) / "src_patch_position.npy", allow_pickle=False).astype(np.float32)
        except (OSError, RuntimeError, ValueError, subprocess.SubprocessError) as error:
            raise UnreadableImage(f"{file} cannot be read by codec-video-prep: {error}", file) from error
    mosaics = np.stack(canvases)
    patches = mosaics.shape[1] * mosaics.shape[2] // patch_size**2
    positions = positions.reshape(-1, 3)
    if len(positions) != len(mosaics) * patches:
        raise UnreadableImage(
            f"{file}: codec-video-prep made {len(mosaics)} canvases of {patches} patches, but "
            f"{len(positions)} positions",
            file,
        )
    there = (positions[:, 0] >= 0).reshape(len(mosaics), patches).all(axis=1)  # canvases that only fill up are left out
    positions = positions.reshape(len(mosaics), patches, 3)[there].reshape(-1, 3)
    frames = made.summary.get("total_frames") or int(positions[:, 0].max()) + 1
    indices = sorted({int(value) for value in positions[:, 0]})
    positions[:, 0] = places_of(positions[:, 0], frames)
    return CodecClip(mosaics[there], positions, indices, frames, float(made.summary.get("fps") or 1.0))
