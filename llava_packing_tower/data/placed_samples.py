"""Samples that say where their patches stand: ``positions_thw``, a file or the name of a selector. No torch here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import yaml

from ..utils.files import user_path
from .codec import SELECTORS
from .images import UnreadableImage, check_file
from .samples import load_samples

POSITIONS = "positions_thw"


def selector_of(sample: Mapping) -> str | None:
    """The selector that a sample's positions and patches are made by; None for a file, or no positions.

    Raises ``ValueError`` for a selector of a sample without a video.
    """
    given = sample.get(POSITIONS)
    if given not in SELECTORS:
        return None
    if not isinstance(sample.get("video"), str) or "image" in sample:
        raise ValueError(f"sample {sample.get('id')}: {POSITIONS} {given!r} needs a video file")
    return str(given)


def read_array(file: str) -> np.ndarray:
    """The positions (frame, row, column) ``[num_patches, 3]`` of a ``.npy`` file, float32.

    Raises ``UnreadableImage`` for a damaged file, ``ValueError`` for an array of another shape, or NaN in it.
    """
    check_file(file)
    try:
        # Mapped: a header that claims more than the file holds allocates nothing.
        found = np.load(file, allow_pickle=False, mmap_mode="r")
        if not isinstance(found, np.ndarray) or found.dtype.kind not in "fiu":
            raise ValueError(f"it holds {getattr(found, 'dtype', type(found).__name__)}, not an array of numbers")
        positions = found.astype(np.float32)
    except Exception as error:  # NumPy reads the header as Python text: a damaged one raises anything at all
        raise UnreadableImage(f"{file} is no file of positions: {error or type(error).__name__}", file) from error
    if positions.ndim != 2 or positions.shape[1] != 3:
        raise ValueError(f"{file}: positions must be [num_patches, 3], got {list(positions.shape)}")
    if not np.isfinite(positions).all():
        raise ValueError(f"{file}: {int((~np.isfinite(positions)).sum())} positions are NaN or infinite")
    return positions


def square_side(positions: int, images: int) -> int | None:
    """Patches along the side of each of ``images`` square images with so many positions together; None if they are no
    squares."""
    if images == 0 or positions % images:
        return None
    side = math.isqrt(positions // images)
    return side if side > 0 and side * side * images == positions else None


def mark_datasets(data_path: str, samples: Sequence[dict]) -> None:
    """Give ``positions_thw: codec`` of a dataset in a YAML of datasets to its samples with a video.

    Raises ``ValueError`` for anything but a selector there.
    """
    path = user_path(str(data_path))
    if path.suffix not in (".yaml", ".yml") or not path.is_file():
        return
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    datasets = content.get("datasets") if isinstance(content, dict) else None
    for dataset in datasets or ():
        given = dataset.get(POSITIONS) if isinstance(dataset, dict) else None
        if given is None:
            continue
        if given not in SELECTORS:
            raise ValueError(f"{path}: {POSITIONS} of a dataset must be one of {', '.join(SELECTORS)}, got {given!r}")
        own = load_samples(user_path(dataset["json_path"]))
        names = {(str(s.get("id")), s["video"]) for s in own if isinstance(s.get("video"), str)}
        for sample in samples:
            if (str(sample.get("id")), sample.get("video")) in names and "image" not in sample:
                sample.setdefault(POSITIONS, given)


def refuse_positions(samples: Sequence[Mapping], mode: object, host: str | None = None) -> None:
    """Raises ``ValueError`` for samples with positions, which an ``image_aspect_ratio`` but native would drop, or which
    the model of a ``host`` has no argument for."""
    placed = [str(sample.get("id", index)) for index, sample in enumerate(samples) if sample.get(POSITIONS) is not None]
    if placed:
        those = f"{len(placed)} of {len(samples)} samples have {POSITIONS} (sample {placed[0]}, for example), which "
        if host is not None:
            raise ValueError(f"{those}the models of {host} have no argument for: remove them")
        raise ValueError(
            f"{those}image_aspect_ratio {mode!r} cannot use: set image_aspect_ratio to native, or remove them"
        )
