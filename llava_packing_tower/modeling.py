"""What all packed encoders have in common as Hugging Face models: loading, saving, the forward contract.

From pixels to features: ``packing`` cuts the rows, :meth:`PackedVisionModel.forward` embeds them, lets the family add
positions and prefix tokens (``prepare``), runs the encoder core, takes the prefixes out again and norms.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from .encoder import PackedEncoder
from .image_processor import PROCESSOR_NAME, PackingImageProcessor
from .layers import PatchEmbed, Rotary
from .loading import (
    CONFIG_NAME,
    Recipe,
    WeightFiles,
    WeightPlan,
    atomic_folder,
    construction,
    load_weights,
    read_json,
    resolve_folder,
    write_json,
)
from .packing import Grid, PackedSegments, PatchLayout, make_segments, read_grid

logger = logging.getLogger(__name__)

HUB_OPTIONS = {"revision", "token", "cache_dir", "local_files_only", "force_download"}
AUTO_OPTIONS = {
    "adapter_kwargs",
    "trust_remote_code",
    "low_cpu_mem_usage",
    "use_safetensors",
    "_from_auto",
    "_commit_hash",
}


class _LoadsByName(type(PreTrainedModel)):
    """Lets a model class be called with a checkpoint in place of a config, as the documents of the family do."""

    def __call__(cls, config=None, *args, ckpt: str | os.PathLike | None = None, **kwargs):
        if isinstance(config, (str, os.PathLike)):
            config, ckpt = None, config
        if ckpt is None:
            if config is None:
                raise ValueError(f"{cls.__name__} needs a config, or ckpt= with a checkpoint folder or hub id")
            return super().__call__(config, *args, **kwargs)
        if args:
            kwargs = {"device": args[0], **kwargs}
        return cls.from_pretrained(ckpt, config=config, **kwargs)


class PackedVisionModel(PreTrainedModel, metaclass=_LoadsByName):
    """Base of the packed encoders.

    ``Model(config)`` makes one with random weights; ``Model(ckpt="folder or hub id", device="cuda")`` is
    :meth:`from_pretrained` with the same keywords.

    A family sets the class attributes, builds ``patch_embed`` and ``encoder`` in its ``__init__`` and implements
    :meth:`prepare` and :meth:`final_norm`; see ``families/``.
    """

    config_class: type[PretrainedConfig]
    main_input_name = "hidden_states"
    base_model_prefix = "vision_model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["EncoderBlock"]
    _supports_sdpa = True
    _supports_flash_attn_2 = True
    _supports_flash_attn = True

    patch_layout: PatchLayout
    image_only: bool = True
    source_model_types: tuple[str, ...] = ()
    """``model_type`` of foreign checkpoints that :meth:`from_pretrained` converts while loading."""

    patch_embed: PatchEmbed | nn.Module
    encoder: PackedEncoder

    # ---------------------------------------------------------------- what a family provides

    def prepare(
        self, tokens: torch.Tensor, grids: Sequence[Grid], patch_positions: torch.Tensor | None
    ) -> tuple[torch.Tensor, PackedSegments, Rotary | None, torch.Tensor | None]:
        """Positions, prefix tokens and metadata for embedded patches ``[N, hidden]``.

        Returns the packed tokens, their segments, the rotary table or None, and the index of the patch tokens in the
        packed sequence, or None if it holds nothing else.
        """
        raise NotImplementedError

    def final_norm(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The norm behind the last block, ``[N, hidden]`` to ``[N, hidden]``."""
        raise NotImplementedError

    @classmethod
    def config_from_source(cls, source: dict, shapes: Mapping[str, tuple[int, ...]] | None = None) -> PretrainedConfig:
        """This family's config from the config.json of a foreign checkpoint (a ``source_model_types`` one).

        shapes: name and shape of its tensors, where they are known, for what a config may leave unsaid.
        """
        raise NotImplementedError

    @classmethod
    def plan_from_source(
        cls, source: dict, config: PretrainedConfig, shapes: Mapping[str, tuple[int, ...]]
    ) -> WeightPlan:
        """Recipes that fill this model from the tensors of a foreign checkpoint."""
        raise NotImplementedError

    @classmethod
    def default_image_processor(cls, config: PretrainedConfig) -> PackingImageProcessor:
        """The image processor for a checkpoint that comes without one: CLIP statistics at the config's image size."""
        return PackingImageProcessor(size=config.image_size)

    @classmethod
    def image_processor_from_source(cls, content: dict, config: PretrainedConfig) -> PackingImageProcessor:
        """From a preprocessor_config.json; what it leaves unsaid is taken from :meth:`default_image_processor`."""
        given = {key: value for key, value in content.items() if value is not None and key != "patch_size"}
        default = cls.default_image_processor(config).to_dict()
        if "size" in given:
            default.pop("crop_size")
        return PackingImageProcessor.from_dict({**default, **given})

    @classmethod
    def load_image_processor(cls, folder: str | os.PathLike, config: PretrainedConfig) -> PackingImageProcessor:
        """The image processor of a checkpoint folder: from its preprocessor_config.json, else the family's default."""
        file = Path(folder) / PROCESSOR_NAME
        if not file.is_file():
            return cls.default_image_processor(config)
        return cls.image_processor_from_source(read_json(file), config)

    # ---------------------------------------------------------------- forward

    @property
    def num_layers(self) -> int:
        return len(self.encoder.layers)

    @property
    def patch_dim(self) -> int:
        return self.config.num_channels * self.config.patch_size**2

    def set_attention_backend(self, name: str) -> None:
        """Choose the attention backend: a key of ``attention.BACKENDS`` or ``auto``; else ``ValueError``."""
        from .attention import backend_module

        if name != "auto":
            backend_module(name)
        self.encoder.attention_backend = name

    def encode(
        self,
        hidden_states: torch.Tensor,
        grid_thw: torch.Tensor,
        patch_positions: torch.Tensor | None,
        keep: Sequence[int],
    ) -> tuple[dict[int, torch.Tensor], list[Grid]]:
        """Patch tokens ``[N, hidden]`` of the wanted hidden states (prefix tokens taken out), and the grids."""
        if hidden_states.dim() != 2 or hidden_states.shape[1] != self.patch_dim:
            raise ValueError(
                f"hidden_states must be [N, {self.patch_dim}] (patch size {self.config.patch_size}, "
                f"{self.config.num_channels} channels, rows in {self.patch_layout.name.lower()} order "
                f"{self.patch_layout.value}), got {list(hidden_states.shape)}"
            )
        grids = read_grid(grid_thw, hidden_states.shape[0])
        if self.image_only and (longest := max(t for t, _, _ in grids)) > 1:
            raise ValueError(f"{type(self).__name__} takes images only (t = 1), got a sample with t = {longest} frames")
        tokens = self.patch_embed(hidden_states.to(self.dtype))
        tokens, segments, rotary, patches = self.prepare(tokens, grids, patch_positions)
        states = self.encoder(tokens, segments, rotary, keep)
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
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Encode a packed batch in one pass.

        Args:
            hidden_states: ``[N, patch_dim]`` patch rows in the family's layout; cast to the model's dtype.
            grid_thw: integer ``[B, 3]`` (frames, rows, columns) of each sample in patches. On the CPU it costs no
                synchronisation.
            patch_positions: ``[N, 3]`` positions in place of those of the grid (LlavaViT only).
            output_hidden_states: also return all hidden states.
            feature_layers: return just these hidden states (0 .. num_layers), as a tuple in this order; blocks above
                the highest are not run and nothing is normed.

        Returns:
            ``[N, hidden]`` final-normed patch tokens; with ``output_hidden_states`` a pair of that and the tuple of
            ``num_layers + 1`` hidden states, index 0 the input of the first block, the last one not normed.

        Raises:
            ValueError: rows of another width, a grid that does not add up to N, ``t > 1`` for an image-only family,
                positions of another shape.
        """
        if feature_layers is not None:
            states, _ = self.encode(hidden_states, grid_thw, patch_positions, feature_layers)
            return tuple(states[index] for index in feature_layers)
        wanted = range(self.num_layers + 1) if output_hidden_states else (self.num_layers,)
        states, _ = self.encode(hidden_states, grid_thw, patch_positions, wanted)
        last = self.final_norm(states[self.num_layers])
        return (last, tuple(states[index] for index in wanted)) if output_hidden_states else last

    def segments_of(self, grids: Sequence[Grid], device: torch.device, prefix: int = 0) -> PackedSegments:
        """One attention segment per sample, ``prefix`` tokens longer than its patches."""
        return make_segments([t * h * w + prefix for t, h, w in grids], device)

    def _init_weights(self, module: nn.Module) -> None:
        """transformers' hook for random initialisation: normal weights, zero biases; norms are made as ones."""
        std = self.config.initializer_range
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.Embedding)):
            nn.init.normal_(module.weight, std=std)
            for name, bias in module.named_parameters(recurse=False):
                if name.endswith("bias"):
                    nn.init.zeros_(bias)

    # ---------------------------------------------------------------- loading and saving

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *,
        config: PretrainedConfig | None = None,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        device: torch.device | str = "cpu",
        attn_implementation: str = "auto",
        **options: object,
    ) -> PackedVisionModel:
        """Load a packing checkpoint, or convert a known foreign one in memory. Strict: all tensors fit, or an error.

        Args:
            pretrained_model_name_or_path: local folder or hub id.
            config: use this config in place of the one in the folder.
            dtype (or torch_dtype): of the weights; None is torch's default dtype, "auto" that of the file.
            device: where the weights go.
            attn_implementation: attention backend, see :func:`attention.varlen_attention`.
            options: ``revision``, ``token``, ``cache_dir``, ``local_files_only`` go to huggingface_hub; what
                transformers' Auto classes add is accepted and has no effect; anything else is a ``TypeError``.

        Returns:
            The model in evaluation mode.

        Raises:
            ValueError: no config, another model_type, or missing, unexpected or mis-shaped tensors.
        """
        if strange := set(options) - HUB_OPTIONS - AUTO_OPTIONS:
            raise TypeError(f"{cls.__name__}.from_pretrained() got unexpected arguments {', '.join(sorted(strange))}")
        hub = {key: value for key, value in options.items() if key in HUB_OPTIONS and value is not None}
        folder = resolve_folder(pretrained_model_name_or_path, **hub)
        raw = read_json(folder / CONFIG_NAME)
        files = WeightFiles(folder)
        shapes = files.shapes()
        own_type = cls.config_class.model_type
        found = raw.get("model_type")
        if found == own_type:
            config = config or cls.config_class.from_dict(raw)
            plan = WeightPlan({key: Recipe((key,)) for key in shapes})
        elif found in cls.source_model_types:
            config = config or cls.config_from_source(raw, shapes)
            plan = cls.plan_from_source(raw, config, shapes)
            logger.warning("%s: a %s checkpoint, converted to %s in memory", folder, found, own_type)
        else:
            known = ", ".join((own_type, *cls.source_model_types))
            raise ValueError(f"{folder}: model_type {found!r} is not one that {cls.__name__} loads ({known})")

        dtype = _as_dtype(dtype if dtype is not None else torch_dtype, files)
        with construction(dtype):
            model = cls(config)
        load_weights(model, plan, files, device)
        model.set_attention_backend(attn_implementation)
        return model.eval()

    def save_pretrained(self, save_directory: str | os.PathLike, *, max_shard_size: str = "5GB", **_: object) -> None:
        """Write config.json and safetensors; the files appear whole, by rename. Other keyword arguments of
        transformers' method (``safe_serialization`` ...) are accepted and have no effect."""
        from huggingface_hub import save_torch_state_dict

        with atomic_folder(save_directory) as folder:
            config = self.config.to_dict()
            config.update(architectures=[type(self).__name__], dtype=str(self.dtype).removeprefix("torch."))
            write_json(config, folder / CONFIG_NAME)
            save_torch_state_dict(self.state_dict(), folder, max_shard_size=max_shard_size, metadata={"format": "pt"})


def _as_dtype(dtype: torch.dtype | str | None, files: WeightFiles) -> torch.dtype:
    if dtype is None:
        return torch.get_default_dtype()
    if dtype == "auto":
        return next(t.dtype for t in (files[key] for key in files.shapes()) if t.is_floating_point())
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating-point torch dtype, its name, 'auto' or None, got {dtype!r}")
    return dtype
