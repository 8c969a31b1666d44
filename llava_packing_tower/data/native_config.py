"""The configuration of native resolution: keys, checks, defaults. No torch: the launcher reads them first."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .smart_resize import CHECKPOINT, MERGE_NAMES, check_bounds, known_merge, merge_of

NATIVE = "native"
"""The value of ``image_aspect_ratio`` that asks for all this."""
PREFIX = "mm_packing_"
KEYS = ("min_patches", "max_patches", "video", "video_max_patches")
VIDEO_MODES = ("clip", "frames")
MERGE_TYPES = ("flat", "spatial", "spatial_unpad")
NEWLINES = ("grid", "frame", "one_token", "no_token")
POOL_MODES = ("average", "max", "bilinear")
DEFAULT_MIN_PATCHES = 16
# Projectors that treat every token alone: they do not ask where in the image it was.
POINTWISE = re.compile(r"^(linear|identity|mlp\d+x_gelu|mlp\d+x_res\d+x_gelu)$")


@dataclass(frozen=True)
class NativeSettings:
    """The settings of a model at native resolution; in a checkpoint's config under ``mm_packing_<name>``.

    min_patches, max_patches: bounds for the patches of one image or frame. video: "clip" (all frames see each other)
    or "frames". video_max_patches: bound for all frames of a video together, None for none.
    """

    min_patches: int
    max_patches: int
    video: str
    video_max_patches: int | None = None

    def items(self) -> dict[str, object]:
        """The settings under their names in a checkpoint's config."""
        return {PREFIX + name: getattr(self, name) for name in KEYS}

    def frame_patches(self, frames: int) -> int:
        """The most patches per frame of a video with this many frames."""
        if self.video_max_patches is None:
            return self.max_patches
        return max(1, min(self.max_patches, self.video_max_patches // frames))


def asks_for_native(args: object) -> bool:
    """Whether a model config or data arguments have ``image_aspect_ratio: native``."""
    return getattr(args, "image_aspect_ratio", None) == NATIVE


def settings_of(args: object) -> NativeSettings | None:
    """The settings in a checkpoint's config; None where it is not one of native resolution.

    Raises ``ValueError`` where one is missing: a guess could differ from what the model was trained with.
    """
    if not asks_for_native(args):
        return None
    values: dict[str, Any] = {name: getattr(args, PREFIX + name, None) for name in KEYS}
    for name in ("min_patches", "max_patches", "video"):
        if values[name] is None:
            raise ValueError(f"the config has image_aspect_ratio {NATIVE!r}, but no {PREFIX}{name}")
    settings = NativeSettings(**values)
    check_settings(settings.items())
    return settings


def make_settings(
    args: object, earlier: object, nominal_patches: int, image_only: bool, merge: tuple[int, int] | None = None
) -> NativeSettings:
    """The settings for a training run: from its arguments, else those of the checkpoint it starts from, else defaults.

    Args:
        args: model arguments. earlier: config of the model that is trained further.
        nominal_patches: patches of the tower's nominal image, the default of ``max_patches``.
        image_only: whether the tower knows no time, so that "frames" is the default for videos and "clip" an error.
        merge: rows and columns of patches that become a token (default: what the name of the projector says).

    Raises:
        ValueError: bounds that contradict each other or cannot be merged, an unknown value, "clip" for such a tower.
    """
    values: dict[str, Any] = {
        name: next((v for v in (getattr(a, PREFIX + name, None) for a in (args, earlier)) if v is not None), None)
        for name in KEYS
    }
    merge = merge or merge_of(getattr(args, "mm_projector_type", None))
    if values["max_patches"] is None:
        values["max_patches"] = max(nominal_patches, merge[0] * merge[1])
    if values["min_patches"] is None:
        values["min_patches"] = min(DEFAULT_MIN_PATCHES, values["max_patches"])
    values["video"] = values["video"] or ("frames" if image_only else "clip")
    settings = NativeSettings(**values)
    check_settings(settings.items())
    check_bounds(settings.min_patches, settings.max_patches, merge)
    if settings.video == "clip" and image_only:
        raise ValueError("mm_packing_video is 'clip', but this tower takes single images only: use 'frames'")
    return settings


def check_settings(values: Mapping[str, Any]) -> None:
    """Check what can be checked without a model.

    ``values`` holds some of the keys above, ``mm_projector_type``, ``mm_patch_merge_type`` and the options for videos.
    Raises ``ValueError`` for a value that native resolution cannot carry out.
    """
    smallest, largest = (values.get(PREFIX + name) for name in ("min_patches", "max_patches"))
    check_bounds(
        1 if smallest is None else smallest,
        1 << 30 if largest is None else largest,
        merge_of(str(values.get("mm_projector_type") or "")),
    )
    if (together := values.get(PREFIX + "video_max_patches")) is not None:
        check_bounds(1, together)
    projector = str(values.get("mm_projector_type") or "linear")
    if projector != CHECKPOINT and known_merge(projector) is None and not POINTWISE.match(projector):
        raise ValueError(
            f"mm_projector_type {projector!r} does not work on images of any size; these do: linear, mlp2x_gelu, "
            f"{', '.join(MERGE_NAMES)}, {CHECKPOINT}"
        )
    for name, allowed in (
        (PREFIX + "video", VIDEO_MODES),
        ("mm_patch_merge_type", MERGE_TYPES),
        ("mm_newline_position", NEWLINES),
        ("mm_spatial_pool_mode", POOL_MODES),
    ):
        if (value := values.get(name)) is not None and value not in allowed:
            raise ValueError(f"{name} is {value!r}; at native resolution it is one of {', '.join(allowed)}")
    if values.get("add_faster_video"):
        raise ValueError("add_faster_video is not available at native resolution")
