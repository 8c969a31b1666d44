"""The base class of the packed encoders: their common interface as Hugging Face models.

From pixels to features: ``data.patches`` cuts the rows, :meth:`PackedVisionModel.forward` embeds them, lets the family
add positions and prefix tokens (``prepare``), runs the blocks, removes the prefix tokens and applies the final norm.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PretrainedConfig

from ..checkpoint.pretrained import StrictPreTrainedModel
from ..data.image_processor import PackingImageProcessor, processor_content, processor_file
from ..data.patches import PatchLayout
from ..data.pixel_scale import check_floating
from ..data.segments import Grid, Segments, VarlenMetadata, make_segments, read_grid
from ..data.timm_processor import timm_content
from ..utils.files import CONFIG_NAME
from .encoder import PackedEncoder
from .layers import PatchEmbed, Rotary
from .merger import MergerSource
from .position_tables import LearnedTable
from .unused_parameters import join_idle

_Meta: Any = type(StrictPreTrainedModel)


class _LoadsByName(_Meta):
    """Lets a model class be called with a checkpoint instead of a config: ``DINOv3ViTPacking(ckpt=...)``."""

    def __call__(cls: Any, config: Any = None, *args: Any, ckpt: str | os.PathLike | None = None, **kwargs: Any) -> Any:
        if isinstance(config, (str, os.PathLike)):
            config, ckpt = None, config
        if ckpt is None:
            if config is None:
                raise ValueError(f"{cls.__name__} needs a config, or ckpt= with a checkpoint folder or hub id")
            return super().__call__(config, *args, **kwargs)
        if args:
            kwargs = {"device": args[0], **kwargs}
        return cls.from_pretrained(ckpt, config=config, **kwargs)


def stretched(config: PretrainedConfig, **pixels: Any) -> PackingImageProcessor:
    """An image processor that stretches images to the config's square; CLIP statistics and bicubic unless given."""
    size = {"height": config.image_size, "width": config.image_size}
    return PackingImageProcessor(size=size, patch_size=config.patch_size, **pixels)


