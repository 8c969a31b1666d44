"""Several towers as one: ``packing:A + packing:B``. They run on one grid, and their features are joined by channel.

The grid of an image, rows x columns, is made by the first tower's rule. Each tower gets the image resized to the grid
times its own patch and normalized its own way (:mod:`..data.fused_image_processor`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from ..data.fused_image_processor import (
    CHANNELS,
    FusedImageProcessor,
    FusedNativeImageProcessor,
    canvas_part,
    check_canvas,
)
from ..data.images import reading_of
from ..data.native_config import NativeSettings, settings_of
from ..data.segments import Grid
from ..data.smart_resize import CHECKPOINT, SmartResize
from .names import CHANNEL, NAME_PREFIX, tower_names
from .packing_tower import HEVCViTPackingVisionTower
from .passes import budget_of
from .saved_tower import saved_tower, wants_loading

READ = (
    *("mm_vision_select_layer", "mm_vision_select_feature", "mm_packing_attention", "mm_packing_compile"),
    *("mm_tunable_parts", "unfreeze_mm_vision_tower", "mm_packing_background", "mm_packing_exif"),
    *("mm_packing_max_pixels", "mm_packing_max_aspect"),
)
"""Arguments that each tower reads for itself."""


class FusedConfig(PretrainedConfig):
    """What several towers are together. ``patch_size``, ``image_size`` and ``num_channels`` are those of the canvas;
    ``towers``: their model types."""

    model_type = "fused_packing"

    def __init__(
        self,
        towers: Sequence[str] = (),
        patch_size: int = 16,
        image_size: int = 224,
        num_channels: int = 6,
        hidden_size: int = 0,
        num_hidden_layers: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.towers = list(towers)
        self.patch_size = patch_size
        self.image_size = image_size
        self.num_channels = num_channels
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers


class FusedModel(nn.Module):
    """The encoders of several towers, as one module that is trained, moved and saved."""

    image_only, takes_positions, stretches_clips, frames_per_patch = True, False, False, 1

    def __init__(self, towers: Sequence[nn.Module], config: FusedConfig) -> None:
        super().__init__()
        self.towers = nn.ModuleList(towers)
        self.config = config

    @property
    def encoder(self) -> Any:
        return self.towers[0].encoder

    @property
    def num_layers(self) -> int:
        return self.towers[0].num_layers  # type: ignore[return-value]

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def check_positions(self) -> None:
        """Raises ``ValueError``: there is one grid for all towers."""
        raise ValueError("several towers take no patch_positions: those of the grid are all that they have")

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        for tower in self.towers:
            tower.gradient_checkpointing_enable(*args, **kwargs)  # type: ignore[operator]

    def gradient_checkpointing_disable(self) -> None:
        for tower in self.towers:
            tower.gradient_checkpointing_disable()  # type: ignore[operator]


class FusedPackingVisionTower(HEVCViTPackingVisionTower):
    """LLaVA vision tower of several packing towers; arguments are those of :class:`HEVCViTPackingVisionTower`, and
    ``mm_packing_fusion`` ("channel", the only way so far, also where it is not given).

    Raises ``ValueError`` for another fusion.
    """

    def __init__(self, vision_tower: str, args: Any, delay_load: bool = False) -> None:
        nn.Module.__init__(self)
        self._saved = saved_tower(args)
        fusion = getattr(args, "mm_packing_fusion", None) or self._saved.get("fusion") or CHANNEL
        if fusion != CHANNEL:
            raise ValueError(f"mm_packing_fusion is {fusion!r}; towers are joined by {CHANNEL!r}")
        self.is_loaded, self.vision_tower_name = False, vision_tower
        self.projector_type = str(getattr(args, "mm_projector_type", None) or "patch_merger")
        if self.projector_type == CHECKPOINT:
            raise ValueError("mm_projector_type: checkpoint: several towers have no projector in common")
        self.encoder_tokens, self._native = budget_of(args), settings_of(args)
        self._reading, self._unfilled, self.on_grids = reading_of(args, is_checkpoint=bool(self._saved)), False, None
        names, notes = tower_names(vision_tower), self._saved.get("towers") or []
        if self._saved and len(notes) != len(names):
            found = f"has {len(notes)}" if notes else "is of one"
            raise ValueError(f"{vision_tower} are {len(names)} towers, but mm_packing_config {found}")
        given = {name: getattr(args, name) for name in READ if hasattr(args, name)}
        self._parts = tuple(
            HEVCViTPackingVisionTower(
                f"{NAME_PREFIX}{name}", SimpleNamespace(**given, mm_packing_config=self._note(notes, i)), delay_load
            )
            for i, name in enumerate(names)
        )
        self.select_layer, self.select_feature = self._parts[0].select_layer, self._parts[0].select_feature
        self.attention, self.fused = self._parts[0].attention, self._parts[0].fused
        if not delay_load or wants_loading(args):
            self.load_model()
        else:
            self.cfg_only = self._joint_config()

    def _note(self, notes: Sequence[Mapping], index: int) -> dict | None:
        """A tower's own note: where its weights are is what the note of all says, for a tower may have been tuned
        later."""
        if not notes:
            return None
        own = {**notes[index], "weights": self._saved.get("weights", "folder")}
        if own["weights"] == "checkpoint":
            own.pop("fingerprint", None)
            own.pop("folder", None)
        return own

    def _joint_config(self) -> FusedConfig:
        configs = [part.config for part in self._parts]
        canvas = max(config.patch_size for config in configs)
        return FusedConfig(
            [config.model_type for config in configs],
            patch_size=canvas,
            image_size=configs[0].image_size // configs[0].patch_size * canvas,
            num_channels=CHANNELS * len(configs),
            hidden_size=sum(part.hidden_size for part in self._parts),
            num_hidden_layers=configs[0].num_hidden_layers,
        )

    def load_model(self, device_map: object = None) -> None:
        if self.is_loaded:
            return
        for part in self._parts:
            part.load_model(device_map)
        models = [part.vision_tower for part in self._parts]
        patches = [model.config.patch_size for model in models]
        self.vision_tower = FusedModel(models, self._joint_config())  # type: ignore[assignment]
        self.image_processor = FusedImageProcessor([part.image_processor for part in self._parts], patches)
        self.image_processor.image_reading = self._reading
        self.image_processor.tower_patch_size = self.vision_tower.config.patch_size
        self.is_loaded = True
        self.set_native(self._native)
        self.set_encoder_tokens(self.encoder_tokens)

    def set_native(self, settings: NativeSettings | None) -> None:
        self._native = settings
        if not self.is_loaded:
            return
        base: Any = getattr(self.image_processor, "fused", self.image_processor)
        self.image_processor = base
        if settings is not None:
            rule = SmartResize(base.patches[0], self.merge, settings.min_patches, settings.max_patches)
            self.image_processor = FusedNativeImageProcessor(base, rule, settings)

    def read_folder(self, device: torch.device | str = "cpu") -> FusedModel:  # type: ignore[override]
        """The weights of all towers' own folders."""
        return FusedModel([part.read_folder(device) for part in self._parts], self._joint_config())

    def _require_weights(self) -> None:
        if not self.is_loaded:
            raise ValueError(f"vision tower {self.vision_tower_name} is not loaded: call load_model() first")
        for part in self._parts:
            part._require_weights()

    def packing_config(self, weights: str = "checkpoint") -> dict:
        towers = [part.packing_config(weights) for part in self._parts]
        return {
            **{"weights": weights, "fusion": CHANNEL, "towers": towers, "config": self.config.to_dict()},
            "image_processor": self.image_processor.to_dict(),
        }

    def _encode(
        self,
        images: torch.Tensor | Sequence[torch.Tensor],
        patch_positions: torch.Tensor | None = None,
        numbers: Sequence[int] | None = None,
    ) -> tuple[torch.Tensor, list[Grid]]:
        """Each tower on its part of the canvases; packed features ``[N, hidden_size]``."""
        side = self.config.patch_size
        found: list[torch.Tensor] = []
        grids: list[Grid] = []
        for number, image in zip(numbers or range(len(images)), images):
            check_canvas(image, number, len(self._parts), side)
        for index, part in enumerate(self._parts):
            patch = part.config.patch_size
            if isinstance(images, torch.Tensor):
                pixels: Any = canvas_part(images, index, patch, side)
            else:
                pixels = [canvas_part(image, index, patch, side) for image in images]
            features, grids = part._encode(pixels, numbers=numbers)
            found.append(features)
        dtype = found[0].dtype
        return torch.cat([features.to(dtype) for features in found], dim=-1), grids

    def encoders(self) -> dict[str, HEVCViTPackingVisionTower]:
        return {f"vision_tower.towers.{index}.": part for index, part in enumerate(self._parts)}

    @property
    def feature_layers(self) -> tuple[int, ...]:
        """Those of the first tower."""
        return self._parts[0].feature_layers

    @property
    def hidden_size(self) -> int:
        """The sum of the towers' widths."""
        return sum(part.hidden_size for part in self._parts)
