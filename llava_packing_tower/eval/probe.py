"""Towers compared without a decoder: one vector per image, then a linear and a k-nearest-neighbor classifier on them.

The vector is the mean of an image's patch features. The linear probe is a logistic regression on standardised vectors,
k-NN votes by cosine similarity, as is usual for frozen encoders (DINO, arXiv:2104.14294, section 4.1).
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from .. import __version__
from ..checkpoint.hub import resolve_path
from ..data.images import check_file, open_image
from ..data.native_config import NativeSettings
from ..models.registry import part_of
from ..towers.fused_tower import FusedPackingVisionTower
from ..towers.names import FUSED, strip_prefix, tower_kind, tower_names
from ..towers.packing_tower import HEVCViTPackingVisionTower
from ..towers.saved_tower import tower_fingerprint
from ..utils.device import resolve_device
from ..utils.files import write_aside

IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff")
SPLITS = ("train", "val")
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llava_packing_tower" / "probe"


@dataclass(frozen=True)
class Photos:
    """An image folder: files, their classes as numbers ``[N]``, the names of the classes, and which are for testing."""

    files: tuple[Path, ...]
    labels: np.ndarray
    classes: tuple[str, ...]
    is_test: np.ndarray


@dataclass(frozen=True)
class ProbeResult:
    """Accuracies in 0..1; ``patches`` is the mean per image, ``seconds`` the time of the extraction (0: cached)."""

    tower: str
    family: str
    hidden_size: int
    patches: float
    seconds: float
    linear: float
    knn: float
    tested: int


def read_folder(folder: Path, test_share: float = 0.25, seed: int = 0) -> Photos:
    """``folder/<class>/<image>``, a part of each class being held out; or ``folder/train/<class>`` and ``folder/val``.

    Raises ``ValueError`` for fewer than two classes, a class with fewer than two images, or one that is not in both
    splits.
    """
    roots = [folder / split for split in SPLITS]
    split = all(root.is_dir() for root in roots)
    found: dict[str, list[tuple[Path, bool]]] = {}
    for root, test in zip(roots if split else [folder], (False, True)):
        for path in sorted(root.rglob("*")) if root.is_dir() else ():
            if path.suffix.lower() in IMAGES and path.parent != root:
                found.setdefault(path.relative_to(root).parts[0], []).append((path, test))
    if len(found) < 2:
        raise ValueError(f"{folder} has {len(found)} classes with images; two are needed: {folder}/<class>/<image>")
    rng = np.random.default_rng(seed)
    files, labels, is_test = [], [], []
    for number, (name, entries) in enumerate(sorted(found.items())):
        if split and len({test for _, test in entries}) < 2:
            raise ValueError(f"class {name!r} is not in both of {folder}/{SPLITS[0]} and {folder}/{SPLITS[1]}")
        if len(entries) < 2:
            raise ValueError(f"class {name!r} has {len(entries)} image; two are needed, to learn from and to test")
        held_out = set(rng.permutation(len(entries))[: max(1, round(test_share * len(entries)))].tolist())
        for index, (path, test) in enumerate(entries):
            files.append(path)
            labels.append(number)
            is_test.append(test if split else index in held_out)
    return Photos(tuple(files), np.array(labels), tuple(sorted(found)), np.array(is_test))


def load_tower(
    name: str, layer: int = -1, square: bool = False, max_patches: int | None = None, min_patches: int = 16
) -> HEVCViTPackingVisionTower:
    """A tower of any family; images at their own shapes within the bounds, or (``square``) as its processor does it.

    Raises ``ValueError`` for a tower that takes images of one size only, unless ``square``.
    """
    args = SimpleNamespace(mm_vision_select_layer=layer, mm_vision_select_feature="patch", mm_projector_type="linear")
    built = FusedPackingVisionTower if tower_kind(name) == FUSED else HEVCViTPackingVisionTower
    tower = built(name, args)
    if square:
        return tower
    if getattr(tower.vision_tower, "fixed_side", None):
        raise ValueError(f"{name} takes images of one size only: add --square")
    largest = max_patches or (tower.image_size // tower.config.patch_size) ** 2
    tower.set_native(NativeSettings(min(min_patches, largest), largest, "frames"))
    return tower


def features(
    tower: HEVCViTPackingVisionTower,
    files: Sequence[Path],
    batch_size: int,
    progress: Callable[[int], None] = lambda count: None,
) -> tuple[np.ndarray, np.ndarray]:
    """Mean patch feature of each image, float32 ``[N, hidden]``, and its number of patches ``[N]``.

    Each batch is one packed pass; the next is read meanwhile. Raises ``ValueError`` with the name of an image that
    cannot be read.
    """
    vectors, counts = [], []
    for images in _batches(tower.image_processor, files, batch_size):
        with torch.inference_mode():
            tokens = tower([image.to(tower.device, tower.dtype) for image in images])
        vectors += [each.float().mean(0).cpu().numpy() for each in tokens]
        counts += [len(each) for each in tokens]
        progress(len(images))
    return np.stack(vectors), np.array(counts)


def _batches(processor: object, files: Sequence[Path], size: int) -> Iterator[list[torch.Tensor]]:
    def read(path: Path) -> torch.Tensor:
        image = open_image(path, processor.image_reading)
        try:
            return processor.preprocess(image, return_tensors="pt")["pixel_values"][0]
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    parts = [files[i : i + size] for i in range(0, len(files), size)]
    with ThreadPoolExecutor(max_workers=4) as workers:
        ahead = [workers.submit(read, path) for path in parts[0]]
        for following in [*parts[1:], []]:
            now, ahead = ahead, [workers.submit(read, path) for path in following]
            yield [future.result() for future in now]


def cached_features(
    name: str,
    photos: Photos,
    options: dict,
    cache: Path,
    batch_size: int = 32,
    device: str | None = None,
    progress: Callable[[int], None] = lambda count: None,
) -> tuple[dict, np.ndarray, np.ndarray, float]:
    """Facts about the tower, features, patch counts and seconds; from the cache where tower, images and options agree.

    The key holds every byte of the tower's files, and path, size and time of change of every image.
    """
    where = resolve_device(device)
    dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
    for image in photos.files:
        check_file(image)
    images = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in photos.files]
    weights = [tower_fingerprint(resolve_path(strip_prefix(own), part=part_of)) for own in tower_names(name)]
    content = json.dumps([weights, images, options, str(dtype), __version__], sort_keys=True)
    file = cache / f"{hashlib.sha256(content.encode()).hexdigest()[:32]}.npz"
    if file.is_file():
        cached = _cached(file)
        progress(len(photos.files))
        return *cached, 0.0
    tower = load_tower(name, **options).to(device=where, dtype=dtype)
    facts = {"family": tower.config.model_type, "hidden_size": tower.hidden_size}
    mark = time.monotonic()
    found, patches = features(tower, photos.files, batch_size, progress)
    seconds = time.monotonic() - mark
    arrays = {"facts": np.array(json.dumps(facts)), "features": found, "patches": patches}
    write_aside(file, partial(_save, arrays=arrays))
    return facts, found, patches, seconds


def _save(path: Path, arrays: dict[str, np.ndarray]) -> None:
    made = io.BytesIO()  # NumPy's own file prints a traceback on a full disk
    np.savez(made, **arrays)
    path.write_bytes(made.getbuffer())


def _cached(file: Path) -> tuple[dict, np.ndarray, np.ndarray]:
    """Facts, features and patch counts. Raises ``ValueError`` for a damaged file."""
    try:
        with np.load(file, allow_pickle=False) as saved:
            facts, found, patches = json.loads(str(saved["facts"])), saved["features"], saved["patches"]
        if not np.isfinite(found).all() or len(found) != len(patches):
            raise ValueError("its features are no numbers")
    except Exception as error:  # NumPy and zipfile raise anything at all for a damaged file
        raise ValueError(f"{file}: these cached features are damaged, remove them: {error}") from error
    return facts, found, patches


def classify(vectors: np.ndarray, photos: Photos, k: int = 20, strength: float = 1.0) -> tuple[float, float]:
    """Accuracy on the held-out images of a logistic regression and of the ``k`` nearest neighbors.

    strength: inverse of the L2 regularization. Needs scikit-learn.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    train, test = ~photos.is_test, photos.is_test
    linear = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=2000))
    linear.fit(vectors[train], photos.labels[train])
    nearest = KNeighborsClassifier(min(k, int(train.sum())), metric="cosine", weights="distance")
    nearest.fit(vectors[train], photos.labels[train])
    return (
        float(linear.score(vectors[test], photos.labels[test])),
        float(nearest.score(vectors[test], photos.labels[test])),
    )


def probe(
    name: str,
    photos: Photos,
    options: dict,
    cache: Path = CACHE,
    k: int = 20,
    strength: float = 1.0,
    **extraction: object,
) -> ProbeResult:
    """Extract (or take from the cache) and classify; see :func:`cached_features` and :func:`classify`."""
    facts, vectors, patches, seconds = cached_features(name, photos, options, cache, **extraction)
    linear, knn = classify(vectors, photos, k, strength)
    return ProbeResult(
        name,
        facts["family"],
        facts["hidden_size"],
        float(patches.mean()),
        seconds,
        linear,
        knn,
        int(photos.is_test.sum()),
    )