class PackedVisionModel(StrictPreTrainedModel, metaclass=_LoadsByName):
    """Base of the packed encoders.

    ``Model(config)`` makes one with random weights; ``Model(ckpt="folder or hub id", device="cuda")`` is
    :meth:`from_pretrained` with the same keywords.

    A family sets the class attributes, builds ``patch_embed`` and ``encoder`` in its ``__init__`` and implements
    :meth:`prepare` and :meth:`final_norm`; see ``siglip2``, ``aimv2`` and ``dinov3``.
    """

    config_class: type[PretrainedConfig]
    main_input_name = "hidden_states"
    base_model_prefix = "vision_model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["EncoderBlock"]
    _supports_sdpa = True
    _supports_flash_attn_2 = True
    _supports_flash_attn = True

    patch_layout: PatchLayout
    image_only: bool = True
    takes_positions: bool = True
    """Whether videos may have ``patch_positions`` of their own (of no meaning where ``image_only``)."""
    stretches_clips: bool = True
    """Whether the position of a frame is its place in the video on a scale of 64, as LlavaViT expects it; else its
    number in the video."""
    patch_embed: PatchEmbed | nn.Module
    encoder: PackedEncoder

    # ---------------------------------------------------------------- what a family provides

    def prepare(
        self, tokens: torch.Tensor, grids: Sequence[Grid], patch_positions: torch.Tensor | None
    ) -> tuple[torch.Tensor, Segments, Rotary | None, torch.Tensor | None]:
        """Positions, prefix tokens and metadata for embedded patches ``[N, hidden]``.

        Returns the packed tokens, their segments (:class:`LayerSegments` where those of the blocks differ), the rotary
        table or None, and the index of the patch tokens, in raster order, in the packed sequence, or None if that is
        exactly the patch tokens in raster order.
        """
        raise NotImplementedError

    def final_norm(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The norm behind the last block, ``[N, hidden]`` to ``[N, hidden]``."""
        raise NotImplementedError

    @classmethod
    def merger_from_source(
        cls, source: dict, config: PretrainedConfig, shapes: Mapping[str, tuple[int, ...]]
    ) -> MergerSource | None:
        """The projector that a foreign checkpoint has behind this tower, for ``mm_projector_type: checkpoint``; None
        where it has none. ``shapes``: of all its tensors."""
        return None

    @classmethod
    def default_image_processor(cls, config: PretrainedConfig) -> PackingImageProcessor:
        """The image processor for a checkpoint that comes without one: CLIP statistics at the config's image size."""
        return PackingImageProcessor(size=config.image_size)

    @classmethod
    def image_processor_from_source(cls, content: dict, config: PretrainedConfig) -> PackingImageProcessor:
        """From a preprocessor_config.json; missing fields are those of :meth:`default_image_processor`.

        Raises ``ValueError`` for a field with an impossible value.
        """
        given = {key: value for key, value in content.items() if value is not None and key != "patch_size"}
        if isinstance(given.get("size"), dict) and "longest_edge" in given["size"]:
            del given["size"]  # bounds of the area of an image in pixels, which have no square
        default = cls.default_image_processor(config).to_dict()
        if "size" in given:
            default.pop("crop_size")
        return PackingImageProcessor.from_dict({**default, **given}, where=None)

    @classmethod
    def load_image_processor(cls, folder: str | os.PathLike, config: PretrainedConfig) -> PackingImageProcessor:
        """The image processor of a checkpoint folder (or weight file): from its preprocessor_config.json or
        processor_config.json, from timm's config.json, else the family's default.

        Raises ``ValueError`` with the file, for one that cannot be used.
        """
        content = processor_content(folder) or timm_content(folder)
        try:
            default = cls.default_image_processor(config)
        except ValueError as error:
            raise ValueError(f"{Path(folder) / CONFIG_NAME}: {error}") from error
        if content is None:
            return default
        try:
            return cls.image_processor_from_source(content, config)
        except ValueError as error:
            raise ValueError(f"{processor_file(folder)}: {error}") from error

    # ---------------------------------------------------------------- forward

    @property
    def num_layers(self) -> int:
        """Number of blocks."""
        return len(self.encoder.layers)

    @property
    def frames_per_patch(self) -> int:
        """Frames that one patch covers: a temporal patch. Images are repeated to so many."""
        return 1

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""
        return self.config.patch_size

    @property
    def patch_dim(self) -> int:
        """Numbers in one patch row: channels, frames and pixels of a patch."""
        return self.config.num_channels * self.frames_per_patch * self.config.patch_size**2

    def get_input_embeddings(self) -> nn.Module:
        """The patch embedding: its output is what ``enable_input_require_grads()`` asks a gradient of."""
        return self.patch_embed

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.patch_embed = value

    def check_positions(self) -> None:
        """Raises ``ValueError`` for a model that has no use for ``patch_positions``."""
        if self.image_only:
            raise ValueError(f"{type(self).__name__} takes images only, without patch_positions")
        if not self.takes_positions:
            raise ValueError(f"{type(self).__name__} takes no patch_positions: those of the grid are all that it has")

    def set_attention_backend(self, name: str) -> None:
        """Choose the attention backend: a key of ``attention.BACKENDS`` or ``auto``; else ``ValueError``."""
        from ..attention.dispatch import backend_module

        if name != "auto":
            backend_module(name)
        self.encoder.attention_backend = name

    def set_fused(self, choice: bool | None) -> None:
        """Run the encoder's blocks eager (False), fused wherever that can be (True), or, by default (None), fused in
        half precision on a GPU."""
        self.encoder.fused = choice

    def set_compile(self, choice: bool | None) -> None:
        """The old name of :meth:`set_fused`: False means eager blocks, anything else the default."""
        self.set_fused(False if choice is False else None)

    def encode(
        self,
        hidden_states: torch.Tensor,
        grid_thw: torch.Tensor,
        patch_positions: torch.Tensor | None,
        keep: Sequence[int],
    ) -> tuple[dict[int, torch.Tensor], list[Grid]]:
        """Patch tokens ``[N, hidden]`` of the hidden states in ``keep``, without prefix tokens, and the grids.

        Arguments and errors are those of :meth:`forward`; ``keep`` has indices from 0 to ``num_layers``.
        """
        if hidden_states.dim() != 2 or hidden_states.shape[1] != self.patch_dim:
            frames = f" of {self.frames_per_patch} frames" if self.frames_per_patch > 1 else ""
            raise ValueError(
                f"hidden_states must be [N, {self.patch_dim}] (patch size {self.config.patch_size}, "
                f"{self.config.num_channels} channels, rows in {self.patch_layout.name.lower()} order "
                f"{self.patch_layout.value}{frames}), got {list(hidden_states.shape)}"
            )
        check_floating(hidden_states)
        grids = read_grid(grid_thw, hidden_states.shape[0])
        if patch_positions is not None and not self.image_only:
            self.check_positions()
        if self.image_only and (longest := max(t for t, _, _ in grids)) > 1:
            raise ValueError(f"{type(self).__name__} takes images only (t = 1), got a sample with t = {longest} frames")
        tokens = self.patch_embed(hidden_states.to(self.dtype))
        tokens, segments, rotary, patches = self.prepare(tokens, grids, patch_positions)
        states = dict(zip(keep, self.encoder(tokens, segments, rotary, keep)))
        if patches is not None:
            states = {index: state.index_select(0, patches) for index, state in states.items()}
        return states, grids

    def forward(
        self,
        hidden_states: torch.Tensor,
        grid_thw: torch.Tensor,
        patch_positions: torch.Tensor | None = None,
        output_hidden_states: bool = False,
        feature_layers: Sequence[int] | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, ...] | tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Encode a packed batch in one pass.

        Args:
            hidden_states: ``[N, patch_dim]`` patch rows in the family's layout; cast to the model's dtype.
            grid_thw: integer ``[B, 3]`` (frames, rows, columns) of each sample in patches. On the CPU it costs no
                synchronization.
            patch_positions: ``[N, 3]`` positions in place of those of the grid (LlavaViT only).
            output_hidden_states: also return all hidden states.
            feature_layers: return just these hidden states (0 .. num_layers), as a tuple in this order; blocks above
                the highest are not run and nothing is normed. (In training, weights that are not used get gradients of
                zeros.)

        Returns:
            ``[N, hidden]`` final-normed patch tokens; with ``output_hidden_states`` a pair of that and the tuple of
            ``num_layers + 1`` hidden states, index 0 the input of the first block, the last one not normed.

        Raises:
            ValueError: rows of another width or of integers, a grid that does not add up to N, ``t > 1`` for an
                image-only family, positions of another shape.
        """
        if feature_layers is not None:
            states, _ = self.encode(hidden_states, grid_thw, patch_positions, feature_layers)
            return join_idle(self, [states[index] for index in feature_layers], max(feature_layers))
        wanted = range(self.num_layers + 1) if output_hidden_states else (self.num_layers,)
        states, _ = self.encode(hidden_states, grid_thw, patch_positions, wanted)
        last = self.final_norm(states[self.num_layers])
        return (last, tuple(states[index] for index in wanted)) if output_hidden_states else last

    def segments_of(self, grids: Sequence[Grid], device: torch.device, prefix: int = 0) -> VarlenMetadata:
        """One attention segment per sample, ``prefix`` tokens longer than its patches."""
        return make_segments([t * h * w + prefix for t, h, w in grids], device)

    def _init_weights(self, module: nn.Module) -> None:
        """transformers' hook for random initialization: normal weights, zero biases; norms are made as ones."""
        std = self.config.initializer_range
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.Embedding, LearnedTable)):
            nn.init.normal_(module.weight, std=std)
            for name, bias in module.named_parameters(recurse=False):
                if name.endswith("bias"):
                    nn.init.zeros_(bias)
