"""The vision tower that LLaVA sees: pixels in, features per image out, one packed pass for the whole batch."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from ..checkpoint.hub import resolve_path
from ..checkpoint.opening import open_checkpoint
from ..checkpoint.pretrained import StrictPreTrainedModel
from ..checkpoint.weights import replace_parameter, zero3_enabled
from ..data.image_processor import PackingImageProcessor
from ..data.images import reading_of
from ..data.native_config import NativeSettings, settings_of
from ..data.native_image_processor import NativeImageProcessor
from ..data.patches import batch_images_to_packing_input, longest_first, split_packed
from ..data.segments import Grid, read_grid
from ..data.smart_resize import CHECKPOINT, SmartResize, known_merge, merged
from ..models.registry import family_for, part_of, type_of
from ..models.runtime.cuda_graphs import encode_images
from ..models.runtime.offloading import execution_device, offloaded_weights
from ..utils import environment
from ..utils.files import CONFIG_NAME, read_json, user_path
from ..utils.tracing import is_plain
from .feature_select import selected_layers
from .names import strip_prefix
from .passes import allow_several, budget_of, count_patches, run_passes
from .sample_positions import encode_samples
from .saved_tower import (
    device_of,
    fitting_processor,
    frozen_folder,
    hollow,
    saved_tower,
    tower_fingerprint,
    wants_loading,
)

logger = logging.getLogger(__name__)


class HEVCViTPackingVisionTower(nn.Module):
    """LLaVA vision tower over a packed encoder of any family.

    Args:
        vision_tower: checkpoint folder or hub id, with or without a ``packing:`` prefix.
        args: LLaVA's model arguments or config. Read: ``mm_vision_select_layer`` (required),
            ``mm_vision_select_feature`` ("patch"), ``mm_projector_type``, ``mm_packing_attention`` ("auto"),
            ``mm_packing_compile`` (False: eager blocks; the key is older than fused blocks),
            ``mm_packing_config`` (written into a LLaVA checkpoint; lets a tower whose weights are in that checkpoint
            be rebuilt without its folder), ``unfreeze_mm_vision_tower``, ``mm_tunable_parts``, and for native
            resolution ``image_aspect_ratio`` with the ``mm_packing_*`` keys of :mod:`..data.native_config`.
        delay_load: read only the config now, unless the arguments say that the tower is trained.

    Features keep the tower's own dtype, whatever the dtype of the images.
    """

    def __init__(self, vision_tower: str, args: Any, delay_load: bool = False) -> None:
        super().__init__()
        self.is_loaded = False
        self.vision_tower_name = vision_tower
        layer = getattr(args, "mm_vision_select_layer", None)
        if type(layer) is not int:
            raise ValueError(f"mm_vision_select_layer must be a whole number, got {layer!r:.80}")
        self.select_layer: int = layer
        self.select_feature = getattr(args, "mm_vision_select_feature", None) or "patch"
        self.projector_type = str(getattr(args, "mm_projector_type", None) or "patch_merger")
        self.attention = (
            getattr(args, "mm_packing_attention", None) or environment.read(environment.ATTENTION) or "auto"
        )
        self.fused = None if getattr(args, "mm_packing_compile", True) else False
        self.encoder_tokens = budget_of(args)
        self._saved = saved_tower(args)
        self._native = settings_of(args)
        self._reading = reading_of(args, is_checkpoint=bool(self._saved))
        self._unfilled = False
        self.on_grids: Callable[[list[Grid]], None] | None = None  # is told what each forward pass encodes
        if not delay_load or wants_loading(args):
            self.load_model()
        else:
            self.cfg_only = self._read_config()
        _ = self.feature_layers  # a selection that does not exist is an error now, not at the first step

    # ---------------------------------------------------------------- loading

    @property
    def _in_checkpoint(self) -> bool:
        """Whether the weights come from the LLaVA checkpoint that is being loaded around this tower."""
        return self._saved.get("weights") == "checkpoint"

    def _model_class(self, model_type: str | None) -> type[StrictPreTrainedModel]:
        """What a checkpoint of this ``model_type`` is loaded as. Raises ``ValueError`` for an unknown one."""
        return family_for(model_type)

    def _class_of(self, raw: Mapping, where: object) -> type[StrictPreTrainedModel]:
        try:
            return self._model_class(type_of(raw))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error

    def _read_config(self) -> PretrainedConfig:
        if self._in_checkpoint:
            raw, where = self._saved["config"], "mm_packing_config.config"
            return self._class_of(raw, where).read_config(raw, where=where)
        file = self._folder() / CONFIG_NAME
        raw = read_json(file) if file.is_file() else {}
        if "model_type" in raw:
            family = self._class_of(raw, file)
            own = raw["model_type"] == family.config_class.model_type
            # The authors' configs of some families leave sizes to the weights.
            shapes = None if own else open_checkpoint(self._folder()).files.shapes()
            return family.read_config(raw, shapes, file)
        opened = open_checkpoint(self._folder())  # the weights tell
        return self._class_of(opened.raw, opened.where).plan(opened.raw, opened.files.shapes(), None, opened.where)[0]

    def load_model(self, device_map: object = None) -> None:
        """Load weights and image processor and freeze the weights; the trainer unfreezes what it trains.

        Called a second time it does nothing. ``device_map`` is what LLaVA passes: None, "auto" or a device (the
        weights go there), or a dict (its entry for the vision tower).

        Raises ``ValueError`` for a folder without config, or with weights that do not fit.
        """
        if self.is_loaded:
            logger.info("%s is already loaded", self.vision_tower_name)
            return
        if self._in_checkpoint:
            model, processor = self._from_saved_config()
        else:
            model, processor = self._from_folder(device_of(device_map))
        model.set_attention_backend(self.attention)
        model.set_fused(self.fused)
        processor.image_reading = self._reading
        self.image_processor = fitting_processor(processor, model.config.patch_size)
        self.image_processor.tower_patch_size = model.config.patch_size
        self.vision_tower = model.requires_grad_(False)
        self.is_loaded = True
        self.set_native(self._native)
        self.set_encoder_tokens(self.encoder_tokens)

    def set_encoder_tokens(self, budget: int | None) -> None:
        """The most patches of one encoder pass, None for any number; before DeepSpeed has the model."""
        self.encoder_tokens = budget
        if self.is_loaded:
            allow_several(self.vision_tower, budget is not None)

    def set_native(self, settings: NativeSettings | None) -> None:
        """Prepare images at native resolution as the settings say, or (None) as the tower's own processor does."""
        self._native = settings
        if not self.is_loaded:
            return
        base = getattr(self.image_processor, "base", self.image_processor)
        self.image_processor = base
        if settings is not None:
            rule = SmartResize(self.config.patch_size, self.merge, settings.min_patches, settings.max_patches)
            self.image_processor = NativeImageProcessor(base, rule, settings, self.vision_tower.frames_per_patch)

    def _folder(self) -> Path:
        """The tower's own folder. Raises ``ValueError`` where it is not found."""
        found = frozen_folder(self.vision_tower_name, self._saved) if self._saved else None
        return found or resolve_path(strip_prefix(self.vision_tower_name), part=part_of)

    def read_folder(self, device: torch.device | str = "cpu") -> StrictPreTrainedModel:
        """A model with the weights of the tower's own folder; ``ValueError`` where they do not fit."""
        folder = self._folder()
        opened = open_checkpoint(folder, part=part_of)
        return self._class_of(opened.raw, opened.where).from_pretrained(folder, device=device)

    def _from_folder(self, device: torch.device) -> tuple[StrictPreTrainedModel, PackingImageProcessor]:
        folder, model = self._folder(), self.read_folder(device)
        family = type(model)
        processor = family.load_image_processor(folder, model.config)
        if self._saved and (expected := self._saved.get("fingerprint")) and tower_fingerprint(folder) != expected:
            raise ValueError(
                f"{folder} has changed since this LLaVA checkpoint was trained with it as a frozen tower: its "
                f"fingerprint is no longer {expected[:12]}... Restore the folder."
            )
        return model, processor

    def _from_saved_config(self) -> tuple[StrictPreTrainedModel, PackingImageProcessor]:
        """The bare structure, for the loader around us to fill. NaN until then, so that a gap cannot go unseen."""
        config = self._read_config()
        processor = PackingImageProcessor.from_dict(self._saved["image_processor"], "mm_packing_config.image_processor")
        dtype = torch.get_default_dtype()
        model = self._model_class(config.model_type).without_values(config, dtype, "mm_packing_config.config")
        if not zero3_enabled():
            with torch.device("cpu"):
                for module in model.modules():
                    for name, parameter in list(module.named_parameters(recurse=False)):
                        replace_parameter(module, name, nn.Parameter(hollow(parameter.shape, dtype)))
            self._unfilled = True
        return model.eval(), processor

    def _require_weights(self) -> None:
        if not self.is_loaded:
            raise ValueError(f"vision tower {self.vision_tower_name} is not loaded: call load_model() first")
        if not self._unfilled:
            return
        # (Quantized weights are not plain tensors, and were not made from these, which were NaN.)
        here = {name: p for name, p in self.vision_tower.named_parameters() if is_plain(p)}
        gaps = {name for name, p in here.items() if p.is_meta or p.isnan().any()}
        for name, value in offloaded_weights(self.vision_tower):
            if name in gaps and here[name].is_meta and not value.isnan().any():
                gaps.remove(name)
        if gaps:
            raise ValueError(
                f"{len(gaps)} tensors of the vision tower were not in the LLaVA checkpoint (or hold NaN), "
                f"for example {min(gaps)}: its tower weights are lost or damaged"
            )
        self._unfilled = False

    def packing_config(self, weights: str = "checkpoint") -> dict:
        """What a LLaVA checkpoint must remember of this tower (JSON types only), for ``config.mm_packing_config``.

        weights: "checkpoint" if the LLaVA checkpoint holds the (tuned) weights, "folder" if they are to be taken from
        the tower's own folder again; then a fingerprint of the folder is included, and where it was. Raises
        ``ValueError`` for another word.
        """
        if weights not in ("checkpoint", "folder"):
            raise ValueError(f"weights must be 'checkpoint' or 'folder', got {weights!r}")
        content = {
            "weights": weights,
            "config": self.config.to_dict(),
            "image_processor": self.image_processor.to_dict(),
        }
        if weights == "folder":
            folder = self._folder()
            content["fingerprint"] = tower_fingerprint(folder)
            if user_path(strip_prefix(self.vision_tower_name)).exists():  # no hub id
                content["folder"] = str(folder.resolve())
        return content

    # ---------------------------------------------------------------- forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # ZeRO-3's hooks would count each returned image as a step of the backward pass, and DeepSpeed compares the
        # steps of all ranks, which have other numbers of images. Here is nothing to gather: the weights are further in.
        partitioned = self.is_loaded and hasattr(next(self.vision_tower.parameters()), "ds_id")
        return self.forward(*args, **kwargs) if partitioned else super().__call__(*args, **kwargs)

    def _encode(
        self,
        images: torch.Tensor | Sequence[torch.Tensor],
        patch_positions: torch.Tensor | None = None,
        numbers: Sequence[int] | None = None,
    ) -> tuple[torch.Tensor, list[Grid]]:
        """Packed features ``[N, hidden_size]`` of all images, and the grid of each.

        numbers: those of the images in the user's batch, for error messages.
        """
        # ============================================================================================
        # INPUT CONVERSION: [B, C, H, W], or a ragged list of [C, H, W]
        #                -> hidden_states [N, patch_dim] + grid_thw [B, 3]
        # ============================================================================================
        model = self.vision_tower
        scale = getattr(self.image_processor, "pixel_scale", None)
        hidden_states, grid_thw = self._batch_images_to_packing_input(
            images, device=self.device, dtype=self.dtype, numbers=numbers, scale=scale
        )

        # One variable-length pass over all images; only the hidden states that are selected are computed and kept.
        given = {} if patch_positions is None else {"patch_positions": patch_positions}
        states = model(hidden_states=hidden_states, grid_thw=grid_thw, feature_layers=self.feature_layers, **given)
        packed = states[0] if len(states) == 1 else torch.cat(states, dim=-1)
        return packed, read_grid(grid_thw)

    def _image_to_packing_input(self, image_tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """One image ``[C, H, W]`` as this tower's encoder takes it: rows ``[h*w, patch_dim]`` and grid ``[1, 3]``."""
        return self._batch_images_to_packing_input([image_tensor])

    def _batch_images_to_packing_input(
        self, images: torch.Tensor | Sequence[torch.Tensor], **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Images ``[B, C, H, W]``, or a list, as rows ``[N, patch_dim]`` and grid ``[B, 3]``."""
        model = self.vision_tower
        options |= {"num_channels": model.config.num_channels, "frames_per_patch": model.frames_per_patch}
        return batch_images_to_packing_input(images, model.config.patch_size, model.patch_layout, **options)

    def forward(
        self,
        images: torch.Tensor | Sequence[torch.Tensor],
        return_spatial_dims: bool = False,
        patch_positions: torch.Tensor | Sequence[torch.Tensor | None] | None = None,
        grid_thw: object = None,
    ) -> torch.Tensor | list[torch.Tensor] | tuple[torch.Tensor | list[torch.Tensor], int, int]:
        """Features of images, all of them in one packed pass (or in several, see ``encoder_tokens``).

        Args:
            images: ``[B, C, H, W]``, or a list of ``[C, H, W]`` of any sizes (multiples of the patch size), with clips
                ``[C, T, H, W]`` among them if the family knows time. Floating point ones are normalized already; uint8
                ones are normalized here, in float32, with the scale, mean and deviation of the image processor.
            return_spatial_dims: also return rows and columns, in patches, of the first image.
            patch_positions: ``[N, 3]`` (frame, row, column) of all patches in place of those of the grids; or one entry
                for each sample (see :mod:`.sample_positions`).
            grid_thw: not read; OneVision-Encoder's LLaVA passes what the images' sizes say.

        Returns:
            ``[B, h*w, hidden_size]`` for a tensor, a list of ``[t_i*h_i*w_i, hidden_size]`` for a list, in the tower's
            dtype: one feature per patch, frame by frame, row by row. Where a patch covers several frames
            (``frames_per_patch``), t counts patches, and a clip that ends within one has its last frame repeated.

        Raises:
            ValueError: not loaded, no images, a wrong channel count, a size that is no multiple of the patch size, or
                clips or positions for a family that does not take them, integers that are not uint8.
        """
        self._require_weights()
        if patch_positions is not None and not isinstance(patch_positions, torch.Tensor):
            return encode_samples(self, images, patch_positions, return_spatial_dims)
        if patch_positions is not None:
            self.vision_tower.check_positions()

        # Pixels to packed features: see _encode, which is called, or replayed as a CUDA graph.
        model, layers = self.vision_tower, self.feature_layers
        is_batch, order = isinstance(images, torch.Tensor), list(range(len(images)))
        if not isinstance(images, torch.Tensor) and patch_positions is None:
            order = longest_first(images)
        sizes = [count_patches(images[i], model.config.patch_size, model.frames_per_patch) for i in order]

        def run(places: Sequence[int]) -> tuple[torch.Tensor, list[Grid]]:
            numbers = [order[place] for place in places]  # (They are neighbors.)
            part = images[numbers[0] : numbers[-1] + 1] if is_batch and numbers else [images[i] for i in numbers]
            if patch_positions is None:
                return encode_images(model, part, layers, functools.partial(self._encode, numbers=numbers))
            start = sum(sizes[: places[0]]) if places else 0
            own = slice(start, start + sum(sizes[place] for place in places))
            return self._encode(part, patch_positions if len(places) == len(order) else patch_positions[own], numbers)

        packed, grids = run_passes(model, sizes, self.encoder_tokens, self.device, run, self.on_grids)

        # ============================================================================================
        # OUTPUT CONVERSION: [N, hidden_size]
        #                 -> [B, tokens, hidden_size], or a list of [tokens_i, hidden_size]
        # ============================================================================================
        features = packed.unflatten(0, (len(grids), -1)) if is_batch else split_packed(packed, grids)
        if not is_batch:  # back to the order of the images
            places = sorted(range(len(order)), key=order.__getitem__)
            features, grids = [features[i] for i in places], [grids[i] for i in places]
        return (features, grids[0][1], grids[0][2]) if return_spatial_dims else features

    # ---------------------------------------------------------------- what LLaVA reads

    @property
    def config(self) -> PretrainedConfig:
        return self.vision_tower.config if self.is_loaded else self.cfg_only

    def encoders(self) -> dict[str, HEVCViTPackingVisionTower]:
        """What the names of an encoder's parameters begin with, and the tower that selects from it."""
        return {"vision_tower.": self}

    @property
    def feature_layers(self) -> tuple[int, ...]:
        """Indices of the hidden states that make up the features. Raises ``ValueError`` for a bad selection."""
        return selected_layers(self.select_feature, self.select_layer, self.config.num_hidden_layers)

    @property
    def hidden_size(self) -> int:
        """Width of a feature: the encoder's width times the number of selected layers."""
        return self.config.hidden_size * len(self.feature_layers)

    @property
    def image_size(self) -> int:
        """Side in pixels of the nominal square image."""
        return self.config.image_size

    @property
    def merge(self) -> tuple[int, int]:
        """Rows and columns of patches that become one visual token behind the projector."""
        if self.projector_type == CHECKPOINT:
            return (getattr(self.config, "spatial_merge_size", 1),) * 2
        return known_merge(self.projector_type) or (1, 1)

    @property
    def num_patches_per_side(self) -> int:
        """Patches per side of the nominal image, or cells of them (2 x 2: rounded down) that the projector merges."""
        side = self.image_size // self.config.patch_size
        if self.projector_type == "spatial_merge":
            return side // 2
        return merged((side, side), self.merge)[0] if self.merge[0] == self.merge[1] else side

    @property
    def num_patches(self) -> int:
        """Visual tokens of the nominal image; a quarter (rounded down) if the projector merges 2 x 2."""
        count = (self.image_size // self.config.patch_size) ** 2
        if self.projector_type == "spatial_merge":
            return count // 4
        return self.num_patches_per_side**2

    @property
    def dtype(self) -> torch.dtype:
        return self.vision_tower.dtype if self.is_loaded else torch.float32

    @property
    def device(self) -> torch.device:
        """Where images are to go: where the first weight lies, or where accelerate's hooks bring it."""
        if not self.is_loaded:
            return torch.device("cpu")
        device = self.vision_tower.device
        return device if device.type != "meta" else execution_device(self.vision_tower) or device

    @property
    def dummy_feature(self) -> torch.Tensor:
        return torch.zeros(1, self.hidden_size, device=self.device, dtype=self.dtype)
