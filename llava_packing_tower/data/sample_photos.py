"""The photographs of the demo, and the LLaVA training file made of them. Nothing is downloaded."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple


class Photo(NamedTuple):
    """A photograph inside an installed package, and the one word that is the right answer to QUESTION."""

    package: str
    file: str
    answer: str

    @property
    def name(self) -> str:
        return Path(self.file).name


PHOTOS: tuple[Photo, ...] = (
    Photo("skimage", "data/astronaut.png", "astronaut"),
    Photo("skimage", "data/camera.png", "photographer"),
    Photo("skimage", "data/cell.png", "cell"),
    Photo("skimage", "data/chelsea.png", "cat"),
    Photo("skimage", "data/coffee.png", "coffee"),
    Photo("skimage", "data/coins.png", "coins"),
    Photo("skimage", "data/hubble_deep_field.jpg", "galaxies"),
    Photo("skimage", "data/ihc.png", "tissue"),
    Photo("skimage", "data/moon.png", "moon"),
    Photo("skimage", "data/motorcycle_left.png", "motorcycle"),
    Photo("skimage", "data/page.png", "page"),
    Photo("skimage", "data/retina.jpg", "retina"),
    Photo("skimage", "data/rocket.jpg", "rocket"),
    Photo("skimage", "data/text.png", "handwriting"),
    Photo("sklearn", "datasets/images/china.jpg", "temple"),
    Photo("sklearn", "datasets/images/flower.jpg", "flower"),
)


def source_of(photo: Photo) -> Path:
    """The file inside the installed package; the package is not imported.

    Raises ``FileNotFoundError`` if the package is not installed or does not carry the file.
    """
    spec = find_spec(photo.package)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            f"the photographs of the demo come with scikit-image and scikit-learn, but {photo.package} is not "
            f"installed: pip install 'llava-packing-tower[demo]'"
        )
    path = Path(spec.submodule_search_locations[0]) / photo.file
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: this version of {photo.package} does not contain {photo.name}")
    return path
